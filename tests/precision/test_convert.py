"""Which layers a swap takes, which it leaves and why, and what the model keeps when its layers change."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from mptrain import ConversionReport, Precision, PrecisionPolicy
from mptrain.precision.convert import select, swap

pytestmark = pytest.mark.usefixtures("one_thread")


class Swapped(nn.Module):
    """What a backend would put in a layer's place: the same parameters, and a record that it ran."""

    def __init__(self, old: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = old.weight, old.bias
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return nn.functional.linear(x, self.weight, self.bias)


def layers(count: int, size: int = 16) -> nn.Module:
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Linear(size, size) for _ in range(count)])
    return model


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        ("", set()),
        (r"layers\.2", {"layers.2"}),
        (r"layers\.2.", {"layers.20", "layers.21"}),
        (r"layers\.(2|10)", {"layers.2", "layers.10"}),
        ("layers", set()),
        ("2", set()),
        (r".*\.2", {"layers.2"}),
        (r".*2", {"layers.2", "layers.12"}),
        (r"layers\.1|layers\.2", {"layers.1", "layers.2"}),  # an alternative matches in full as well
    ],
)
def test_keep_matches_a_name_in_full(keep, kept):
    chosen, left = select(layers(22), keep, multiple=16)
    assert left == dict.fromkeys(kept, "matches precision.keep")
    assert set(chosen) == {f"layers.{n}" for n in range(22)} - kept


@pytest.mark.parametrize("multiple", [16, 128])
def test_a_layer_that_does_not_fit_stops_nothing(multiple):
    """Ten layers, one of them a size no FP8 GEMM takes: the nine others are converted, those after it too."""
    model = layers(10, multiple)
    model.layers[4] = nn.Linear(multiple, multiple + 4)
    model.layers[5] = nn.Linear(multiple + 4, multiple)
    model.layers[6] = nn.Linear(multiple // 2, multiple)
    chosen, kept = select(model, "", multiple=multiple)
    assert list(chosen) == [f"layers.{n}" for n in (0, 1, 2, 3, 7, 8, 9)]
    wide, half = multiple + 4, multiple // 2
    sizes = {4: f"{wide}x{multiple}", 5: f"{multiple}x{wide}", 6: f"{multiple}x{half}"}
    assert kept == {
        f"layers.{n}": f"{size} is not divisible by {multiple}, which FP8 GEMMs need" for n, size in sizes.items()
    }


def test_only_linear_layers_are_looked_at():
    model = nn.Sequential(nn.Embedding(16, 16), nn.LayerNorm(16), nn.Conv1d(16, 16, 1), nn.Bilinear(16, 16, 16))
    assert select(model, ".*", multiple=16) == ({}, {})


class Masked(nn.Linear):
    def forward(self, input):
        return nn.functional.linear(input, self.weight * 0.0, self.bias)


def test_a_subclass_with_a_forward_of_its_own_is_kept():
    """Swapped, it would compute something else without a word; a subclass that only initializes is a linear layer."""

    class Zeroed(nn.Linear):
        def reset_parameters(self):
            nn.init.zeros_(self.weight)

    model = nn.Sequential(Masked(16, 16, bias=False), nn.Linear(16, 16), Zeroed(16, 16, bias=False))
    chosen, kept = select(model, "", multiple=16)
    assert list(chosen) == ["1", "2"]
    assert kept == {"0": "Masked has a forward of its own, which a swap would drop"}
    with Precision("fp8").prepare(model).forward():
        assert not model[0](torch.ones(16, 16)).any()


def test_a_parametrized_layer_is_kept():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(16, 16)), nn.Linear(16, 16))
    precision = Precision("fp8").prepare(model)
    assert precision.report.converted == ("1",)
    assert "parametrized" in precision.report.kept["0"]
    with precision.forward():
        loss = model(torch.randn(16, 16)).float().square().mean()
    precision.backward(loss)
    assert precision.step(torch.optim.SGD(model.parameters(), lr=0.1)).applied


def test_a_model_that_is_a_layer_is_told_what_to_do():
    chosen, kept = select(nn.Linear(16, 16), "", multiple=16)
    assert chosen == {}
    assert kept == {"(root)": "the model itself is the layer and cannot be swapped: wrap it in nn.Sequential"}


def test_a_swap_shares_everything():
    model = nn.Module()
    model.first, model.second = nn.Linear(16, 32), nn.Linear(16, 32)
    model.second.weight = model.first.weight
    model.second.bias.requires_grad_(False)
    model.second.eval()
    model.bare = nn.Linear(16, 16, bias=False)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    wants = {name: p.requires_grad for name, p in parameters.items()}
    state = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    chosen, _ = select(model, "", multiple=16)
    swap(model, chosen, lambda name, layer: Swapped(layer))
    assert [type(module) for module in model.children()] == [Swapped] * 3
    after = dict(model.named_parameters(remove_duplicate=False))
    assert after.keys() == parameters.keys()
    for name, parameter in after.items():
        assert parameter is parameters[name]
        assert parameter.requires_grad == wants[name]
    assert model.first.weight is model.second.weight, "the tie is gone"
    assert (model.first.training, model.second.training) == (True, False)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    model.second(torch.ones(1, 16)).sum().backward()
    optimizer.step()  # built before the swap
    assert torch.equal(model.first.weight, state["first.weight"] - 1.0)


def test_a_swap_that_copies_the_weight_is_a_defect():
    model = layers(1)
    chosen, _ = select(model, "", multiple=16)
    with pytest.raises(AssertionError, match=r"layers\.0: a swap must share the weight"):
        swap(model, chosen, lambda name, layer: nn.Linear(16, 16))


@pytest.mark.parametrize("depth", ["layer", "block"])
def test_a_module_with_two_names_is_swapped_under_both(depth):
    """A layer, or the block that holds it, used twice: made once, and no name still leads to the old one."""
    model = nn.Module()
    if depth == "layer":
        model.a = model.b = nn.Linear(16, 16)
        places = ("a", "b")
    else:
        model.x = model.y = nn.Sequential(nn.Linear(16, 16))
        places = ("x.0", "y.0")
    old = model.get_submodule(places[0])
    chosen, kept = select(model, "", multiple=16)
    assert (list(chosen), kept) == ([places[0]], {})
    made = []
    swap(model, chosen, lambda name, layer: made.append(name) or Swapped(layer))
    assert made == [places[0]], "a module is converted and counted once"
    first, second = (model.get_submodule(place) for place in places)
    assert first is second is not old
    _, kept = select(model, "", multiple=16)
    assert kept == {}


@pytest.mark.parametrize("keep", ["a", "b"])
def test_a_module_with_two_names_is_kept_for_either(keep):
    model = nn.Module()
    model.a = model.b = nn.Linear(16, 16)
    assert select(model, keep, multiple=16) == ({}, {"a": "matches precision.keep"})


@pytest.mark.parametrize("name", ["fp8", "fp8-delayed", "fp8-rowwise"])
def test_a_layer_used_twice_runs_in_fp8_both_times(name):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = self.b = nn.Linear(16, 16)

        def forward(self, x):
            return self.b(torch.tanh(self.a(x)))

    torch.manual_seed(0)
    model = Twice()
    precision = Precision(name).prepare(model)
    precision.counters.sample()
    with precision.forward():
        model(torch.randn(16, 16))
    counted = dict(zip(precision.counters.slots, precision.counters.take()["counts"][:, 0].tolist(), strict=True))
    assert counted == {("a", "input"): 512, ("a", "weight"): 512, ("a", "grad_output"): 0}


def test_the_report_says_all_of_it():
    model = layers(6)
    model.layers[5] = nn.Linear(16, 20)
    policy = replace(PrecisionPolicy.named("fp8"), keep=r"layers\.[0-3]")
    report = Precision(policy).prepare(model).report
    assert report.converted == ("layers.4",)
    assert report.kept == dict.fromkeys([f"layers.{n}" for n in range(4)], "matches precision.keep") | {
        "layers.5": "20x16 is not divisible by 16, which FP8 GEMMs need"
    }
    assert str(report) == (
        "1 linear layers converted; kept layers.0, layers.1, layers.2, ... (4): matches precision.keep; "
        "kept layers.5: 20x16 is not divisible by 16, which FP8 GEMMs need"
    )
    assert str(ConversionReport()) == "0 linear layers converted"

"""Converted layers behave like torch's: in place, twice differentiable, and everything on them is kept.

Oracles: FP32 autograd, and for FP8 the products of the cast operands.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.optim import SGD

from mptrain import Precision
from mptrain.precision.backends.emulated.gemm import scaled_mm

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ("fp32", "tf32", "bf16", "fp16", "fp8", "fp8-delayed", "fp8-rowwise", "fp8-block")
QUANTIZED = NAMES[4:]
OFF = {"fp32": 0.0, "tf32": 2e-3, "bf16": 2e-2, "fp16": 2e-3}  # relative; FP8: 2^-3 of an operand in E5M2


def width(name: str) -> int:
    return 128 if name == "fp8-block" else 32


def batch(n: int, rows: tuple[int, ...] = (16,), seed: int = 1) -> torch.Tensor:
    return torch.randn(*rows, n, generator=torch.Generator().manual_seed(seed))


def gradients(name: str, model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    precision = Precision(name).prepare(model)
    with precision.forward():
        loss = model(x).float().square().mean()
    precision.backward(loss)
    optimizer = SGD(model.parameters(), lr=0.0)
    scale = precision.scaler.scale
    found = torch.cat([(p.grad / scale).flatten() for p in model.parameters()])
    assert precision.step(optimizer).applied
    return found


def off(found: torch.Tensor, right: torch.Tensor) -> float:
    return ((found - right).norm() / right.norm()).item()


# ---- in place ----------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """What users do to the result of a layer."""

    def __init__(self, n: int, change) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.change = nn.Linear(n, n), nn.Linear(n, n), change

    def forward(self, x):
        return self.second(self.change(self.first(x), x))


def added(h, x):
    h += x.to(h.dtype)
    return h


def zeroed(h, x):
    h[..., 0] = 0
    return h


CHANGES = {
    "relu": lambda h, x: nn.functional.relu(h, inplace=True),
    "add": added,
    "index": zeroed,
    "dropout": lambda h, x: nn.functional.dropout(h, 0.0, inplace=True),
    "mul": lambda h, x: h.mul_(2.0),
}


@pytest.mark.parametrize("rows", [(16,), (2, 8)])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", NAMES)
def test_a_result_may_be_changed_in_place(name, change, rows):
    n = width(name)
    x = batch(n, rows)
    plain = Residual(n, CHANGES[change])
    plain(x).square().mean().backward()
    right = torch.cat([p.grad.flatten() for p in plain.parameters()])
    assert off(gradients(name, Residual(n, CHANGES[change]), x), right) <= OFF.get(name, 0.15)


# ---- second derivatives ------------------------------------------------------------------------------------------


def critic(n: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(n, n), nn.Tanh(), nn.Linear(n, n), nn.Tanh(), nn.Linear(n, 16))


def penalty_gradients(name: str | None, n: int, *, inside: bool = False) -> torch.Tensor:
    """Of WGAN-GP's penalty alone: the gradient of the norm of the gradient of the input."""
    model, x = critic(n), batch(n).requires_grad_()
    precision = None if name is None else Precision(name).prepare(model)
    if precision is None:
        (g,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        (g.norm(dim=1) - 1).square().mean().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    with precision.forward():
        out = model(x).float().sum()
        if inside:
            (g,) = torch.autograd.grad(out, x, create_graph=True)
            loss = (g.float().norm(dim=1) - 1).square().mean()
    if not inside:
        with precision.forward():
            (g,) = torch.autograd.grad(out, x, create_graph=True)
            loss = (g.float().norm(dim=1) - 1).square().mean()
    precision.backward(loss)
    scale = precision.scaler.scale
    return torch.cat([(p.grad / scale).flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_penalty_on_the_gradient_of_the_input_has_fp32s_gradients(name, inside):
    right = penalty_gradients(None, width(name))
    found = penalty_gradients(name, width(name), inside=inside)
    assert found.shape == right.shape
    assert off(found, right) <= {"fp32": 1e-6, "tf32": 5e-3, "bf16": 3e-2, "fp16": 5e-3}.get(name, 0.2)


@pytest.mark.parametrize("name", QUANTIZED)
def test_the_derivative_of_a_weights_gradient_is_refused(name):
    model = critic(width(name))
    precision = Precision(name).prepare(model)
    with precision.forward():
        loss = model(batch(width(name))).float().square().mean()
        weights = [model.get_submodule(layer).weight for layer in precision.report.converted]
        inner = torch.autograd.grad(loss, weights, create_graph=True)
    for gradient in inner:
        with pytest.raises(RuntimeError, match=r"use precision=bf16, or keep such layers out of FP8"):
            precision.backward(gradient.square().sum(), retain_graph=True)


@pytest.mark.parametrize("name", QUANTIZED)
def test_create_graph_does_not_change_first_gradients(name):
    found = []
    for create_graph in (False, True):
        model = critic(width(name))
        precision = Precision(name).prepare(model)
        with precision.forward():
            loss = model(batch(width(name))).float().square().mean()
        got = torch.autograd.grad(loss, list(model.parameters()), create_graph=create_graph)
        found.append(torch.cat([g.detach().flatten() for g in got]))
    assert off(*found) < 2e-2, "one rounding to BF16 differs in the order of summation"


@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_taken_inside_the_forward_is_that_taken_outside(name):
    found = []
    for inside in (False, True):
        model = critic(width(name))
        precision = Precision(name).prepare(model)
        with precision.forward():
            loss = model(batch(width(name))).float().square().mean()
            if inside:
                got = torch.autograd.grad(loss, list(model.parameters()))
        if not inside:
            got = torch.autograd.grad(loss, list(model.parameters()))
        found.append(torch.cat([g.flatten() for g in got]))
    if name in ("fp16", "tf32"):  # outside of every context nothing rounds: use precision.backward
        assert off(*found) < 2e-3
    else:
        assert torch.equal(*found)


# ---- what a layer carries ----------------------------------------------------------------------------------------


class Gated(nn.Linear):
    """A subclass with a method, a buffer, a parameter and an attribute of its own, and Linear's forward."""

    def __init__(self, n: int) -> None:
        super().__init__(n, n)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("mask", torch.ones(n))
        self.note = "mine"

    def gate(self, x):
        return self(x) * self.logit_scale * self.mask


class Holder(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.again = layer, [layer]

    def forward(self, x):
        return self.layer.gate(x) if isinstance(self.layer, Gated) else self.layer(x)


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_subclass_keeps_all_that_it_has(name):
    n = width(name)
    model = Holder(Gated(n))
    keys = list(model.state_dict())
    precision = Precision(name).prepare(model)
    assert precision.report.converted == ("layer",)
    layer = model.layer
    assert isinstance(layer, Gated)
    assert layer is model.again[0], "a reference held elsewhere is still the layer"
    assert (layer.note, list(model.state_dict())) == ("mine", keys)
    with precision.forward():
        loss = model(batch(n)).float().square().mean()
    precision.backward(loss)
    assert layer.logit_scale.grad is not None
    assert precision.step(SGD(model.parameters(), lr=0.1)).applied
    assert copy.deepcopy(layer).gate(batch(n)).shape == (16, n)


@pytest.mark.parametrize("name", NAMES)
def test_every_hook_fires_after_prepare(name):
    n = width(name)
    model = nn.Sequential(nn.Linear(n, n), nn.Linear(n, n))
    fired: list[str] = []
    layer = model[0]
    layer.register_full_backward_hook(lambda *_: fired.append("full_backward"))
    layer.register_full_backward_pre_hook(lambda *_: fired.append("full_backward_pre"))
    layer.register_forward_pre_hook(lambda *_, **__: fired.append("forward_pre"), with_kwargs=True)
    layer.register_forward_hook(lambda *_: fired.append("forward"), always_call=True)
    layer.register_state_dict_post_hook(lambda *_: fired.append("state_dict"))
    layer.register_state_dict_pre_hook(lambda *_: fired.append("state_dict_pre"))
    layer.register_load_state_dict_pre_hook(lambda *_: fired.append("load_pre"))
    removed = layer.register_forward_hook(lambda *_: fired.append("removed"))
    precision = Precision(name).prepare(model)
    removed.remove()
    with precision.forward():
        loss = model(batch(n).requires_grad_()).float().square().mean()
    precision.backward(loss)
    model.load_state_dict(model.state_dict())
    assert sorted(fired) == sorted(
        ["full_backward", "full_backward_pre", "forward_pre", "forward", "state_dict", "state_dict_pre", "load_pre"]
    )


def old_weight_norm(layer: nn.Linear) -> nn.Linear:
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(layer)


def with_own_forward(layer: nn.Linear) -> nn.Linear:
    layer.forward = lambda x: nn.functional.linear(x, layer.weight * 2, layer.bias)
    return layer


def seeded(make, n: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(make(nn.Linear(n, n)), nn.Linear(n, n))


KEPT = {
    "pruned": (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), "computed from other parameters"),
    "weight_norm": (parametrizations.weight_norm, "computed from other parameters"),
    "old_weight_norm": (old_weight_norm, "computed from other parameters"),
    "spectral_norm": (parametrizations.spectral_norm, "computed from other parameters"),
    "own_forward": (with_own_forward, "its forward was replaced on the instance"),
}


@pytest.mark.parametrize("what", KEPT)
@pytest.mark.parametrize("name", ["bf16", *QUANTIZED])
def test_what_cannot_be_kept_is_left_alone_and_listed(name, what):
    make, reason = KEPT[what]
    n = width(name)
    model, plain = (seeded(make, n) for _ in range(2))
    precision = Precision(name).prepare(model)
    if name != "bf16":
        assert precision.report.converted == ("1",)
        assert reason in precision.report.kept["0"]
    with precision.forward():
        loss = model(batch(n)).float().square().mean()
    precision.backward(loss)
    plain(batch(n)).square().mean().backward()
    for a, b in zip(model[0].parameters(), plain[0].parameters(), strict=True):
        assert off(a.grad, b.grad) < 0.15
    assert precision.step(SGD(model.parameters(), lr=0.1)).applied


def test_a_lazy_layer_is_refused_until_it_has_a_size():
    model = nn.Sequential(nn.LazyLinear(32), nn.Linear(32, 32))
    with pytest.raises(ValueError, match=r"0\.weight has no size yet: run one batch through the model before prepare"):
        Precision("fp8").prepare(model)
    model(batch(32))
    assert Precision("fp8").prepare(model).report.converted == ("0", "1")


@pytest.mark.parametrize("name", QUANTIZED)
def test_empty_batches_pass(name):
    n = width(name)
    model = nn.Sequential(nn.Linear(n, n), nn.Linear(n, n))
    precision = Precision(name).prepare(model)
    for shape in ((0, n), (2, 0, n), (16, n)):
        with precision.forward():
            out = model(torch.zeros(shape))
        assert out.shape == shape
        precision.backward(out.float().sum())
    assert precision.step(SGD(model.parameters(), lr=0.1)).applied


@pytest.mark.parametrize("carrier", [torch.bfloat16, torch.float32])
def test_a_bias_is_added_before_the_one_rounding(carrier):
    """Sums that FP32 holds exactly, so that the right result is one rounding of an FP64 sum: bit for bit."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-8, 9, (64, 192), generator=generator).to(carrier)
    b = torch.randint(-8, 9, (192, 32), generator=generator).to(carrier)
    bias = torch.randint(-8192, 8192, (32,), generator=generator) * 2.0**-10  # 14 bits: BF16 has 8
    right = (a.double() @ b.double() / 32 + bias.double()).to(torch.bfloat16)
    assert torch.equal(scaled_mm(a, b, torch.tensor(4.0), torch.tensor(8.0), bias, torch.bfloat16), right)


@pytest.mark.parametrize("carrier", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [2.0**30, 2.0**33, 2.0**67, 2.0**100])
def test_a_bias_beside_tiny_operands_is_the_result(carrier, scale):
    """The operands' product is below half a last place of the bias, which must not overflow on its way through."""
    a, b = torch.ones(4, 16, dtype=carrier), torch.ones(16, 3, dtype=carrier)
    bias = torch.tensor([0.1, -0.2, 3e3])
    found = scaled_mm(a, b, torch.tensor(scale), torch.tensor(scale), bias, torch.bfloat16)
    assert torch.equal(found, bias.to(torch.bfloat16).expand(4, 3))

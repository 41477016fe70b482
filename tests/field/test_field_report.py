"""The report is true: every module with a matrix is in it, and a converted layer that is bypassed is told."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD
from transformers.pytorch_utils import Conv1D

from mptrain import Precision

pytestmark = pytest.mark.usefixtures("one_thread")

QUANTIZED = ("fp8", "fp8-delayed", "fp8-rowwise", "fp8-block")


def width(name: str) -> int:
    return 128 if name == "fp8-block" else 32


def batch(n: int, *rows: int) -> torch.Tensor:
    return torch.randn(*(rows or (16,)), n, generator=torch.Generator().manual_seed(1))


def trained(name: str, model: nn.Module, x: torch.Tensor) -> Precision:
    precision = Precision(name).prepare(model)
    with precision.forward():
        out = model(x)
        loss = (out[0] if isinstance(out, tuple) else out).float().square().mean()
    precision.backward(loss)
    assert precision.step(SGD(model.parameters(), lr=0.1)).applied
    return precision


class Experts(nn.Module):
    """As Mixtral's in transformers 5: all experts in one parameter of three dimensions."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, n, n) * 0.1)

    def forward(self, x):
        return torch.einsum("tk,enk->tn", x, self.up)


@pytest.mark.parametrize("name", QUANTIZED)
def test_every_module_with_a_matrix_is_listed(name):
    n = width(name)
    model = nn.ModuleDict(
        {
            "linear": nn.Linear(n, n),
            "odd": nn.Linear(n, 20),
            "conv1d": Conv1D(n, n),
            "embedding": nn.Embedding(10, n),
            "conv": nn.Conv2d(3, 8, 3),
            "lstm": nn.LSTM(n, n),
            "cell": nn.GRUCell(n, n),
            "attention": nn.MultiheadAttention(n, 2),
            "bilinear": nn.Bilinear(n, n, n),
            "experts": Experts(n),
            "norm": nn.LayerNorm((4, n)),
            "head": nn.Linear(n, n),
        }
    )
    report = Precision(name).prepare(model).report
    assert set(report.converted) == {"linear", "conv1d"}
    reasons = {
        "odd": "not divisible",
        "embedding": "looks rows up",
        "conv": "a convolution",
        "lstm": "recurrent",
        "cell": "recurrent",
        "attention": "multiplies its projections inside",
        "attention.out_proj": "never calls it",
        "bilinear": "bilinear",
        "experts": f"Experts multiplies by its own 4x{n}x{n}",
        "head": "matches precision.keep_default",
    }
    assert set(report.kept) == set(reasons)
    for layer, reason in reasons.items():
        assert reason in report.kept[layer]
    assert "kept embedding: an embedding looks rows up" in str(report)


@pytest.mark.parametrize("name", QUANTIZED)
def test_conv1d_is_the_linear_layer_that_it_is(name):
    """Same result and gradients as nn.Linear with the weight turned, bit for bit; its state_dict stays."""
    n, m = width(name), 2 * width(name)
    torch.manual_seed(0)
    theirs = nn.Sequential(Conv1D(m, n))
    ours = nn.Sequential(nn.Linear(n, m))
    with torch.no_grad():
        ours[0].weight.copy_(theirs[0].weight.t())
        ours[0].bias.copy_(theirs[0].bias.normal_())
    shape = {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
    found = []
    for model in (theirs, ours):
        precision = Precision(name).prepare(model)
        x = batch(n, 2, 8).requires_grad_()
        with precision.forward():
            out = model(x)
        precision.backward(out.float().square().mean())
        turned = model is theirs
        weight = model[0].weight.grad.t() if turned else model[0].weight.grad
        found.append((out, x.grad, weight, model[0].bias.grad))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
    assert {key: tuple(value.shape) for key, value in theirs.state_dict().items()} == shape


class Bypassing(nn.Module):
    """Reads a layer's weight instead of calling it."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(n, n), nn.Linear(n, n)

    def forward(self, x):
        return self.out(F.linear(x, self.fc.weight, self.fc.bias))


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_layer_that_is_bypassed_is_told_once(name):
    model = Bypassing(width(name))
    precision = Precision(name).prepare(model)
    optimizer = SGD(model.parameters(), lr=0.1)
    for step in range(2):
        with precision.forward():
            loss = model(batch(width(name))).float().square().mean()
        precision.backward(loss)
        if step == 0:
            with pytest.warns(UserWarning, match=rf"^fc: converted to precision={name}, but trained in bf16"):
                assert precision.step(optimizer).applied
        else:
            assert precision.step(optimizer).applied
        optimizer.zero_grad()


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_forward_outside_the_context_is_told(name):
    model = nn.Sequential(nn.Linear(width(name), width(name)))
    precision = Precision(name).prepare(model)
    precision.backward(model(batch(width(name))).square().mean())
    with pytest.warns(UserWarning, match="runs the model outside that context"):
        precision.step(SGD(model.parameters(), lr=0.1))


class Routed(nn.Module):
    """Two experts, of which the second sees no token until later."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(n, n) for _ in range(2)])
        self.chosen = 0

    def forward(self, x):
        return self.experts[self.chosen](x)


def test_an_expert_that_no_token_reached_is_no_alarm():
    model = Routed(32)
    precision = Precision("fp8").prepare(model)
    optimizer = SGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for chosen in (0, 0, 1):
            model.chosen = chosen
            with precision.forward():
                loss = model(batch(32)).float().square().mean()
            precision.backward(loss)
            assert precision.step(optimizer).applied
            optimizer.zero_grad()
    assert not precision._unseen.layers


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", QUANTIZED)
def test_torchs_encoder_quantizes_in_evaluation_too(name, masked):
    """Its fused operator for evaluation would read the weights past the layers."""
    n = width(name)
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(n, 2, n, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    precision = Precision(name).prepare(model)
    assert {"layers.0.linear1", "layers.1.linear2"} <= set(precision.report.converted)
    padding = torch.zeros(2, 8, dtype=torch.bool)
    padding[1, 6:] = masked
    arguments = {"src_key_padding_mask": padding} if masked else {}
    model.eval()
    precision.counters.sample(["counts"])
    with torch.no_grad(), precision.forward():
        out = model(batch(n, 2, 8), **arguments)
    counts = dict(zip(precision.counters.slots, precision.counters.take()["counts"][:, 0].tolist(), strict=True))
    assert {layer for (layer, role), count in counts.items() if role == "input" and count} == {
        f"layers.{block}.linear{which}" for block in (0, 1) for which in (1, 2)
    }
    assert out.isfinite().all()


@pytest.mark.parametrize("name", ["bf16", "fp16", *QUANTIZED])
def test_multihead_attention_trains_and_says_what_it_runs_in(name):
    n = width(name)

    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.attention = nn.Linear(n, n), nn.MultiheadAttention(n, 2, batch_first=True)

        def forward(self, x):
            h = self.first(x)
            return self.attention(h, h, h)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        precision = trained(name, Attends(), batch(n, 2, 8))
    assert precision.report.converted == (("first",) if name in QUANTIZED else ())

"""`step` belongs to its optimizer: parameters from anywhere, several optimizers in a round, in every precision.

The oracle is the same loop in plain torch, FP32, without mptrain.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from field_loops import NAMES, SCALED, batch, loss_of, mlp, two, width
from torch import nn
from torch.optim import SGD

from mptrain import Precision

pytestmark = pytest.mark.usefixtures("one_thread")


def moved(parameters, start):
    return [(p.detach() - s) for p, s in zip(parameters, start, strict=True)]


@pytest.mark.parametrize("name", NAMES)
def test_a_parameter_outside_the_model_moves_by_its_gradient(name):
    """A temperature beside the model: d(loss)/ds = sum of c, exactly 3 per element; the scale must not be left in."""
    model, s = mlp(width(name)), nn.Parameter(torch.zeros(2))
    precision = Precision(name).prepare(model)
    optimizer = SGD([*model.parameters(), s], lr=0.5)
    with precision.forward():
        loss = loss_of(model, batch(width(name))) + 3.0 * s.sum()
    precision.backward(loss)
    assert precision.step(optimizer).applied
    assert torch.equal(s.detach(), torch.full((2,), -1.5))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_layer_unfrozen_later_is_unscaled_clipped_and_checked(name, fused):
    model = mlp(width(name))
    model[0].requires_grad_(False)
    precision = Precision(name).prepare(model)
    model[0].requires_grad_(True)
    optimizer = SGD(model.parameters(), lr=1.0, fused=fused)
    start = [p.detach().clone() for p in model.parameters()]
    for kind in ("healthy", "bad"):
        optimizer.zero_grad()
        with precision.forward():
            loss = loss_of(model, batch(width(name)))
        precision.backward(loss)
        if kind == "bad":
            model[0].weight.grad[0, 0] = math.nan
        before = [p.detach().clone() for p in model.parameters()]
        outcome = precision.step(optimizer, clip=0.01)
        assert outcome.applied is (kind == "healthy")
        if kind == "healthy":
            norm = torch.stack([d.norm() for d in moved(model.parameters(), start)]).norm()
            assert norm == pytest.approx(0.01, rel=1e-3)
        else:
            assert "NaN in the gradient of weight" in outcome.reason
            assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


class Adapted(nn.Module):
    """A linear layer with a low-rank adapter, as LoRA attaches it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, 16, bias=False)
        self.up = nn.Linear(16, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_attached_after_prepare_moves_as_in_fp32(name):
    model = mlp(width(name))
    precision = Precision(name).prepare(model)
    plain = mlp(width(name))
    for one in (model, plain):
        torch.manual_seed(5)
        one[0], one[2] = Adapted(one[0]), Adapted(one[2])
    adapters = [p for p in model.parameters() if p.requires_grad]
    optimizer = SGD(adapters, lr=1.0)
    with precision.forward():
        loss = loss_of(model, batch(width(name)))
    precision.backward(loss)
    start = [p.detach().clone() for p in adapters]
    assert precision.step(optimizer).applied
    theirs = [p for p in plain.parameters() if p.requires_grad]
    loss_of(plain, batch(width(name))).backward()
    for delta, p in zip(moved(adapters, start), theirs, strict=True):
        assert (delta + p.grad).norm() <= 0.15 * p.grad.norm()


# ---- several optimizers ------------------------------------------------------------------------------------------


def assert_same(model, plain, rtol=1e-5):
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-7)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("order", [(0, 1), (1, 0), "together"])
def test_two_optimizers_in_a_round_divide_once_and_move_the_scale_once(order, fused):
    model, plain, precision, ours, theirs = two(SCALED, fused=fused)
    for step in range(4):
        with precision.forward():
            loss = loss_of(model, batch(seed=step))
        precision.backward(loss)
        if order == "together":
            assert precision.step(*ours).applied
        else:
            assert all(precision.step(ours[i]).applied for i in order)
        for optimizer in ours:
            optimizer.zero_grad()
        loss_of(plain, batch(seed=step)).backward()
        for optimizer in theirs:
            optimizer.step()
            optimizer.zero_grad()
        assert precision.scaler.scale.item() == 2.0 ** (13 + step), "one update a round, each a growth"
    assert_same(model, plain)


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_that_wait_for_their_step_keep_one_scale(fused):
    """Both backwards reach the second half, which steps after the second; the scale doubles in between."""
    model, plain, precision, ours, theirs = two(SCALED, fused=fused)
    for step in range(3):
        for half in (0, 1):
            with precision.forward():
                loss = loss_of(model, batch(seed=10 * step + half))
            precision.backward(loss)
            assert precision.step(ours[half]).applied
            ours[half].zero_grad()
            loss_of(plain, batch(seed=10 * step + half)).backward()
            theirs[half].step()
            theirs[half].zero_grad()
    assert precision.scaler.scale.item() == 2.0**18
    assert_same(model, plain)


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_never_zeroed_add_up_as_in_fp32(fused):
    model, plain, precision, ours, theirs = two(SCALED, fused=fused)
    for step in range(3):
        with precision.forward():
            loss = loss_of(model, batch(seed=step))
        precision.backward(loss)
        assert precision.step(*ours).applied
        loss_of(plain, batch(seed=step)).backward()
        for optimizer in theirs:
            optimizer.step()
    assert_same(model, plain)


@pytest.mark.parametrize("fused", [False, True])
def test_one_model_two_optimizers_on_the_same_parameters(fused):
    """The second gets the gradient that the first one has divided already."""
    model, plain = mlp(), mlp()
    precision = Precision(SCALED).prepare(model)
    ours = [SGD(model.parameters(), lr=0.1, fused=fused) for _ in range(2)]
    theirs = [SGD(plain.parameters(), lr=0.1) for _ in range(2)]
    with precision.forward():
        loss = loss_of(model, batch())
    precision.backward(loss)
    loss_of(plain, batch()).backward()
    for a, b in zip(ours, theirs, strict=True):
        norm = torch.stack([p.grad.norm() for p in plain.parameters()]).norm().item()
        assert precision.step(a).read().grad_norm == pytest.approx(norm, rel=1e-5)
        b.step()
    assert_same(model, plain)
    assert precision.scaler.scale.item() == 2.0**13


def test_each_optimizer_skips_on_its_own_gradients_and_the_scale_falls_once():
    for together in (False, True):
        model, _, precision, ours, _ = two(SCALED)
        start = [p.detach().clone() for p in model.parameters()]
        with precision.forward():
            loss = loss_of(model, batch())
        precision.backward(loss)
        model[0].weight.grad[1, 1] = math.inf
        if together:
            assert not precision.step(*ours, clip=1e-3).applied
        else:
            assert [precision.step(one, clip=1e-3).applied for one in ours] == [False, True]
        first, second = moved(model.parameters(), start)[:2], moved(model.parameters(), start)[2:]
        assert all(not d.any() for d in first)
        assert torch.stack([d.norm() for d in second]).norm() == pytest.approx(1e-4, rel=1e-3), "clipped by its own"
        assert precision.scaler.scale.item() == 2.0**11


def test_a_bad_operand_skips_every_optimizer_of_the_round():
    model, _, precision, ours, _ = two("fp8")
    x = batch()
    x[3, 3] = math.inf
    with precision.forward():
        loss = model(x).float().nan_to_num(posinf=1.0, neginf=1.0).square().mean()
    precision.backward(loss)
    assert [precision.step(one).applied for one in ours] == [False, False]


def test_two_models_with_a_precision_each_and_one_loss():
    """torch.amp's recipe of several models, losses and optimizers, against plain torch."""
    models, plain = [mlp(seed=i) for i in range(2)], [mlp(seed=i) for i in range(2)]
    precisions = [Precision(replace(SCALED, name=f"p{i}")).prepare(m) for i, m in enumerate(models)]
    ours, theirs = [SGD(m.parameters(), lr=0.1) for m in models], [SGD(m.parameters(), lr=0.1) for m in plain]
    for step in range(3):
        x = batch(seed=step)
        with precisions[0].forward():
            a = models[0](x)
        with precisions[1].forward():
            b = models[1](x)
        losses = (2 * a + 3 * b).square().mean(), (3 * a - 5 * b).square().mean()
        precisions[0].backward(losses[0] + losses[1], inputs=list(models[0].parameters()), retain_graph=True)
        precisions[1].backward(losses[0] + losses[1], inputs=list(models[1].parameters()))
        assert all(p.step(o).applied for p, o in zip(precisions, ours, strict=True))
        a, b = plain[0](x), plain[1](x)
        ((2 * a + 3 * b).square().mean() + (3 * a - 5 * b).square().mean()).backward()
        for one in theirs:
            one.step()
        for one in (*ours, *theirs):
            one.zero_grad()
    for m, p in zip(models, plain, strict=True):
        assert_same(m, p)


# ---- parameters of other kinds -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16", "fp8"])
def test_sparse_gradients_step_as_in_fp32(name):
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embedding, self.head = nn.Embedding(10, 32, sparse=True), nn.Linear(32, 32)

        def forward(self, tokens):
            return self.head(self.embedding(tokens))

    tokens = torch.tensor([1, 1, 3, 3, 3, 7, 7, 7] * 2)
    model, plain = Bag(), Bag()
    precision = Precision(name).prepare(model)
    optimizer, theirs = SGD(model.parameters(), lr=1.0), SGD(plain.parameters(), lr=1.0)
    with precision.forward():
        loss = loss_of(model, tokens)
    precision.backward(loss)
    loss_of(plain, tokens).backward()
    norm = torch.stack([(p.grad.to_dense() if p.grad.is_sparse else p.grad).norm() for p in plain.parameters()]).norm()
    record = precision.step(optimizer).read()
    assert record.applied
    assert record.grad_norm == pytest.approx(norm.item(), rel=0.1 if name == "fp8" else 0.02)
    before = plain.embedding.weight.detach().clone()
    theirs.step()
    change = plain.embedding.weight - before
    torch.testing.assert_close(model.embedding.weight - before, change, rtol=0.1, atol=0.05 * change.abs().max().item())
    optimizer.zero_grad()
    with precision.forward():
        loss = loss_of(model, tokens)
    precision.backward(loss)
    model.embedding.weight.grad.coalesce()._values()[0, 0] = math.inf
    model.embedding.weight.grad = model.embedding.weight.grad.coalesce()
    model.embedding.weight.grad._values()[0, 0] = math.inf
    assert not precision.step(optimizer).applied


@pytest.mark.parametrize("name", ["fp32", "fp16"])
def test_a_complex_parameter_steps_and_is_checked(name):
    class Spectral(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.linear, self.filter = nn.Linear(32, 32), nn.Parameter(torch.randn(17, dtype=torch.complex64))

        def forward(self, x):
            return torch.fft.irfft(torch.fft.rfft(self.linear(x).float()) * self.filter, n=32)

    model, plain = Spectral(), Spectral()
    precision = Precision(name).prepare(model)
    optimizer, theirs = SGD(model.parameters(), lr=0.1), SGD(plain.parameters(), lr=0.1)
    with precision.forward():
        loss = loss_of(model, batch())
    precision.backward(loss)
    assert precision.step(optimizer).applied
    loss_of(plain, batch()).backward()
    theirs.step()
    torch.testing.assert_close(model.filter, plain.filter, rtol=5e-3, atol=1e-4)
    optimizer.zero_grad()
    with precision.forward():
        loss = loss_of(model, batch())
    precision.backward(loss)
    model.filter.grad[2] = complex(1.0, math.inf)
    assert not precision.step(optimizer).applied


def test_parameters_without_a_gradient_stay():
    model = mlp()
    spare = nn.Parameter(torch.ones(3))
    precision = Precision("fp16").prepare(model)
    optimizer = SGD([*model.parameters(), spare], lr=0.1)
    with precision.forward():
        loss = loss_of(model, batch())
    precision.backward(loss)
    assert precision.step(optimizer).applied
    assert torch.equal(spare.detach(), torch.ones(3))


@pytest.mark.parametrize("name", NAMES)
def test_muon_beside_adamw(name):
    model = mlp(width(name))
    precision = Precision(name).prepare(model)
    matrices, vectors = ([p for p in model.parameters() if p.ndim == n] for n in (2, 1))
    optimizers = torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(vectors, lr=1e-3, fused=True)
    losses = []
    for _ in range(6):
        with precision.forward():
            loss = loss_of(model, batch(width(name)))
        precision.backward(loss)
        assert precision.step(*optimizers, clip=1.0).applied
        for optimizer in optimizers:
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]

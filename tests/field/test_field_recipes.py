"""The recipes of torch.amp's documentation in every precision, with plain FP32 beside them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import SGD

from mptrain import Precision

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ("fp32", "tf32", "bf16", "fp16", "fp8", "fp8-delayed", "fp8-rowwise", "fp8-block")
N = 128
OFF = {"fp32": 1e-6, "tf32": 3e-3, "bf16": 3e-2, "fp16": 3e-3}  # of the norm of what FP32 moved; FP8: 0.2


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(N, N), nn.Tanh(), nn.Linear(N, N))


def batch(seed: int) -> torch.Tensor:
    return torch.randn(16, N, generator=torch.Generator().manual_seed(seed))


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def assert_moved_alike(name: str, model: nn.Module, plain: nn.Module, start: torch.Tensor) -> None:
    ours, right = flat(model) - start, flat(plain) - start
    assert right.norm() > 0
    last_places = 3 * 2.0**-24 * start.norm()  # three steps, each rounded into the weights
    assert (ours - right).norm() <= OFF.get(name, 0.2) * right.norm() + last_places


@pytest.mark.parametrize("clip", [0.0, 0.05])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_accumulation_and_clipping(name, accumulate, clip):
    model, plain = mlp(), mlp()
    start = flat(model)
    precision = Precision(name).prepare(model)
    ours, theirs = SGD(model.parameters(), lr=0.5), SGD(plain.parameters(), lr=0.5)
    for step in range(3):
        for micro in range(accumulate):
            x = batch(10 * step + micro)
            with precision.forward():
                loss = model(x).float().square().mean() / accumulate
            precision.backward(loss)
            (plain(x).square().mean() / accumulate).backward()
        record = precision.step(ours, clip=clip).read()
        norm = nn.utils.clip_grad_norm_(plain.parameters(), clip or torch.inf)
        theirs.step()
        assert record.applied
        assert record.grad_norm == pytest.approx(norm.item(), rel=max(1e-5, OFF.get(name, 0.2)))
        ours.zero_grad()
        theirs.zero_grad()
    assert_moved_alike(name, model, plain, start)


@pytest.mark.parametrize("name", NAMES)
def test_several_losses_models_and_optimizers(name):
    """Two losses through both models, kept graph, an optimizer each, one Precision around both."""
    models, plain = [mlp(0), mlp(1)], [mlp(0), mlp(1)]
    starts = [flat(model) for model in models]
    precision = Precision(name).prepare(nn.ModuleList(models))
    ours, theirs = ([SGD(m.parameters(), lr=0.05) for m in side] for side in (models, plain))
    for step in range(3):
        x = batch(step)
        with precision.forward():
            a, b = models[0](x).float(), models[1](x).float()
            losses = (2 * a + 3 * b).square().mean(), (3 * a - 5 * b).square().mean()
        precision.backward(losses[0], retain_graph=True)
        precision.backward(losses[1])
        assert precision.step(ours[0]).applied
        assert precision.step(ours[1], clip=0.0).applied
        a, b = plain[0](x), plain[1](x)
        ((2 * a + 3 * b).square().mean() + (3 * a - 5 * b).square().mean()).backward()
        for one in theirs:
            one.step()
        for one in (*ours, *theirs):
            one.zero_grad()
    for model, right, start in zip(models, plain, starts, strict=True):
        assert_moved_alike(name, model, right, start)


class Product(torch.autograd.Function):
    """torch.amp's first custom function: it runs in whatever its inputs are."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return a.mm(b.to(a.dtype))

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        return grad.mm(b.t().to(grad.dtype)).to(a.dtype), a.t().to(grad.dtype).mm(grad).to(b.dtype)


class Wide(torch.autograd.Function):
    """Its second: it must run in FP32."""

    seen: torch.dtype | None = None

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(ctx, x):
        Wide.seen = x.dtype
        ctx.save_for_backward(x)
        return x.exp().sum(dim=1)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad[:, None] * x.exp()


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.mixing = nn.Linear(N, N), nn.Parameter(torch.randn(N, N) * 0.05)

    def forward(self, x):
        return Wide.apply(Product.apply(self.first(x), self.mixing) * 0.1)


@pytest.mark.parametrize("name", NAMES)
def test_custom_autograd_functions(name):
    model, plain = Custom(), Custom()
    start = flat(model)
    precision = Precision(name).prepare(model)
    ours, theirs = SGD(model.parameters(), lr=0.01), SGD(plain.parameters(), lr=0.01)
    for step in range(3):
        with precision.forward():
            loss = model(batch(step)).float().mean()
        if name != "tf32":
            assert Wide.seen is torch.float32
        precision.backward(loss)
        assert precision.step(ours).applied
        plain(batch(step)).mean().backward()
        theirs.step()
        ours.zero_grad()
        theirs.zero_grad()
    assert_moved_alike(name, model, plain, start)


@pytest.mark.parametrize("name", NAMES)
def test_a_penalty_on_the_gradients_of_the_weights(name):
    """torch.amp's gradient penalty: right where no operand is lost, refused in FP8."""
    model, plain = mlp(), mlp()
    start = flat(model)
    precision = Precision(name).prepare(model)
    ours, theirs = SGD(model.parameters(), lr=0.05), SGD(plain.parameters(), lr=0.05)

    def penalized(run, x):
        loss = run(x).float().square().mean()
        inner = torch.autograd.grad(loss, list(run.parameters()), create_graph=True)
        return loss + torch.stack([g.float().square().sum() for g in inner]).sum().sqrt()

    with precision.forward():
        loss = penalized(model, batch(0))
    if precision.policy.quantized:
        with pytest.raises(RuntimeError, match="use precision=bf16"):
            precision.backward(loss)
        return
    precision.backward(loss)
    assert precision.step(ours).applied
    penalized(plain, batch(0)).backward()
    theirs.step()
    assert_moved_alike(name, model, plain, start)

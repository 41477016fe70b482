"""A small model in a precision, its batches and its loss: what the field tests of steps are made of."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import SGD

from mptrain import LossScale, Precision, PrecisionPolicy
from mptrain.precision.policy import LossScaleKind

NAMES = ("fp32", "tf32", "bf16", "fp16", "fp8", "fp8-delayed", "fp8-rowwise", "fp8-block")
SCALED = PrecisionPolicy(loss_scale=LossScale(kind=LossScaleKind.dynamic, init=2.0**12, interval=1, hysteresis=1))


def width(name: str) -> int:
    return 128 if name == "fp8-block" else 32


def mlp(n: int = 32, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(n, n), nn.ReLU(), nn.Linear(n, n))


def batch(n: int = 32, seed: int = 1) -> torch.Tensor:
    return torch.randn(16, n, generator=torch.Generator().manual_seed(seed))


def loss_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).float().square().mean()


def two(policy, *, fused=False):
    """A model whose halves have an optimizer each, and the plain one that says what is right."""
    model, plain = mlp(), mlp()
    precision = Precision(policy).prepare(model)
    ours = [SGD(model[i].parameters(), lr=0.1, fused=fused) for i in (0, 2)]
    theirs = [SGD(plain[i].parameters(), lr=0.1) for i in (0, 2)]
    return model, plain, precision, ours, theirs

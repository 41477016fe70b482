"""Optimizers and learning-rate schedules by configuration."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from mptrain.settings import require


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with warm-up and cosine decay. ``warmup_frac`` is of max_steps; the rate ends at ``min_lr_frac`` of lr."""

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    warmup_frac: float = 0.1
    min_lr_frac: float = 0.1

    def __post_init__(self) -> None:
        require(self.lr > 0, "optim.lr", self.lr, "above 0, e.g. 0.001")
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, f"optim.{name}", getattr(self, name), "in [0, 1)")
        require(self.eps > 0, "optim.eps", self.eps, "above 0, e.g. 1e-8")
        require(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "0 or more")
        for name in ("warmup_frac", "min_lr_frac"):
            require(0 <= getattr(self, name) <= 1, f"optim.{name}", getattr(self, name), "in [0, 1]")


def build_optimizer(config: OptimConfig, model: nn.Module) -> torch.optim.AdamW:
    """Fused AdamW on the FP32 masters; matrices decay, vectors (norms, biases) do not. A tied weight counts once."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    used = [group for group in groups if group["params"]]
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(used, lr=config.lr, betas=betas, eps=config.eps, fused=True)


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then cosine, as a function of the number of *applied* steps: a skipped step moves nothing."""

    lr: float
    warmup_steps: int
    max_steps: int
    min_lr_frac: float

    @classmethod
    def of(cls, config: OptimConfig, max_steps: int) -> Schedule:
        return cls(config.lr, round(config.warmup_frac * max_steps), max_steps, config.min_lr_frac)

    def at(self, applied: int) -> float:
        """The rate of the step that follows ``applied`` applied ones."""
        if applied < self.warmup_steps:
            return self.lr * (applied + 1) / self.warmup_steps
        progress = min(1.0, (applied - self.warmup_steps) / max(1, self.max_steps - self.warmup_steps))
        cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
        return self.lr * (self.min_lr_frac + (1.0 - self.min_lr_frac) * cosine)

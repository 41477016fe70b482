"""Warm-up and cosine decay of the learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mptrain.optim._config import OptimConfig


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

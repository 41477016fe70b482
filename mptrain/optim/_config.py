"""Settings of the optimizer: the group ``optim`` of the configuration."""

from __future__ import annotations

from dataclasses import dataclass

from mptrain.tools import registry
from mptrain.tools.settings import did_you_mean, require

WEIGHTS = ("fp32", "bf16", "bf16_stochastic", "bf16_remainder")
MOMENTS = ("fp32", "int8")


@dataclass(frozen=True)
class OptimConfig:
    """An optimizer with warm-up and cosine decay. ``warmup_frac`` is of max_steps; the rate ends at ``min_lr_frac`` of
    lr. ``kind``: the file of mptrain/optim that builds it.

    ``weights``: how they are stored: fp32 (masters), bf16 (updates below half a last place are lost), bf16_stochastic
    (rounded at random, right on average) or bf16_remainder (BF16 and the 16 bits below it: nothing is lost). Gradients
    of BF16 weights are BF16, and add up so over micro-batches: 1.5 % off at 256 of them.
    ``moments``: fp32 or int8 (blocks of 256). Only AdamW stores either in fewer bits. ``ema_decay``: of a running
    average of the weights, 0 for none.
    """

    kind: str = "adamw"
    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    warmup_frac: float = 0.1
    min_lr_frac: float = 0.1
    weights: str = "fp32"
    moments: str = "fp32"
    ema_decay: float = 0.0

    def __post_init__(self) -> None:
        known = registry.kinds(__package__)
        if self.kind not in known:
            raise ValueError(f"optim.kind={self.kind} is unknown{did_you_mean(self.kind, known)}")
        require(self.lr > 0, "optim.lr", self.lr, "above 0, e.g. 0.001")
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, f"optim.{name}", getattr(self, name), "in [0, 1)")
        require(self.eps > 0, "optim.eps", self.eps, "above 0, e.g. 1e-8")
        require(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "0 or more")
        for name in ("warmup_frac", "min_lr_frac"):
            require(0 <= getattr(self, name) <= 1, f"optim.{name}", getattr(self, name), "in [0, 1]")
        require(self.weights in WEIGHTS, "optim.weights", self.weights, f"one of {', '.join(WEIGHTS)}")
        require(self.moments in MOMENTS, "optim.moments", self.moments, "fp32 or int8")
        require(0 <= self.ema_decay < 1, "optim.ema_decay", self.ema_decay, "in [0, 1), e.g. 0.999")
        stored = f"optim.weights={self.weights}, optim.moments={self.moments}"
        if self.kind != "adamw" and not self.fp32:
            raise ValueError(f"{stored}: {self.kind} keeps both in FP32, use optim.kind=adamw")

    @property
    def fp32(self) -> bool:
        """Tell whether weights and moments are stored in FP32."""
        return self.weights == self.moments == "fp32"

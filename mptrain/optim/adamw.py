"""AdamW (Loshchilov and Hutter 2019): torch's fused kernel, or :class:`StoredAdamW` on weights or moments in fewer
bits."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer

from mptrain.optim._config import OptimConfig
from mptrain.optim._stored import StoredAdamW


def build(groups: list[dict[str, Any]], config: OptimConfig) -> Optimizer:
    """Build AdamW on ``groups``, whose weights are stored as ``config`` says from here on."""
    settings: dict[str, Any] = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps}
    if config.fp32:
        return torch.optim.AdamW(groups, **settings, fused=True)
    return StoredAdamW(groups, **settings, weights=config.weights, moments=config.moments)

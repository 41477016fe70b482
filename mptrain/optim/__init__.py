"""Optimizers, learning-rate schedules and the running average of the weights, by configuration.

The default is torch's fused AdamW on FP32 masters. The variants of :class:`StoredAdamW` keep weights or moments in
fewer bits, to save memory or to show what is lost: their arithmetic is the same fused AdamW in FP32, on one parameter
at a time, between reading what is stored and storing it again.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch.optim import Optimizer

from mptrain.distributed.optimizer import ShardedOptimizer, is_sharded
from mptrain.optim._average import Average
from mptrain.optim._config import MOMENTS, WEIGHTS, OptimConfig
from mptrain.optim._schedule import Schedule
from mptrain.optim._stored import StoredAdamW

__all__ = ["MOMENTS", "WEIGHTS", "Average", "OptimConfig", "Schedule", "StoredAdamW", "build_optimizer"]


def build_optimizer(config: OptimConfig, model: nn.Module) -> Optimizer:
    """AdamW on ``model``, whose weights are stored as the configuration says from here on.

    Matrices decay, vectors (norms, biases) do not. A tied weight counts once.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    used = [group for group in groups if group["params"]]
    settings: dict[str, Any] = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps}
    plain = config.weights == config.moments == "fp32"
    if is_sharded(model):
        if not plain:
            raise ValueError(
                f"optim.weights={config.weights}, optim.moments={config.moments}: sharded weights are kept in FP32, "
                "use optim=adamw, or dist=ddp"
            )
        sharded = ShardedOptimizer(used, lambda parts: torch.optim.AdamW(parts, **settings, fused=True))
        return cast(Optimizer, sharded)  # all that is asked of one here
    if plain:
        return torch.optim.AdamW(used, **settings, fused=True)
    return StoredAdamW(used, **settings, weights=config.weights, moments=config.moments)

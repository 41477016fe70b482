"""Optimizers, learning-rate schedules and the running average of the weights, by configuration.

An optimizer is a file here, the one that ``optim.kind`` names: its ``build(groups, config)`` returns a torch optimizer
on groups of parameters that each have their ``weight_decay``. The default is torch's fused AdamW on FP32 masters.
"""

from __future__ import annotations

from typing import cast

from torch import nn
from torch.optim import Optimizer

from mptrain.distributed.optimizer import ShardedOptimizer, is_sharded
from mptrain.optim._average import Average
from mptrain.optim._config import MOMENTS, WEIGHTS, OptimConfig
from mptrain.optim._schedule import Schedule
from mptrain.tools import registry

__all__ = ["MOMENTS", "WEIGHTS", "Average", "OptimConfig", "Schedule", "build_optimizer", "kinds"]


def kinds() -> list[str]:
    """List the names that ``optim.kind`` may take."""
    return registry.kinds(__name__)


def build_optimizer(config: OptimConfig, model: nn.Module) -> Optimizer:
    """Build the optimizer of ``model``, whose weights are stored as ``config`` says from here on.

    Matrices decay, vectors (norms, biases) do not. A tied weight counts once. ValueError: sharded weights would have to
    be stored in fewer bits.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    used = [group for group in groups if group["params"]]
    build = registry.load(__name__, config.kind).build
    if not is_sharded(model):
        return cast(Optimizer, build(used, config))
    if not config.fp32:
        raise ValueError(
            f"optim.weights={config.weights}, optim.moments={config.moments}: sharded weights are kept in FP32, "
            "use optim=adamw, or dist=ddp"
        )
    sharded = ShardedOptimizer(used, lambda parts: build(parts, config))
    return cast(Optimizer, sharded)  # all that is asked of one here

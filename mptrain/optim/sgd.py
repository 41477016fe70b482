"""Stochastic gradient descent with momentum ``optim.beta1``, as torch has it: one moment, 4 bytes a weight."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer

from mptrain.optim._config import OptimConfig


def build(groups: list[dict[str, Any]], config: OptimConfig) -> Optimizer:
    """Build SGD on ``groups``. Unlike AdamW's, its weight decay is added to the gradient, before the momentum."""
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.beta1, fused=True)

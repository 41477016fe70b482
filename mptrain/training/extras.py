"""The optional parts of a trainer, and their defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from mptrain.checkpoint.checkpoints import Checkpoints
from mptrain.distributed import ALONE, Ranks
from mptrain.distributed.layout import Share
from mptrain.telemetry.drill import Drill
from mptrain.telemetry.meters import Throughput
from mptrain.telemetry.monitor import Monitor
from mptrain.training.protocols import Audits, Averaged, Compresses


@dataclass(frozen=True)
class Extras:
    """The optional parts of a :class:`~mptrain.training.trainer.Trainer`.

    ``every``: steps between two readings of the losses. ``monitor``: watches the numerics. ``wrapped``: is called in
    the model's place (its DDP), ``run_model``: that or its compiled form. ``share``: of the samples, for this rank;
    ``masters_whole``: does each rank hold whole FP32 weights? ``compression``: of the gradients between ranks; its
    state differs by rank. ``checkpoint_every``: steps, 0 for the end only; ``about``: is written into each checkpoint.
    ``audit``: of the first step's products. ``flops_per_token`` and ``peak_flops_per_s`` give the MFU.
    """

    seed: int = 0
    every: int = 10
    throughput: Throughput = field(default_factory=lambda: Throughput(1))
    monitor: Monitor | None = None
    audit: Audits | None = None
    drill: Drill | None = None
    average: Averaged | None = None
    wrapped: nn.Module | None = None
    run_model: nn.Module | None = None
    ranks: Ranks = ALONE
    share: Share | None = None
    masters_whole: bool = True
    compression: Compresses | None = None
    checkpoints: Checkpoints | None = None
    checkpoint_every: int = 0
    about: Mapping[str, Any] = field(default_factory=dict)
    flops_per_token: float = 0.0
    peak_flops_per_s: float | None = None

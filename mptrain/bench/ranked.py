"""Common parts of the benchmarks on several ranks: sizes, rows, a timer across ranks, and runs to measure."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import ClassVar

import torch

from mptrain.bench import rows
from mptrain.bench.cpu import LR
from mptrain.bench.rows import Step
from mptrain.build.assemble import assemble
from mptrain.build.preflight import Prepared
from mptrain.config import RunConfig
from mptrain.distributed import World
from mptrain.distributed.layout import DistConfig
from mptrain.loggers import NullSink
from mptrain.models import gpt
from mptrain.optim import OptimConfig
from mptrain.precision.policy import PrecisionPolicy
from mptrain.telemetry.monitor import TelemetryConfig
from mptrain.training.config import TrainerConfig
from mptrain.training.trainer import Trainer

WRAPPERS = ("ddp", "fsdp")


@dataclass(frozen=True)
class Sizes:
    """The sizes to measure, and how often.

    ``steps``: in one measurement, ``micro_batches`` of each rank in a step. ``saved``: the model of the checkpoints.
    """

    model: gpt.Config = field(default_factory=lambda: gpt.Config(256, 256, n_layer=4, n_head=4, n_embd=256))
    batch: int = 4
    micro_batches: int = 2
    saved: gpt.Config = field(default_factory=lambda: gpt.Config(50304, 64, n_layer=12, n_head=12, n_embd=768))
    steps: int = 2
    repeats: int = 9


SMALLEST = gpt.Config(256, 16, n_layer=1, n_head=1, n_embd=32)
TINY = Sizes(SMALLEST, batch=1, micro_batches=2, saved=SMALLEST, steps=2, repeats=1)


@dataclass
class Row(rows.Row):
    """One figure, of wall time if it is one of time. ``cpu``: the same of CPU time, for information."""

    cpu: float | None = None

    SECOND: ClassVar[str] = "cpu"


def timed(work: Step) -> tuple[float, float]:
    """Return (wall, CPU) seconds of ``work`` on all ranks: the slowest one's, and of all together. A collective."""
    ranks = World()
    ranks.barrier()
    cpu_s, wall_s = time.process_time(), time.perf_counter()
    work()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
    spent = ranks.gather((time.perf_counter() - wall_s, time.process_time() - cpu_s))
    return max(wall for wall, _ in spent), sum(cpu for _, cpu in spent)


def settings(wrapper: str, sizes: Sizes, device: str, model: gpt.Config, telemetry: TelemetryConfig) -> RunConfig:
    """Return BF16 training with a learning rate near zero, so that every step is like the first."""
    accumulate = sizes.micro_batches * World().size
    return RunConfig(
        precision=PrecisionPolicy.named("bf16"),
        model={"kind": "gpt", **asdict(model)},
        data={"kind": "stdlib"},
        optim=OptimConfig(lr=LR, warmup_frac=0.0),
        trainer=TrainerConfig(max_steps=1 << 30, batch_size=sizes.batch, accumulate=accumulate, eval_every=0),
        telemetry=telemetry,
        dist=DistConfig(wrapper),
        device=device,
        baseline="none",
    )


def repeated(step: Step, times: int) -> Step:
    def steps() -> None:
        for _ in range(times):
            step()

    return steps


def trainer_of(prepared: Prepared) -> Trainer:
    """Return our trainer, ready to step."""
    trainer = assemble(prepared, NullSink())
    trainer.model.train()
    return trainer

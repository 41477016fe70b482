"""The plan of a training run: what is alive at the peak of a step, on each rank, and what is assumed beside it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from mptrain.distributed.layout import Layout
from mptrain.memory.training.cuda import CONTEXT_BYTES, FRAGMENTATION_FRAC, backend_on_gpu
from mptrain.memory.training.live import Bytes, by_role
from mptrain.memory.training.trace import CPU, Job, Peaks, peaks
from mptrain.memory.units import gib
from mptrain.models import Architecture
from mptrain.precision.backends import resolve
from mptrain.tools.settings import require

MOST_TOKENS = 1 << 36  # of a micro-batch; more is a typing error

OPERATIONS = (  # part of an operator's name -> what it is called in a plan; the first that fits
    ("(8 bits)", "8-bit codes"),
    ("scaled_dot_product", "attention"),
    ("softmax", "logits and loss"),
    ("nll_loss", "logits and loss"),
    ("norm", "norms"),
    ("addmm", "matrix products"),
    ("mm", "matrix products"),
    ("linear", "matrix products"),
    ("gelu", "activation functions"),
    ("silu", "activation functions"),
    ("relu", "activation functions"),
    ("_to_copy", "casts"),
    ("embedding", "embeddings"),
    ("add", "residual sums"),
    ("mul", "elementwise products"),
    ("cat", "copies"),
    ("clone", "copies"),
)


@dataclass(frozen=True)
class TrainingPlan:
    """Bytes on one rank, of ``batch_size`` samples in a micro-batch. ``window``: of the step, in which the peak is;
    ``windows``: the peak in each. ``operations``: what made the activations that are alive then, the largest first.
    ``assumed``: on a GPU, what no tensor holds."""

    precision: str
    backend: str
    window: str
    roles: dict[str, int]
    windows: dict[str, int]
    operations: dict[str, int]
    attention: str
    batch_size: int
    accumulate: int
    assumed: dict[str, int] = field(default_factory=dict)

    @property
    def live(self) -> int:
        """Sum the tensors: what a measurement finds, the allocator's peak on a GPU."""
        return sum(self.roles.values())

    @property
    def total(self) -> int:
        """Sum up what the device must have."""
        return self.live + sum(self.assumed.values())

    @property
    def brief(self) -> str:
        """The peak and what it consists of, in a line."""
        shares = sorted(self.roles.items(), key=lambda item: -item[1])
        told = ", ".join(f"{role} {size / self.live:.0%}" for role, size in shares if size / self.live >= 0.01)
        return f"{gib(self.live)} planned at the peak ({self.window}): {told}"


def plan(job: Job, *, check: bool = True) -> TrainingPlan:
    """Trace a step of ``job``; ``check``: see :func:`~mptrain.memory.training.trace.peaks`. ValueError for what is too
    large or cannot be traced: a model that looks at values, as routers do that count the tokens of each expert."""
    samples, length = job.batch_size, max(1, job.config.block_size)
    require(samples * length <= MOST_TOKENS, "trainer.batch_size", f"{samples} x {length}", "at most 2^36 tokens")
    try:
        windows = peaks(job, check=check)
    except (DynamicOutputShapeException, DataDependentOutputException) as error:
        raise ValueError(
            f"the memory of this model depends on values, in {error.func}: it cannot be planned"
        ) from error
    except RuntimeError as error:
        if "overflow" not in str(error):
            raise
        raise ValueError(f"the sizes of this model.kind are beyond 2^63 bytes: {str(error).splitlines()[0]}") from error
    totals = {window: sum(peak.values()) for window, peak in windows.items()}
    window = max(totals, key=lambda name: totals[name])
    roles = {role: size for role, size in by_role(windows[window]).items() if size}
    live = sum(roles.values())
    assumed = {"CUDA context": CONTEXT_BYTES, "fragmentation": round(FRAGMENTATION_FRAC * live)} if job.gpu else {}
    backend = backend_on_gpu(job.policy) if job.gpu else resolve(job.policy, CPU).name
    return TrainingPlan(
        job.policy.name,
        backend,
        window,
        roles,
        totals,
        _operations(windows[window]),
        _attention(windows),
        job.batch_size,
        job.accumulate,
        assumed,
    )


def _operations(peak: Bytes) -> dict[str, int]:
    sizes: Counter[str] = Counter()
    for (role, made_by), size in peak.items():
        if role == "activations":
            sizes[next((words for part, words in OPERATIONS if part in made_by), made_by)] += size
    return dict(sizes.most_common())


def _attention(windows: Peaks) -> str:
    """Whether the fused kernel ran, which stores no scores. The forward's peak holds what attention saved."""
    operators = {name for peak in windows.values() for role, name in peak if role == "activations"}
    if any("scaled_dot_product" in name for name in operators):
        return "fused"
    return "unfused, scores stored" if "_softmax" in operators or "_safe_softmax" in operators else ""


def rank_job(model: Architecture, model_config: Any, config: Any, layout: Layout, *, gpu: bool) -> Job:
    """The first rank's part of the run that ``config`` (a :class:`mptrain.config.RunConfig`) describes.

    ValueError if its samples cannot be shared out.
    """
    sizes = config.trainer
    share = layout.share(sizes.batch_size, sizes.accumulate, 0)
    return Job(
        model,
        model_config,
        config.precision,
        config.optim,
        share.batch_size,
        share.accumulate,
        sizes.checkpointing,
        gpu,
        config.dist,
        layout,
    )

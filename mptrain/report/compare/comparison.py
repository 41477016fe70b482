"""A comparison of runs as plain data: ``report.json``, and all that the terminal, Markdown and HTML show.

Runs of the same model, data and schedule make a :class:`Group`; in it, runs that differ by their seed alone make
a :class:`Variant`. Losses are in nats, differences relative to the baseline unless noted. None, or NaN within a
list: unknown.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from mptrain.runs.read import Status


class Kind(Enum):
    """The verdict on a variant."""

    baseline = "baseline"
    equivalent = "equivalent"
    worse = "worse"
    undecided = "undecided"
    diverged = "diverged"
    none = "no verdict"  # no finished run, or nothing to compare with: the text has the reason


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % confidence interval over ``n`` seeds (pairs, or the seeds of the smaller side).

    ``spreads``: the standard deviation of one seed's value: of the pairs, or of either side; empty if not recorded.
    """

    mean: float
    low: float
    high: float
    n: int
    method: str  # "paired t" or "Welch t"
    spreads: tuple[float, ...] = ()


@dataclass(frozen=True)
class Curve:
    """A line over training steps, thinned for drawing; ``low`` and ``high``: a band around it, empty for none."""

    steps: list[int]
    values: list[float]
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Verdict:
    """``text`` is the verdict in words (``worse by 1.2 %``), ``why`` the figures behind it."""

    kind: Kind
    text: str
    why: str = ""


@dataclass(frozen=True)
class Loss:
    """Means over the seeds. ``train``: over the last tenth of training. ``masters``: evaluated with quantization off.

    ``val_delta``, ``train_delta``: relative to the baseline; ``top1_delta``: in accuracy, 0.01 is a point.
    ``outside_step``: from there on the mean curve is outside the baseline's band. ``tokens_ratio``: tokens to reach the
    baseline's final training loss, over those of the baseline; None if it is never reached.
    """

    val: float | None = None
    train: float | None = None
    masters: float | None = None
    top1_frac: float | None = None
    val_delta: Interval | None = None
    train_delta: Interval | None = None
    top1_delta: Interval | None = None
    outside_step: int | None = None
    tokens_to_baseline: int | None = None
    tokens_ratio: float | None = None


@dataclass(frozen=True)
class Speed:
    """Medians over the seeds. ``ratio``: to the baseline, None when emulated or not measured alike (see ``note``).

    ``limit``: the ratio if only the GEMMs became faster, by as much as their formats allow (Amdahl);
    ``reached_frac``: the fraction of it that was reached.
    """

    tokens_per_s: float | None = None
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    mfu_frac: float | None = None
    limit: float | None = None
    reached_frac: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Memory:
    """Peak in GiB (median over the seeds), its ratio to the baseline's, and what it consists of, by role."""

    peak_gib: float | None = None
    ratio: float | None = None
    roles_gib: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Health:
    """The numerics over all seeds.

    ``layers``: rows of ``{"layer", "role", "overflow_events", "underflow_frac"}`` for every cast that was counted.
    ``events``: rows of ``{"seed", "step", "event", "reason", "layer", "scale"}``, the last four where known; at most
    200, ``more_events`` are left out. ``scale``: the loss scale of one seed, None where there is none.
    ``coverage``: format -> share of the GEMM FLOPs that ran in it.
    """

    overflow_events: int | None = None
    underflow_frac: float | None = None
    skipped_steps: int = 0
    layers: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    more_events: int = 0
    scale: Curve | None = None
    coverage: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class RunRow:
    """One run: ``folder`` as it was given, ``why`` it is unfinished or does not count."""

    name: str
    folder: str
    seed: int | None
    status: Status
    steps: int = 0
    max_steps: int | None = None
    why: str = ""
    train_loss: float | None = None
    val_loss: float | None = None
    top1_frac: float | None = None
    tokens_per_s: float | None = None
    peak_memory_gib: float | None = None
    skipped_steps: int | None = None


@dataclass(frozen=True)
class Variant:
    """Runs that differ only by seed.

    ``curve``: smoothed training loss, mean over the seeds (band: the seeds' extremes). ``difference``: the same minus
    the baseline's on the same seeds, relative.
    """

    label: str
    verdict: Verdict
    backend: str = ""
    emulated: bool = False
    loss: Loss = field(default_factory=Loss)
    speed: Speed = field(default_factory=Speed)
    memory: Memory = field(default_factory=Memory)
    health: Health = field(default_factory=Health)
    curve: Curve | None = None
    difference: Curve | None = None
    runs: list[RunRow] = field(default_factory=list)


@dataclass(frozen=True)
class Group:
    """Runs that saw the same data from the same initialisations under the same schedule, the baseline first.

    ``label``: the settings that distinguish this group, empty if there is only one. ``metric``: the basis of the
    verdicts, ``validation loss``, ``training loss`` or ``top-1``. ``unit``: of the throughput, ``tokens`` or
    ``images``. ``band``: the 95 % prediction band for the baseline with another seed, around its mean; ``noise``:
    the same as relative differences around 0. ``window_steps``: the averaging window of the curves.
    """

    label: str
    task: str
    metric: str
    unit: str
    baseline: str | None
    variants: list[Variant]
    band: Curve | None = None
    noise: Curve | None = None
    window_steps: int = 1


@dataclass(frozen=True)
class Comparison:
    """``rules``: how the verdicts follow from the figures, in sentences; ``notes``: exclusions and their reasons."""

    title: str
    margin_frac: float
    groups: list[Group]
    rules: list[str]
    notes: list[str] = field(default_factory=list)

"""What a model loses, and what it weighs, in the format it is deployed in: plain data, as ``deploy.json`` holds it.

Losses and divergences are in nats, signal-to-noise ratios (SQNR) in dB, sizes in MiB (2^20 bytes). A difference is the
deployed model's figure minus the reference's on the same samples; ratios are the deployed model's over the reference's,
but a ``speed_ratio`` above 1 is faster. None: not known, or not of this task.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from mptrain.report.comparison import Interval


@dataclass(frozen=True)
class LayerError:
    """SQNR of a layer's output (inf: equal). ``own_db``: given the reference's input, so the error is this layer's
    alone; ``output_db``: in the deployed model, with what the layers before it did; ``weight_db``: of its weight."""

    layer: str
    own_db: float
    output_db: float
    weight_db: float | None = None


@dataclass(frozen=True)
class Latency:
    """Medians of alternating forward passes of ``batch`` samples. ``low``, ``high``: the extremes of the ratio."""

    batch: int
    ms: float
    reference_ms: float
    units_per_s: float
    speed_ratio: float
    low: float
    high: float


@dataclass(frozen=True)
class Evaluation:
    """A deployed model beside its reference on the same validation samples.

    ``unit``: what is predicted, ``tokens`` or ``images``. ``kl_nats``: KL(reference || deployed) of a prediction, mean;
    ``same_frac``: how often both like the same answer best. ``machine``: what the latencies were measured on.
    ``losses``, ``hits``: of each sample, the share of right predictions among the latter.
    """

    unit: str
    samples: int
    predictions: int
    loss: Interval
    reference_loss: Interval
    loss_delta: Interval
    top1: Interval | None
    reference_top1: Interval | None
    top1_delta: Interval | None
    kl_nats: Interval
    kl_worst: float
    same_frac: float
    machine: str = ""
    latencies: list[Latency] = field(default_factory=list)
    layers: list[LayerError] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    hits: list[float] = field(default_factory=list)

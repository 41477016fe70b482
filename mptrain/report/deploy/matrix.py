"""Loss and size of models in the formats they are deployed in: plain data, as ``deploy.json`` holds it.

Losses and divergences are in nats, signal-to-noise ratios (SQNR) in dB, sizes in MiB (2^20 bytes). A difference is the
deployed model's figure minus the reference's on the same samples; ratios are the deployed model's over the reference's,
but a ``speed_ratio`` above 1 is faster. None: not known, or not of this task.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from mptrain.report.compare.comparison import Interval
from mptrain.tools.files import number, object_in

FILE = "deploy.json"


@dataclass(frozen=True)
class LayerError:
    """SQNR of a layer's output (inf: equal).

    ``own_db``: given the reference's input, so only this layer's error; ``output_db``: in the deployed model, with the
    errors of the layers before it; ``weight_db``: of its weight.
    """

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
    """A deployed model vs. its reference on the same validation samples.

    ``unit``: what is predicted, ``tokens`` or ``images``. ``kl_nats``: KL(reference || deployed) of a prediction,
    mean; ``same_frac``: how often both choose the same answer. ``machine``, ``device``: where the latencies were
    measured. ``losses``, ``hits``: by sample, ``hits`` as the share of right predictions.
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
    device: str = "cpu"


@dataclass(frozen=True)
class Deployed:
    """One cell of the matrix: runs trained in one precision, deployed in one format; means over the runs.

    ``metric``: perplexity, or top-1. ``own_delta``: to the same runs deployed in FP32; ``base_delta``: to
    FP32-trained ones deployed in FP32. Relative to the perplexity, or in accuracy (0.01 is a point). Intervals
    are over runs (seeds) if there are several, else over validation samples: see ``method``. ``mib``: of the
    stored tensors, ``size_frac``: over those of the FP32 file. ``layers``: how many were quantized. ``worst_db``:
    of the layer with the largest error, given the right input. ``why``: the reason if this deployment is
    impossible; then all else is unknown.
    """

    trained: str
    deployed: str
    runs: int = 0
    metric: Interval | None = None
    own_delta: Interval | None = None
    base_delta: Interval | None = None
    kl_nats: float | None = None
    same_frac: float | None = None
    mib: float | None = None
    size_frac: float | None = None
    layers: int | None = None
    worst_layer: str = ""
    worst_db: float | None = None
    speed_ratio: float | None = None
    speed_low: float | None = None
    speed_high: float | None = None
    why: str = ""


@dataclass(frozen=True)
class Matrix:
    """Training precision x deployment format, as in ``deploy.json``. ``metric``: ``perplexity`` or ``top-1``.

    ``batch``: samples of the timed forward; ``machine``, ``device``: where it ran; ``notes``: remarks on the whole.
    """

    title: str
    metric: str
    unit: str
    samples: int
    batch: int
    machine: str
    cells: list[Deployed]
    notes: list[str] = field(default_factory=list)
    device: str = "cpu"

    @property
    def trained(self) -> list[str]:
        return list(dict.fromkeys(cell.trained for cell in self.cells))

    @property
    def deployed(self) -> list[str]:
        return list(dict.fromkeys(cell.deployed for cell in self.cells))

    def cell(self, trained: str, deployed: str) -> Deployed | None:
        return next((c for c in self.cells if (c.trained, c.deployed) == (trained, deployed)), None)


def read(path: Path) -> Matrix | None:
    """Read the matrix in a ``deploy.json``; None if the file is missing or not one."""
    values = object_in(path)
    try:
        cells = [_cell(cell) for cell in values.pop("cells")]
        return Matrix(**values, cells=cells)
    except (KeyError, TypeError, AttributeError):
        return None


def _cell(values: dict[str, Any]) -> Deployed:
    intervals = {
        name: _interval(values[name])
        for name in ("metric", "own_delta", "base_delta")
        if isinstance(values.get(name), dict)
    }
    known = {f.name: f.default for f in fields(Deployed)}
    floats = {
        name: number(value)  # infinities are text in the file
        for name, value in values.items()
        if value is not None and name not in intervals and known[name] is None and name != "layers"
    }
    return Deployed(**(values | floats | intervals))


def _interval(values: dict[str, Any]) -> Interval:
    mean, low, high = (number(values[name]) for name in ("mean", "low", "high"))
    return Interval(mean, low, high, int(values["n"]), str(values["method"]))

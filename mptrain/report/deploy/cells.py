"""The columns of a deployment matrix, once for terminal, Markdown and HTML."""

from __future__ import annotations

import math

from mptrain.report import wording
from mptrain.report.compare.cells import Cell, Column
from mptrain.report.compare.comparison import Interval
from mptrain.report.deploy.matrix import Deployed, Matrix

OWN = "to itself in FP32"


def columns(matrix: Matrix) -> list[Column[Deployed]]:
    """List the columns of a cell; those that no cell fills are left out."""
    unit = "%" if matrix.metric == "perplexity" else "pt"
    found: list[Column[Deployed]] = [
        Column("metric", f"{matrix.metric} (95 %)", f"{matrix.metric} (95 %)", lambda c: _metric(c.metric, unit)),
        Column("own_delta", f"Δ {OWN} (95 %)", "Δ itself in FP32", lambda c: _delta(c.own_delta, unit)),
        Column("base_delta", "Δ to FP32 throughout (95 %)", "Δ FP32 throughout", lambda c: _delta(c.base_delta, unit)),
        Column("mib", "MiB", "MiB", lambda c: Cell(_plain("{:.2f}", c.mib), c.mib)),
        Column("size_frac", "of FP32", "of FP32", lambda c: Cell(_percent(c.size_frac), c.size_frac)),
        Column("speed_ratio", "speed here", "speed here", _speed),
        Column("kl_nats", "KL (nats)", "KL", lambda c: Cell(_plain("{:.2g}", c.kl_nats), c.kl_nats)),
        Column("same_frac", "same answer", "same", lambda c: Cell(_percent(c.same_frac), c.same_frac)),
        Column("worst_layer", "worst layer", "worst layer", _worst, numeric=False),
        Column("layers", "layers", "layers", lambda c: Cell(wording.count(c.layers), c.layers)),
        Column("why", "", "why not", lambda c: Cell(c.why), numeric=False),
    ]
    return [c for c in found if any(c.cell(cell).text not in ("", wording.UNKNOWN) for cell in matrix.cells)]


def name(cell: Deployed) -> str:
    return f"{cell.trained} > {cell.deployed}"


def overview(matrix: Matrix) -> str:
    """Say in a sentence or two what was measured."""
    over = "single runs: intervals are over validation samples"
    counts = {cell.runs for cell in matrix.cells if cell.runs}
    if counts and max(counts) > 1:
        over = f"{max(counts)} seeds: intervals are over the seeds"
    where = f"Speed: a forward of {matrix.batch} samples on {matrix.machine} beside the same model in FP32"
    return f"{matrix.samples} validation samples; {over}. {where}{no_gpu(matrix.device)}."


def no_gpu(device: str) -> str:
    """Qualify a speed that was measured on a CPU."""
    return "; it says nothing about a GPU's" if device == "cpu" else ""


def _metric(interval: Interval | None, unit: str) -> Cell:
    if interval is None:
        return Cell(wording.UNKNOWN)
    scale, ending = (100, " %") if unit == "pt" else (1, "")
    mean, low, high = (
        f"{scale * value:.{2 if unit == 'pt' else 3}f}" for value in (interval.mean, interval.low, interval.high)
    )
    ends = "" if math.isnan(interval.low) else f" [{low}, {high}]"
    return Cell(f"{mean}{ending}{ends}", interval.mean, _more(interval))


def _delta(interval: Interval | None, unit: str) -> Cell:
    if interval is None:
        return Cell(wording.UNKNOWN)
    return Cell(wording.delta(interval, unit), interval.mean, _more(interval))


def _more(interval: Interval) -> dict[str, object]:
    return {"low": interval.low, "high": interval.high, "n": interval.n, "method": interval.method}


def _speed(cell: Deployed) -> Cell:
    ends = wording.span(cell.speed_low, cell.speed_high)
    return Cell(wording.ratio(cell.speed_ratio) + ends, cell.speed_ratio)


def _worst(cell: Deployed) -> Cell:
    if not cell.worst_layer or cell.worst_db is None:
        return Cell(wording.UNKNOWN)
    return Cell(f"{cell.worst_layer} {cell.worst_db:.0f} dB", cell.worst_db)


def _plain(form: str, value: float | None) -> str:
    return wording.UNKNOWN if value is None or math.isnan(value) else form.format(value)


def _percent(value: float | None) -> str:
    return wording.UNKNOWN if value is None or math.isnan(value) else f"{100 * value:.1f} %"

"""The columns of a deployment matrix, shared by terminal, Markdown and HTML."""

from __future__ import annotations

from functools import partial

from mptrain.report import wording
from mptrain.report.compare.comparison import Interval
from mptrain.report.deploy.matrix import Deployed, Matrix
from mptrain.report.tables import Cell, Column, delta_cell, figure, filled, interval_cell

OWN = "to itself in FP32"


def columns(matrix: Matrix) -> list[Column[Deployed]]:
    """List the columns of a cell; those that no cell fills are left out."""
    unit = "%" if matrix.metric == "perplexity" else "pt"
    metric = f"{matrix.metric} (95 %)"
    tenths = partial(wording.put, "{:.1f} %", times=100.0)
    columns: list[Column[Deployed]] = [
        Column("metric", metric, metric, lambda c: interval_cell(c.metric, _percent if unit == "pt" else _perplexity)),
        Column("own_delta", f"Δ {OWN} (95 %)", "Δ itself in FP32", lambda c: delta_cell(c.own_delta, unit)),
        Column(
            "base_delta", "Δ to FP32 throughout (95 %)", "Δ FP32 throughout", lambda c: delta_cell(c.base_delta, unit)
        ),
        figure("mib", "MiB", "MiB", partial(wording.put, "{:.2f}"), lambda c: c.mib),
        figure("size_frac", "of FP32", "of FP32", tenths, lambda c: c.size_frac),
        Column("speed_ratio", "speed here", "speed here", _speed),
        figure("kl_nats", "KL (nats)", "KL", partial(wording.put, "{:.2g}"), lambda c: c.kl_nats),
        figure("same_frac", "same answer", "same", tenths, lambda c: c.same_frac),
        Column("worst_layer", "worst layer", "worst layer", _worst, numeric=False),
        figure("layers", "layers", "layers", wording.count, lambda c: c.layers),
        Column("why", "", "why not", lambda c: Cell(c.why), numeric=False),
    ]
    return filled(columns, matrix.cells)


def name(cell: Deployed) -> str:
    return f"{cell.trained} > {cell.deployed}"


def overview(matrix: Matrix) -> str:
    """Describe in a sentence or two what was measured."""
    over = "single runs: intervals are over validation samples"
    counts = {cell.runs for cell in matrix.cells if cell.runs}
    if counts and max(counts) > 1:
        over = f"{max(counts)} seeds: intervals are over the seeds"
    where = f"Speed: a forward of {matrix.batch} samples on {matrix.machine} vs. the same model in FP32"
    return f"{matrix.samples} validation samples; {over}. {where}{no_gpu(matrix.device)}."


def no_gpu(device: str) -> str:
    """Qualify a speed that was measured on a CPU."""
    return "; it says nothing about a GPU's" if device == "cpu" else ""


def _perplexity(mean: Interval) -> str:
    return wording.interval(mean, ".3f")


def _percent(mean: Interval) -> str:
    share = Interval(100 * mean.mean, 100 * mean.low, 100 * mean.high, mean.n, mean.method)
    return wording.interval(share, ".2f", " %")


def _speed(cell: Deployed) -> Cell:
    ends = wording.span(cell.speed_low, cell.speed_high)
    return Cell(wording.ratio(cell.speed_ratio) + ends, cell.speed_ratio)


def _worst(cell: Deployed) -> Cell:
    if not cell.worst_layer or cell.worst_db is None:
        return Cell(wording.UNKNOWN)
    return Cell(f"{cell.worst_layer} {cell.worst_db:.0f} dB", cell.worst_db)

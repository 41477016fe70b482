"""The columns of a comparison's tables, once for terminal, Markdown and HTML: what is shown, and its exact value."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from mptrain.report import wording
from mptrain.report.compare.comparison import Group, Interval, RunRow, Variant

T = TypeVar("T")


@dataclass(frozen=True)
class Cell:
    """``value`` is what ``text`` rounds, None where it is not known; ``more``: further values of the same cell."""

    text: str
    value: Any = None
    more: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Column(Generic[T]):
    """``key``: the field, as scripts find it; ``head`` fits a page and ``brief`` a terminal."""

    key: str
    head: str
    brief: str
    cell: Callable[[T], Cell]
    numeric: bool = True


def summary_columns(group: Group) -> list[Column[Variant]]:
    """List the columns that decide, by the group's metric; columns that no variant fills are left out."""
    deltas = {"training loss": "train_delta", "top-1": "top1_delta"}
    key = deltas.get(group.metric, "val_delta")
    head = f"Δ {group.metric} (95 %)"
    losses: list[Column[Variant]] = [
        Column("val", "validation loss", "val loss", lambda v: _loss(v.loss.val)),
        Column("train", "training loss", "train loss", lambda v: _loss(v.loss.train)),
    ]
    validated = _any(losses[0], group)
    columns = [
        *(losses[:1] if validated else []),
        *(losses[1:] if group.metric == "training loss" or not validated else []),
        Column("top1", "top-1", "top-1", lambda v: Cell(wording.top1(v.loss.top1_frac), v.loss.top1_frac)),
        Column(key, head, "Δ (95 %)", lambda v: _delta(getattr(v.loss, key), "pt" if key == "top1_delta" else "%")),
        Column("speed_ratio", "speed", "speed", _speed),
        Column("memory_ratio", "memory", "memory", lambda v: Cell(wording.ratio(v.memory.ratio), v.memory.ratio)),
        Column("overflow_events", "overflow", "overflow", lambda v: _count(v.health.overflow_events)),
        Column("underflow_frac", "underflow", "underflow", lambda v: _share(v.health.underflow_frac)),
        Column("skipped_steps", "skipped steps", "skipped", _skipped),
        Column("coverage", "GEMM FLOPs in", "FLOPs", _coverage, numeric=False),
    ]
    always = {"val", "train", key, "speed_ratio", "memory_ratio", "skipped_steps"}
    return [column for column in columns if column.key in always or _any(column, group)]


def detail_columns(group: Group) -> list[Column[Variant]]:
    """List the columns that explain a verdict or a speed; columns that no variant fills are left out."""
    unit = group.unit
    columns = [
        Column("backend", "kernels", "kernels", _backend, numeric=False),
        Column("masters", "loss, quantization off", "", lambda v: _loss(v.loss.masters)),
        Column("train", "final training loss", "", lambda v: _loss(v.loss.train)),
        Column("train_delta", "Δ training loss (95 %)", "", lambda v: _delta(v.loss.train_delta)),
        Column("outside_step", "outside the band from step", "", lambda v: _count(v.loss.outside_step)),
        Column("tokens_to_baseline", f"{unit} to the baseline's loss", "", lambda v: _count(v.loss.tokens_to_baseline)),
        Column(
            "tokens_ratio",
            "ratio to the baseline's",
            "",
            lambda v: Cell(wording.ratio(v.loss.tokens_ratio), v.loss.tokens_ratio),
        ),
        Column("tokens_per_s", f"{unit}/s", "", lambda v: _count(v.speed.tokens_per_s)),
        Column("mfu_frac", "MFU", "", lambda v: _share(v.speed.mfu_frac)),
        Column("limit", "limit of the speed", "", lambda v: Cell(wording.ratio(v.speed.limit), v.speed.limit)),
        Column("reached_frac", "reached of it", "", lambda v: _share(v.speed.reached_frac)),
        Column("peak_gib", "peak memory (GiB)", "", lambda v: Cell(wording.gib(v.memory.peak_gib), v.memory.peak_gib)),
    ]
    return [column for column in columns if _any(column, group)]


def run_columns(group: Group) -> list[Column[RunRow]]:
    """The figures of single runs; the columns for name, variant and reason are the table's own."""
    columns: list[Column[RunRow]] = [
        Column("seed", "seed", "", lambda r: _count(r.seed)),
        Column("status", "status", "", lambda r: Cell(r.status.value, r.status.value), numeric=False),
        Column("steps", "steps", "", _steps),
        Column("train_loss", "training loss", "", lambda r: _loss(r.train_loss)),
        Column("val_loss", "validation loss", "", lambda r: _loss(r.val_loss)),
        Column("top1_frac", "top-1", "", lambda r: Cell(wording.top1(r.top1_frac), r.top1_frac)),
        Column("tokens_per_s", f"{group.unit}/s", "", lambda r: _count(r.tokens_per_s)),
        Column("peak_memory_gib", "GiB", "", lambda r: Cell(wording.gib(r.peak_memory_gib), r.peak_memory_gib)),
        Column("skipped_steps", "skipped", "", lambda r: _count(r.skipped_steps)),
    ]
    runs = [run for variant in group.variants for run in variant.runs]
    return [column for column in columns if any(column.cell(run).value is not None for run in runs)]


def _any(column: Column[Variant], group: Group) -> bool:
    return any(column.cell(variant).text not in (wording.UNKNOWN, "") for variant in group.variants)


def _loss(value: float | None) -> Cell:
    return Cell(wording.loss(value), value)


def _count(value: float | None) -> Cell:
    return Cell(wording.count(value), value)


def _share(value: float | None) -> Cell:
    return Cell(wording.share(value), value)


def _delta(interval: Interval | None, unit: str = "%") -> Cell:
    if interval is None:
        return Cell(wording.UNKNOWN)
    more = {"low": interval.low, "high": interval.high, "n": interval.n, "method": interval.method}
    return Cell(wording.delta(interval, unit), interval.mean, more)


def _speed(variant: Variant) -> Cell:
    if variant.emulated:
        return Cell("emulated")
    return Cell(wording.ratio(variant.speed.ratio), variant.speed.ratio)


def _skipped(variant: Variant) -> Cell:
    return _count(variant.health.skipped_steps)


def _coverage(variant: Variant) -> Cell:
    return Cell(wording.coverage(variant.health.coverage), None, dict(variant.health.coverage))


def _backend(variant: Variant) -> Cell:
    return Cell(variant.backend or wording.UNKNOWN, variant.backend or None)


def _steps(run: RunRow) -> Cell:
    of = "" if run.max_steps is None or run.steps == run.max_steps else f" of {run.max_steps:,}"
    return Cell(f"{run.steps:,}{of}", run.steps)

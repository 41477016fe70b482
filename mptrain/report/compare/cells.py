"""The columns of a comparison's tables, shared by terminal, Markdown and HTML."""

from __future__ import annotations

from mptrain.report import wording
from mptrain.report.compare.comparison import Group, RunRow, Variant
from mptrain.report.tables import Cell, Column, delta_cell, figure, filled


def summary_columns(group: Group) -> list[Column[Variant]]:
    """List the columns that decide, by the group's metric; columns that no variant fills are left out."""
    deltas = {"training loss": "train_delta", "top-1": "top1_delta"}
    key = deltas.get(group.metric, "val_delta")
    head = f"Δ {group.metric} (95 %)"
    losses: list[Column[Variant]] = [
        figure("val", "validation loss", "val loss", wording.loss, lambda v: v.loss.val),
        figure("train", "training loss", "train loss", wording.loss, lambda v: v.loss.train),
    ]
    validated = filled(losses[:1], group.variants)
    columns: list[Column[Variant]] = [
        *validated,
        *(losses[1:] if group.metric == "training loss" or not validated else []),
        figure("top1", "top-1", "top-1", wording.top1, lambda v: v.loss.top1_frac),
        Column(key, head, "Δ (95 %)", lambda v: delta_cell(getattr(v.loss, key), "pt" if key == "top1_delta" else "%")),
        Column("speed_ratio", "speed", "speed", _speed),
        figure("memory_ratio", "memory", "memory", wording.ratio, lambda v: v.memory.ratio),
        figure("overflow_events", "overflow", "overflow", wording.count, lambda v: v.health.overflow_events),
        figure("underflow_frac", "underflow", "underflow", wording.share, lambda v: v.health.underflow_frac),
        figure("skipped_steps", "skipped steps", "skipped", wording.count, lambda v: v.health.skipped_steps),
        Column("coverage", "GEMM FLOPs in", "FLOPs", _coverage, numeric=False),
    ]
    always = {"val", "train", key, "speed_ratio", "memory_ratio", "skipped_steps"}
    shown = filled(columns, group.variants)
    return [column for column in columns if column.key in always or column in shown]


def detail_columns(group: Group) -> list[Column[Variant]]:
    """List the columns that explain a verdict or a speed; columns that no variant fills are left out."""
    to_baseline = f"{group.unit} to the baseline's loss"
    columns: list[Column[Variant]] = [
        Column("backend", "kernels", "kernels", _backend, numeric=False),
        figure("masters", "loss, quantization off", "", wording.loss, lambda v: v.loss.masters),
        figure("train", "final training loss", "", wording.loss, lambda v: v.loss.train),
        Column("train_delta", "Δ training loss (95 %)", "", lambda v: delta_cell(v.loss.train_delta)),
        figure("outside_step", "outside the band from step", "", wording.count, lambda v: v.loss.outside_step),
        figure("tokens_to_baseline", to_baseline, "", wording.count, lambda v: v.loss.tokens_to_baseline),
        figure("tokens_ratio", "ratio to the baseline's", "", wording.ratio, lambda v: v.loss.tokens_ratio),
        figure("tokens_per_s", f"{group.unit}/s", "", wording.count, lambda v: v.speed.tokens_per_s),
        figure("mfu_frac", "MFU", "", wording.share, lambda v: v.speed.mfu_frac),
        figure("limit", "limit of the speed", "", wording.ratio, lambda v: v.speed.limit),
        figure("reached_frac", "reached of it", "", wording.share, lambda v: v.speed.reached_frac),
        figure("peak_gib", "peak memory (GiB)", "", wording.gib, lambda v: v.memory.peak_gib),
    ]
    return filled(columns, group.variants)


def run_columns(group: Group) -> list[Column[RunRow]]:
    """List the columns of single runs; those for name, variant and reason belong to the table."""
    columns: list[Column[RunRow]] = [
        figure("seed", "seed", "", wording.count, lambda r: r.seed),
        Column("status", "status", "", lambda r: Cell(r.status.value, r.status.value), numeric=False),
        Column("steps", "steps", "", _steps),
        figure("train_loss", "training loss", "", wording.loss, lambda r: r.train_loss),
        figure("val_loss", "validation loss", "", wording.loss, lambda r: r.val_loss),
        figure("top1_frac", "top-1", "", wording.top1, lambda r: r.top1_frac),
        figure("tokens_per_s", f"{group.unit}/s", "", wording.count, lambda r: r.tokens_per_s),
        figure("peak_memory_gib", "GiB", "", wording.gib, lambda r: r.peak_memory_gib),
        figure("skipped_steps", "skipped", "", wording.count, lambda r: r.skipped_steps),
    ]
    runs = [run for variant in group.variants for run in variant.runs]
    return [column for column in columns if any(column.cell(run).value is not None for run in runs)]


def _backend(variant: Variant) -> Cell:
    return Cell(variant.backend or wording.UNKNOWN, variant.backend or None)


def _speed(variant: Variant) -> Cell:
    if variant.emulated:
        return Cell("emulated")
    return Cell(wording.ratio(variant.speed.ratio), variant.speed.ratio)


def _coverage(variant: Variant) -> Cell:
    return Cell(wording.coverage(variant.health.coverage), None, dict(variant.health.coverage))


def _steps(run: RunRow) -> Cell:
    of = "" if run.max_steps is None or run.steps == run.max_steps else f" of {run.max_steps:,}"
    return Cell(f"{run.steps:,}{of}", run.steps)

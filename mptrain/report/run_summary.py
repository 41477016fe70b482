"""The plan of a run and its final comparison with FP32, in the terminal."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mptrain.report.wording import loss, put
from mptrain.runs.baseline import FEW_STEPS
from mptrain.telemetry.coverage import SHOWN


def print_lines(console: Console, rows: list[tuple[str, str]]) -> None:
    """Print aligned ``name  text`` rows; a row without a name continues the previous one."""
    width = max(len(name) for name, _ in rows)
    grid = Table.grid(padding=(0, 2))
    grid.add_column(min_width=width, no_wrap=True, style="bold")
    grid.add_column(overflow="fold")
    for name, text in rows:
        grid.add_row(name, text)
    console.print(grid, highlight=False)


def print_comparison(console: Console, summary: dict[str, Any]) -> None:
    """Print this run, FP32 and their ratio, then overflow, underflow, skipped steps and other notes."""
    baseline = summary["baseline"]
    alone = baseline["source"] == "none"
    title = "result" if alone else f"compared with FP32 ({baseline['source']})"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    table.add_column(str(summary["precision"]), justify="right")
    if not alone:
        table.add_column("FP32", justify="right")
        table.add_column("ratio", justify="right")
    for row in comparison_rows(summary):
        table.add_row(*(row[:2] if alone else row))
    console.print(table)
    print_lines(console, footnotes(summary))


def comparison_rows(summary: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Return the cells of the table: name, this run, FP32, ratio."""
    base = summary["baseline"]
    step, few = base["step"], base["step"] < FEW_STEPS
    rows = []
    if step and step != summary["steps"]:
        cells = (loss(base["loss"]), loss(base["fp32_loss"]))
        rows.append(
            (f"training loss at step {step} (nats)", *cells, f"undecided: {step} steps" if few else _ratio(*cells))
        )
    cells = (loss(summary["train_loss"]), loss(base["fp32_loss"]) if step == summary["steps"] else "-")
    rows.append((f"training loss at step {summary['steps']} (nats)", *cells, _decided(cells, step)))
    cells = (loss(summary["val_loss"]), loss(base["fp32_val_loss"]))
    rows.append(("validation loss (nats)", *cells, _decided(cells, step)))
    cells = (put("{:.2f}", summary.get("val_top1_frac"), 100), put("{:.2f}", base["fp32_val_top1_frac"], 100))
    if cells[0] != "-":
        rows.append(("validation top-1 (%)", *cells, _decided(cells, step)))
    speed = f"{summary.get('unit', 'tokens')}/s{' (emulation)' if summary['emulated'] else ''}"
    rows.append((speed, *_pair("{:,.0f}", base["tokens_per_s"], base["fp32_tokens_per_s"])))
    rows.append(("peak memory (GiB)", *_pair("{:.3f}", summary["peak_memory_gib"], base["fp32_peak_memory_gib"])))
    return rows


def footnotes(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the event counts, and why a figure may mislead."""
    overflow, underflow = summary["overflow_events"], summary["underflow_frac"]
    uncounted = "FP32 casts nothing" if summary["precision"] == "fp32" else "not counted (telemetry.record_every=0)"
    rows = [
        ("overflow", uncounted if overflow is None else f"{overflow:,} elements on sampled steps"),
        ("underflow", uncounted if underflow is None else f"{underflow:.3%} of elements became zero"),
        ("skipped steps", str(summary["skipped_steps"])),
    ]
    if summary.get("plan"):
        planned, off = summary["plan"]["planned_gib"], summary["plan"]["plan_error_frac"]
        apart = "as measured" if abs(off) < 5e-4 else f"{off:+.1%} vs. measured"
        rows.append(("memory plan", f"{planned:.3f} GiB, {apart}"))
    if "gemm_flops" in summary:
        rows.append(("GEMM FLOPs", summary["gemm_flops"]))
        rows += [("precision mismatch", problem) for problem in summary["audit"][:SHOWN]]
    fitted = {"current": "tensor", "rowwise": "row", "block": "block"}.get(summary["scaling"])
    if overflow == 0 and fitted:
        why = f"{summary['scaling']} scaling fits the largest value of each {fitted} to the format"
        rows.append(("no overflow", f"{why}, so overflow cannot occur"))
    if summary["emulated"]:
        rows.append(("speed", emulation_note(summary["precision"])))
    if summary["baseline"]["note"]:
        rows.append(("baseline", summary["baseline"]["note"]))
    return rows


def emulation_note(precision: str) -> str:
    unit = precision.partition("-")[0].upper()
    return f"emulated: no {unit} unit here; numerics are exact, speed is not"


def _decided(cells: tuple[str, str], steps: int) -> str:
    if "-" in cells:
        return "-"
    return f"undecided: {steps} steps" if steps < FEW_STEPS else _ratio(*cells)


def _ratio(run: str, fp32: str) -> str:
    return f"{float(run) / float(fp32):.4f}"


def _pair(form: str, run: float, fp32: float) -> tuple[str, str, str]:
    if math.isnan(fp32):
        return form.format(run), "-", "-"
    return form.format(run), form.format(fp32), f"{run / fp32:.2f}"


def print_end(say: Callable[[str], None], folder: Path, go_on: str) -> None:
    """Print where the files are; ``go_on``: the command that continues a stopped run, else empty."""
    say(f"run folder: {folder} (summary.json, metrics.jsonl, events.jsonl, checkpoints)")
    if go_on:
        say(f"interrupted; state saved. Continue with: {go_on}")

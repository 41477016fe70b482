"""A comparison in the terminal: a table per group, the verdicts with their reasons, then the notes."""

from __future__ import annotations

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mptrain.report import wording
from mptrain.report.compare import cells
from mptrain.report.compare.comparison import Comparison, Group, Kind, Variant
from mptrain.report.tables import GAP, compact_table, fitting, print_left_out, taken

LEAST, MOST = 12, 32  # characters of a label in the table; the lines below show all of it
DROPPED = (
    "coverage",
    "underflow_frac",
    "overflow_events",
    "skipped_steps",
    "top1",
    "memory_ratio",
    "train",
    "speed_ratio",
)
COLOURS = {Kind.equivalent: "green", Kind.worse: "red", Kind.diverged: "bold red", Kind.undecided: "yellow"}


def print_comparison_table(console: Console, comparison: Comparison) -> None:
    """Print the comparison.

    A narrow terminal hides the least important columns and names them; numbers are never cut.
    """
    console.print(Text(comparison.title, "bold"), soft_wrap=True)
    for group in comparison.groups:
        _print_group(console, group, several=len(comparison.groups) > 1)
    if not comparison.groups:
        console.print(Text("no runs to compare"))
    for note in comparison.notes:
        console.print(Text(note))


def _print_group(console: Console, group: Group, *, several: bool) -> None:
    if several:
        console.print(Text(group.label or f"{group.task} runs", "bold"))
    if not group.variants:
        console.print(Text("no variants in this group"))
        return
    columns, variants = cells.summary_columns(group), group.variants
    least = min(LEAST, max(len("variant"), *(cell_len(variant.label) for variant in variants)))
    room = console.width - GAP - max(cell_len(_sign(variant)) for variant in variants)
    shown = fitting(columns, variants, room - least, DROPPED)
    table = compact_table(("variant", "verdict"), shown)
    width = max(1, min(MOST, room - taken(shown, variants)))
    labels = wording.brief([variant.label for variant in variants], width)
    for variant, label in zip(variants, labels, strict=True):
        figures = [Text(column.cell(variant).text) for column in shown]
        table.add_row(Text(label), Text(_sign(variant), COLOURS.get(variant.verdict.kind, "")), *figures)
    console.print(table)
    print_left_out(console, columns, shown)
    for variant in variants:
        console.print(_line(variant))


def _sign(variant: Variant) -> str:
    return f"{wording.SIGNS[variant.verdict.kind]} {variant.verdict.kind.value}"


def _line(variant: Variant) -> Table:
    """Return sign, label and verdict in words, then the reason; long ones continue under the label."""
    verdict = variant.verdict
    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    words = Text.assemble((variant.label, "bold"), f": {verdict.text or verdict.kind.value}")
    if verdict.why:
        words.append(f" ({verdict.why})")
    grid.add_row(Text(wording.SIGNS[verdict.kind], COLOURS.get(verdict.kind, "")), words)
    return grid

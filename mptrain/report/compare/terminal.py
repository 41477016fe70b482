"""A comparison for the terminal: a table a group, the verdicts with their reasons below it, then the notes."""

from __future__ import annotations

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mptrain.report import wording
from mptrain.report.compare import cells
from mptrain.report.compare.cells import Column
from mptrain.report.compare.comparison import Comparison, Group, Kind, Variant

GAP = 2  # spaces between columns, one of them the box's
LEAST, MOST = 12, 32  # characters of a label in the table; the lines below it have the whole
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
    """All of the comparison that a terminal holds. In a narrow one the least important columns are left out, which is
    said; a number is never cut."""
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
    columns = cells.summary_columns(group)
    fixed = max(cell_len(_sign(variant)) for variant in group.variants)
    shown = fitting(columns, group, console.width - fixed - GAP)
    room = console.width - fixed - GAP - _taken(shown, group)
    width = max(1, min(MOST, room))
    table = Table(box=box.SIMPLE_HEAD, padding=(0, GAP - 1, 0, 0), pad_edge=False, show_edge=False)
    for head in ("variant", "verdict"):
        table.add_column(head, no_wrap=True)
    for column in shown:
        table.add_column(column.brief, justify="right" if column.numeric else "left", no_wrap=True)
    labels = wording.brief([variant.label for variant in group.variants], width)
    for variant, label in zip(group.variants, labels, strict=True):
        figures = [Text(column.cell(variant).text) for column in shown]
        table.add_row(Text(label), Text(_sign(variant), COLOURS.get(variant.verdict.kind, "")), *figures)
    console.print(table)
    dropped = [column.brief for column in columns if column not in shown]
    if dropped:
        console.print(Text(f"left out at this width: {', '.join(dropped)}", "dim"))
    for variant in group.variants:
        console.print(_line(variant))


def fitting(columns: list[Column[Variant]], group: Group, width: int) -> list[Column[Variant]]:
    """The columns that fit beside labels of at least ``LEAST`` characters, the least important gone first."""
    shown = list(columns)
    least = min(LEAST, max(len("variant"), *(cell_len(variant.label) for variant in group.variants)))
    order = [column for key in DROPPED for column in columns if column.key == key]
    order += [column for column in reversed(columns) if column not in order]
    for column in order:
        if width - _taken(shown, group) >= least:
            break
        shown.remove(column)
    return shown


def _taken(columns: list[Column[Variant]], group: Group) -> int:
    """Characters of the columns with the gaps before them."""
    found = 0
    for column in columns:
        widths = [cell_len(column.cell(variant).text) for variant in group.variants]
        found += GAP + max([cell_len(column.brief), *widths])
    return found


def _sign(variant: Variant) -> str:
    return f"{wording.SIGNS[variant.verdict.kind]} {variant.verdict.kind.value}"


def _line(variant: Variant) -> Table:
    """Sign, label and verdict in words, then why; longer ones go on under the label."""
    verdict = variant.verdict
    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    said = Text.assemble((variant.label, "bold"), f": {verdict.text or verdict.kind.value}")
    if verdict.why:
        said.append(f" ({verdict.why})")
    grid.add_row(Text(wording.SIGNS[verdict.kind], COLOURS.get(verdict.kind, "")), said)
    return grid

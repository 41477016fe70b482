"""Tables of all reports: columns with their exact values, fitted to a terminal's width or written as Markdown."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any, Generic, TypeVar

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mptrain.report import wording
from mptrain.report.compare.comparison import Interval

T = TypeVar("T")
GAP = 2  # spaces between columns, one of them from the box


@dataclass(frozen=True)
class Cell:
    """``value`` is what ``text`` rounds, None if unknown; ``more``: further values of the same cell."""

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


def figure(
    key: str, head: str, brief: str, form: Callable[[float | None], str], value: Callable[[T], float | None]
) -> Column[T]:
    """Return a column of numbers, shown as ``form`` writes them."""
    return Column(key, head, brief, lambda row: Cell(form(value(row)), value(row)))


def interval_cell(interval: Interval | None, form: Callable[[Interval], str]) -> Cell:
    if interval is None:
        return Cell(wording.UNKNOWN)
    more = {"low": interval.low, "high": interval.high, "n": interval.n, "method": interval.method}
    return Cell(form(interval), interval.mean, more)


def delta_cell(interval: Interval | None, unit: str = "%") -> Cell:
    return interval_cell(interval, lambda known: wording.delta(known, unit))


def filled(columns: Iterable[Column[T]], rows: Sequence[T]) -> list[Column[T]]:
    """Return the columns that are not empty in every row."""
    return [column for column in columns if any(column.cell(row).text not in (wording.UNKNOWN, "") for row in rows)]


def taken(columns: Iterable[Column[T]], rows: Sequence[T]) -> int:
    """Return characters of the columns in a terminal, with the gaps before them."""
    return sum(GAP + max(map(cell_len, (column.brief, *(column.cell(row).text for row in rows)))) for column in columns)


def fitting(columns: Sequence[Column[T]], rows: Sequence[T], width: int, dropped: Sequence[str]) -> list[Column[T]]:
    """Return the columns that fit into ``width``; those with the keys ``dropped`` go first, then from the right."""
    shown = list(columns)
    order = [column for key in dropped for column in columns if column.key == key]
    order += [column for column in reversed(columns) if column not in order]
    for column in order:
        if taken(shown, rows) <= width:
            break
        shown.remove(column)
    return shown


def print_left_out(console: Console, columns: Iterable[Column[T]], shown: Sequence[Column[T]]) -> None:
    """Name the columns that :func:`fitting` removed."""
    missing = [column.brief for column in columns if column not in shown]
    if missing:
        console.print(Text(f"left out at this width: {', '.join(missing)}", "dim"))


def table_of(left: Sequence[str], right: Iterable[str] = (), *, folded: bool = False, **options: Any) -> Table:
    """Return a table with columns ``left``, then right-aligned ones; of them only the first may be ``folded``.

    ``options``: rich's.
    """
    usual: dict[str, Any] = {"box": box.SIMPLE_HEAD, "padding": (0, GAP - 1, 0, 0), "title_justify": "left"}
    table = Table(**(usual | options))
    for head in left:
        table.add_column(head, no_wrap=True)
    for head in right:
        table.add_column(head, justify="right", no_wrap=True)
    if folded:
        table.columns[0].no_wrap, table.columns[0].overflow = False, "fold"
    return table


def compact_table(left: Sequence[str], columns: Iterable[Column[Any]] = ()) -> Table:
    """Return a table without an edge that ends in ``columns``."""
    table = table_of(left, pad_edge=False, show_edge=False)
    for column in columns:
        table.add_column(column.brief, justify="right" if column.numeric else "left", no_wrap=True)
    return table


def plain(text: str) -> str:
    """Return the text in one line, with Markdown's and HTML's markup escaped."""
    flat = escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", flat)


def markdown_table(heads: Sequence[str], columns: Sequence[Column[T]], rows: Iterable[tuple[Sequence[str], T]]) -> str:
    """Return a Markdown table; a row is the Markdown under ``heads``, and the object that the columns read."""
    lines = [
        [*map(plain, heads), *(plain(column.head) for column in columns)],
        [*("---" for _ in heads), *("---:" if column.numeric else "---" for column in columns)],
        *([*first, *(plain(column.cell(row).text) for column in columns)] for first, row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

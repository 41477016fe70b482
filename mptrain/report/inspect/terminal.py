"""``mptrain inspect`` in the terminal: tables of figures, worst rows first, readable at 100 columns."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mptrain.formats import Format
from mptrain.report.inspect.tensors import FORMATS, UNSCALED, Judgement, Row, Tensors
from mptrain.report.tables import table_of
from mptrain.report.wording import LAYER_WIDTH, percent, put, scale_text, short
from mptrain.telemetry.histogram import Share

SHOWN = 20  # rows of a table without --all: what a terminal holds with the other tables
BAD, DOUBTFUL = 1e-2, 1e-4  # shares of elements lost from which a cell is red, yellow
COARSE = 0.25  # share of subnormals from which a cell is yellow: a quarter of the elements keeps fewer bits


def print_tables(console: Console, tensors: Tensors, rows: list[Row], only: Format | None, every: bool) -> None:
    """Print all figures of ``rows``; ``only``: one format with all its figures; ``every``: no row left out."""
    console.print(tensors.title, style="bold", highlight=False, soft_wrap=True)
    width = LAYER_WIDTH if console.width >= 97 else max(9, LAYER_WIDTH - (93 - console.width))  # figures are never cut
    shown = rows if every else rows[:SHOWN]
    judged = any(row.formats for row in rows)
    if judged:
        console.print(one_format(shown, only, width) if only else all_formats(shown, width))
        console.print(_legend(only), style="dim", highlight=False)
    used = [row for row in rows if row.used and (not only or row.used.format == only.name)]
    if used:
        console.print(as_cast(used if every else used[:SHOWN], width))
    if not judged and not used:
        console.print(amaxes(shown, width))
    if any(row.spread for row in rows) and (only or not judged or every):
        console.print(spreads([row for row in shown if row.spread], width))
    lost = sorted((row for row in rows if row.lost), key=_stayed, reverse=True)
    if lost:
        console.print(lost_updates(lost if every else lost[:SHOWN], width))
    notes = list(tensors.notes)
    if len(rows) > len(shown):
        notes.append(f"{len(rows) - len(shown)} more of {len(rows)} rows, not shown; use --all")
    for note in notes:
        console.print(note, highlight=False, soft_wrap=True)


def all_formats(rows: list[Row], width: int = LAYER_WIDTH) -> Table:
    """Return a table with a line per tensor and a compact cell per format."""
    names = [*dict.fromkeys(name for row in rows for name in row.formats)]
    title = "saturated/flushed/subnormal, % of elements"
    return _table(title, names, rows, width, lambda row: [compact(row.formats[name], name) for name in names])


def one_format(rows: list[Row], fmt: Format, width: int = LAYER_WIDTH) -> Table:
    """Return a table with all figures of each tensor in one format; ranges where the bins only bound a share."""
    title = f"{fmt} {'unscaled' if fmt in UNSCALED else 'at its best power-of-two scale'}"
    heads = ("scale", "saturated", "flushed", "subnormal", "room", "amax", "median")

    def cells(row: Row) -> list[str | Text]:
        judged = row.formats[fmt.name]
        shares = [Text(share_text(share), style) for share, style in _styled(judged)]
        room = "-" if math.isinf(judged.headroom_bits) else f"{round(judged.headroom_bits, 1) + 0.0:.1f}b"
        return [scale_text(judged.scale), *shares, room, _power(row.amax), _power(row.percentiles.get("50"))]

    return _table(title, heads, rows, width, cells)


def as_cast(rows: list[Row], width: int = LAYER_WIDTH) -> Table:
    """Return a table of the run's own casts, by exact counts."""

    def cells(row: Row) -> list[str | Text]:
        used = row.used
        assert used is not None
        whole = max(1, used.elements or 0)
        bad = None if used.inf is None or used.nan is None else used.inf + used.nan
        counts = [
            Text("-" if count is None else f"{count:,}", _style((count or 0) / whole))
            for count in (used.saturated, used.flushed)
        ]
        return [
            _brief(used.format),
            "-" if used.scale is None else scale_text(used.scale),
            *counts,
            Text("-" if bad is None else f"{bad:,}", "bold red" if bad else ""),
            "-" if used.subnormal is None else share_text(used.subnormal),
            "-" if used.sqnr_db is None else "exact" if math.isinf(used.sqnr_db) else f"{used.sqnr_db:.0f} dB",
        ]

    heads = ("format", "scale", "saturated", "flushed", "inf+nan", "subnorm", "SQNR")
    return _table("as cast in the run", heads, rows, width, cells)


def amaxes(rows: list[Row], width: int = LAYER_WIDTH) -> Table:
    """Return a table for a record that holds neither histograms nor casts."""
    return _table("tensors", ["amax"], rows, width, lambda row: [_power(row.amax)])


def spreads(rows: list[Row], width: int = LAYER_WIDTH) -> Table:
    """Return how far the blocks' amaxes lie below the tensor's: bits that one scale per block would win back."""
    sizes = [*dict.fromkeys(size for row in rows for size in row.spread)]
    heads = [f"{what} of {size}" for size in sizes for what in ("median", "1st %ile")]
    title = "bits from the tensor's amax down to that of its blocks"
    return _table(
        title,
        heads,
        rows,
        width,
        lambda row: [str(bits) for size in sizes for bits in (row.spread[size].median, row.spread[size].first)],
    )


def lost_updates(rows: list[Row], width: int = LAYER_WIDTH) -> Table:
    """Return the coordinates that a step asked to move and that stayed, by the storage of the weights."""

    def cells(row: Row) -> list[str | Text]:
        lost = row.lost
        assert lost is not None
        parts = [value / max(1.0, lost.asked) for value in (lost.bf16, lost.fp32, lost.stochastic, lost.remainder)]
        return [f"{lost.asked:,.0f}", *(Text(f"{percent(part)} %", _style(part)) for part in parts)]

    heads = ("asked", "BF16", "FP32", "BF16 stochastic", "BF16+16 bits")
    return _table("updates lost, % of the coordinates asked to move", heads, rows, width, cells)


def compact(judged: Judgement, name: str) -> Text:
    """Write ``saturated/flushed/subnormal`` in percent (integers have no subnormals), ``·`` if all are 0."""
    shares = [share.estimate for share in (judged.saturated, judged.flushed, judged.subnormal)]
    shares = shares[:2] if FORMATS[name].value.integer else shares
    if not any(shares):
        return Text("·", "green")
    brief = ["0" if not share else percent(share).replace("<0.01", "~0").removeprefix("0") for share in shares]
    return Text("/".join(brief), _style(judged.lost, judged.subnormal.estimate) or "green")


def share_text(share: Share) -> str:
    """Write a share in percent; ``low-high`` where the bins only bound it."""
    low, high = percent(share.low), percent(share.high)
    return f"{low}%" if low == high else f"{low}-{high}%"


def _table(
    title: str, heads: Sequence[str], rows: list[Row], width: int, cells: Callable[[Row], Iterable[str | Text]]
) -> Table:
    table = table_of(["layer", "role"], map(_brief, heads), title=title, title_style="bold")
    for column in table.columns[:2]:  # only these may be cut, not the figures
        column.no_wrap = False
    for row in rows:
        table.add_row(*_place(row, width), *cells(row))
    return table


def _stayed(row: Row) -> float:
    return row.lost.bf16 / max(1.0, row.lost.asked) if row.lost else 0.0


def _brief(name: str) -> str:
    """Return the part of a format's name that distinguishes it: 100 columns hold no more."""
    return name.removeprefix("fp8_").removeprefix("fp4_")


def _place(row: Row, width: int) -> tuple[Text, str]:
    bad = row.inf + row.nan or (row.used and (row.used.inf or 0) + (row.used.nan or 0))
    return Text(short(row.layer, width), "bold red" if bad else ""), row.role if width == LAYER_WIDTH else row.role[:7]


def _styled(judged: Judgement) -> list[tuple[Share, str]]:
    sub = "yellow" if judged.subnormal.estimate >= COARSE else ""
    kinds = [(share, _style(share.high)) for share in (judged.saturated, judged.flushed)]
    return [*kinds, (judged.subnormal, sub)]


def _style(lost: float, subnormal: float = 0.0) -> str:
    return "red" if lost >= BAD else "yellow" if lost >= DOUBTFUL or subnormal >= COARSE else ""


def _power(value: float | None) -> str:
    return put("{:.2g}", value)


def _legend(only: Format | None) -> str:
    scale = "" if only in UNSCALED else "at the largest power of two where nothing saturates; "
    bf16 = "bf16 unscaled; " if only is None else ""
    return f"{scale}{bf16}red: {BAD:.0%} or more lost, yellow: {DOUBTFUL:.2%}, or {COARSE:.0%} subnormal; · all kept"

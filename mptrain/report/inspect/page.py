"""``mptrain inspect --html``: one file with every histogram drawn, worst first, and a heat map for each role."""

from __future__ import annotations

import math
from typing import Any

from mptrain.formats import Format
from mptrain.report.draw.magnitudes import Band, heat_map_svg, histogram_svg, lower, upper
from mptrain.report.draw.svg import BAD, superscript
from mptrain.report.html import render
from mptrain.report.inspect.tensors import FORMATS, UNSCALED, Judgement, Row, Tensors
from mptrain.report.inspect.terminal import share_text
from mptrain.report.wording import percent, scale_text
from mptrain.telemetry.histogram import Histogram, Histograms

OPEN = 6  # tensors drawn open; the others unfold
HEADS = ("saturated", "flushed", "subnormal", "room")


def page(tensors: Tensors, rows: list[Row]) -> str:
    """Return the whole HTML text. ValueError if the record holds no histograms."""
    histograms = tensors.histograms
    if histograms is None:
        raise ValueError(f"{tensors.title} holds no histograms to draw")
    roles = [*dict.fromkeys(role for _, role, _ in tensors.rows)]
    return render(
        "inspect.html",
        title=tensors.title,
        notes=tensors.notes,
        cast=any(row.used for row in rows),
        maps=[_heat_map(tensors, histograms, rows, role, len(roles)) for role in roles],
        rows=[_tensor(row, histograms.row(row.index), opened=place < OPEN) for place, row in enumerate(rows)],
        BAD=BAD,
    )


def _heat_map(tensors: Tensors, histograms: Histograms, rows: list[Row], role: str, roles: int) -> dict[str, Any]:
    """Draw the magnitudes of every tensor of a role, with the range of the format it was cast to."""
    of_role = [i for i, row in enumerate(tensors.rows) if row[1] == role]
    known = {row.index: row for row in rows}
    used = [next((band for band in bands_of(known[i]) if band.used), None) for i in of_role]
    marks = [(lower(band), upper(band)) if band else None for band in used]
    shown = Histograms(histograms.counts[of_role], histograms.amax[of_role])
    return {
        "role": role,
        "tensors": len(of_role),
        "opened": len(of_role) <= 60 and roles <= 8,
        "drawn": heat_map_svg([tensors.rows[i][0] for i in of_role], shown, marks),
    }


def _tensor(row: Row, histogram: Histogram, *, opened: bool) -> dict[str, Any]:
    svg = histogram_svg(histogram, bands_of(row), HEADS)
    return {"layer": row.layer, "role": row.role, "figures": _figures(row), "opened": opened, "drawn": svg}


def _figures(row: Row) -> list[tuple[str, bool]]:
    """Return the figures of a summary line, and whether each is bad: in words as well as by colour."""
    words = []
    used = row.used
    bad = row.inf + row.nan
    if bad:
        words.append((f"{bad:,} Inf or NaN", True))
    if used and used.elements:
        saturated, flushed = used.saturated or 0, used.flushed or 0
        kinds = f"saturated {percent(saturated / used.elements)} %, flushed {percent(flushed / used.elements)} %"
        words.append((kinds, (saturated + flushed) / used.elements >= 0.01))
    if used and used.sqnr_db is not None:
        words.append(("SQNR exact" if math.isinf(used.sqnr_db) else f"SQNR {used.sqnr_db:.1f} dB", False))
    if row.elements:
        words.append((f"{row.elements:,} elements, amax {row.amax:.3g}", False))
        if row.zeros:
            words.append((f"{percent(row.zeros / row.elements)} % zeros", False))
    if row.lost and row.lost.asked:
        words.append((f"updates lost in BF16 {percent(row.lost.bf16 / row.lost.asked)} %", False))
    return words


def bands_of(row: Row) -> list[Band]:
    """Return the cast of the run first, then every judged format at its scale."""
    bands = []
    used = row.used
    if used and used.scale and used.headroom_bits is not None and used.format in FORMATS:
        fmt = FORMATS[used.format]
        whole = max(1, used.elements or 0)
        counts = ["-" if n is None else f"{percent(n / whole)}%" for n in (used.saturated, used.flushed)]
        subnormal = "-" if used.subnormal is None else share_text(used.subnormal)
        figures = [*counts, subnormal, _room(used.headroom_bits)]
        bands.append(Band(f"cast: {_named(fmt)} × {_scale(used.scale)}", fmt, used.scale, figures, used=True))
    for name, judged in row.formats.items():
        fmt = FORMATS[name]
        by = "" if fmt in UNSCALED else f" × {_scale(judged.scale)}"
        bands.append(Band(f"{_named(fmt)}{by}", fmt, judged.scale, _cells(judged)))
    return bands


def _cells(judged: Judgement) -> list[str]:
    shares = [share_text(share) for share in (judged.saturated, judged.flushed, judged.subnormal)]
    return [*shares, _room(judged.headroom_bits)]


def _scale(scale: float) -> str:
    mantissa, exponent = math.frexp(scale)
    return f"2{superscript(exponent - 1)}" if mantissa == 0.5 else scale_text(scale)


def _room(bits: float | None) -> str:
    return "-" if bits is None or math.isinf(bits) else f"{round(bits, 1) + 0.0:.1f} bits"


def _named(fmt: Format) -> str:
    return fmt.name.partition("_")[2].upper() or fmt.name.upper()

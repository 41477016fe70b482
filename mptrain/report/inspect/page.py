"""``mptrain inspect --html``: one file with every histogram drawn, worst first, and a heat map for each role."""

from __future__ import annotations

import math
from html import escape

from mptrain.formats import Format
from mptrain.report.draw.magnitudes import Band, heat_map_svg, histogram_svg, lower, upper
from mptrain.report.draw.svg import BAD, superscript
from mptrain.report.inspect.tensors import FORMATS, UNSCALED, Judged, Row, Tensors
from mptrain.report.inspect.terminal import share_text
from mptrain.report.wording import percent, scale_text
from mptrain.telemetry.histogram import Histogram, Histograms

OPEN = 6  # tensors drawn open; the others unfold
HEADS = ("saturated", "flushed", "subnormal", "room")
STYLE = """
:root { color-scheme: light; }
body { font: 14px/1.45 system-ui, Segoe UI, Helvetica, Arial, sans-serif; color: #222; background: #fff;
       max-width: 1000px; margin: 24px auto; padding: 0 16px; }
h1 { font-size: 20px; margin: 0 0 4px; overflow-wrap: anywhere; } h2 { font-size: 16px; margin: 28px 0 6px; }
p { margin: 4px 0 10px; max-width: 80ch; }
details { border-top: 1px solid #ddd; padding: 4px 0; break-inside: avoid; }
summary { cursor: pointer; padding: 3px 0; overflow-wrap: anywhere; } summary b { margin-right: .6em; }
.role { color: #555; margin-right: .6em; } .figures { color: #555; }
.bad { color: #a33f00; font-weight: 600; } 
.key { display: inline-block; width: 4px; height: 11px; margin: 0 6px 0 0;
       print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.wide { overflow-x: auto; } svg { max-width: 100%; height: auto; display: block; }
@media print { body { max-width: none; margin: 0; font-size: 11px; } .wide { overflow: visible; } }
"""


def page(tensors: Tensors, rows: list[Row]) -> str:
    """The whole HTML text. ValueError if the record holds no histograms."""
    histograms = tensors.histograms
    if histograms is None:
        raise ValueError(f"{tensors.title} holds no histograms to draw")
    roles = [*dict.fromkeys(role for _, role, _ in tensors.rows)]
    cast = any(row.used for row in rows)
    body = [f"<h1>{escape(tensors.title)}</h1>", *(f"<p>{escape(note)}</p>" for note in tensors.notes)]
    body += ["<h2>Where the magnitudes lie</h2>", f"<p>{_heat_legend(cast)}</p>"]
    body += [_heat_map(tensors, histograms, rows, role, len(roles)) for role in roles]
    body += [f"<h2>{len(rows)} tensors, worst first</h2>", f"<p>{_legend(cast)}</p>"]
    for place, row in enumerate(rows):
        body.append(_tensor(row, histograms.row(row.index), open_=place < OPEN))
    head = f"<meta charset='utf-8'><title>{escape(tensors.title)}</title><style>{STYLE}</style>"
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{''.join(body)}</body></html>\n"


def _heat_map(tensors: Tensors, histograms: Histograms, rows: list[Row], role: str, roles: int) -> str:
    keep = [i for i, row in enumerate(tensors.rows) if row[1] == role]
    known = {row.index: row for row in rows}
    labels = [tensors.rows[i][0] for i in keep]
    used = [next((band for band in bands_of(known[i]) if band.used), None) for i in keep]
    marks = [(lower(band), upper(band)) if band else None for band in used]
    drawn = heat_map_svg(labels, Histograms(histograms.counts[keep], histograms.amax[keep]), marks)
    opened = " open" if len(labels) <= 60 and roles <= 8 else ""
    count = f"{len(labels)} tensor{'s' if len(labels) > 1 else ''}"
    summary = f"<summary><b>{escape(role)}</b><span class='figures'>{count}</span></summary>"
    return f"<details{opened}>{summary}<div class='wide'>{drawn}</div></details>"


def _tensor(row: Row, histogram: Histogram, *, open_: bool) -> str:
    summary = f"<b>{escape(row.layer)}</b><span class='role'>{escape(row.role)}</span>{_figures(row)}"
    drawn = histogram_svg(histogram, bands_of(row), HEADS)
    return f"<details{' open' if open_ else ''}><summary>{summary}</summary><div class='wide'>{drawn}</div></details>"


def _figures(row: Row) -> str:
    """The figures of a summary line: words beside colours, so that nothing hangs on the colour."""
    words = []
    used = row.used
    bad = row.inf + row.nan
    if bad:
        words.append(f"<span class='bad'>{bad:,} Inf or NaN</span>")
    if used and used.elements:
        lost = ((used.saturated or 0) + (used.flushed or 0)) / used.elements
        kinds = f"saturated {percent((used.saturated or 0) / used.elements)} %, "
        kinds += f"flushed {percent((used.flushed or 0) / used.elements)} %"
        words.append(f"<span class='bad'>{kinds}</span>" if lost >= 0.01 else kinds)
    if used and used.sqnr_db is not None:
        words.append("SQNR exact" if math.isinf(used.sqnr_db) else f"SQNR {used.sqnr_db:.1f} dB")
    if row.elements:
        words.append(f"{row.elements:,} elements, amax {row.amax:.3g}")
        if row.zeros:
            words.append(f"{percent(row.zeros / row.elements)} % zeros")
    if row.lost and row.lost.asked:
        words.append(f"updates lost in BF16 {percent(row.lost.bf16 / row.lost.asked)} %")
    return f"<span class='figures'>{' · '.join(words)}</span>"


def bands_of(row: Row) -> list[Band]:
    """The cast of the run first, then every judged format at its scale."""
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


def _cells(judged: Judged) -> list[str]:
    shares = [share_text(share) for share in (judged.saturated, judged.flushed, judged.subnormal)]
    return [*shares, _room(judged.headroom_bits)]


def _scale(scale: float) -> str:
    mantissa, exponent = math.frexp(scale)
    return f"2{superscript(exponent - 1)}" if mantissa == 0.5 else scale_text(scale)


def _room(bits: float | None) -> str:
    return "-" if bits is None or math.isinf(bits) else f"{round(bits, 1) + 0.0:.1f} bits"


def _named(fmt: Format) -> str:
    return fmt.name.partition("_")[2].upper() or fmt.name.upper()


def _heat_legend(cast: bool) -> str:
    marks = (
        f"</p><p><span class='key' style='background:{BAD}'></span>ends of the range of the format that the run "
        "cast to, at its scale: magnitudes left of the first become 0, right of the second they saturate."
    )
    return (
        "One line a layer, one column a power of two, zeros apart; the darker, the larger the share of the layer's "
        f"elements. A name in orange: Inf or NaN among them.{marks if cast else ''}"
    )


def _legend(cast: bool) -> str:
    return (
        "Each histogram shows the share of elements per power of two (square-root axis). The bars below it, on the "
        "same axis, are what a format can hold at the largest power-of-two scale at which nothing saturates (BF16: "
        "unscaled): dark for normal numbers, light for subnormal ones, arrows where it continues; dashed lines show "
        f"where each starts to flush to 0. {'Hatched: lost in the cast of the run. ' if cast else ''}A range such as "
        "17-18% means that the bins bound the share without deciding it."
    )

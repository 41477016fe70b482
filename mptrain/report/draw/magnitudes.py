"""Histograms and heat maps as SVG: no library, no script, no network; for the HTML report and other sinks.

Colours are Okabe and Ito's, distinct for colour-blind readers, and the sequential blue prints as grey; what is lost
is hatched as well as coloured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from mptrain.formats import Format
from mptrain.kernels.bins import INF, N_MAGNITUDES, NAN, ZERO, edges
from mptrain.report.draw.svg import BAD, COLOURS, GREY, INK, blue, line, rect, superscript, svg, text
from mptrain.telemetry.histogram import Histogram, Histograms

MOST_OCTAVES = 44  # drawn below the largest magnitude: FP16 normal and subnormal are 40
LOWEST = -140  # log2 at which the bin that starts at 0 is drawn


class Band(NamedTuple):
    """One line under a histogram: the range of ``format`` at ``scale``, its label, and its figures."""

    label: str
    format: Format
    scale: float
    figures: Sequence[str] = ()
    used: bool = False

    @property
    def colour(self) -> str:
        return COLOURS.get(self.format.name, INK)


class Box(NamedTuple):
    """A plot's place in pixels and the log2 magnitudes at its left and right."""

    left: float
    top: float
    width: float
    height: float
    low: float
    high: float

    def x(self, log2: float) -> float:
        """Return pixels, held inside the plot."""
        part = (log2 - self.low) / (self.high - self.low)
        return self.left + self.width * min(1.0, max(0.0, part))

    @property
    def bottom(self) -> float:
        return self.top + self.height


def histogram_svg(histogram: Histogram, bands: Sequence[Band], heads: Sequence[str] = ()) -> str:
    """Draw the magnitudes of one tensor over the ranges of the formats in ``bands``; x: log2, y: square root of
    density.

    Values that the bands marked ``used`` would flush or saturate are hatched. ``heads`` name the figures next to
    the bands.
    """
    low, high = window(histogram, bands)
    plot = Box(150, 16, 420, 130, low, high)
    pitch = 17
    height = plot.bottom + 34 + pitch * (len(bands) + 1)
    parts = [*_x_axis(plot, plot.bottom), *_density(histogram, plot)]
    for band in bands:
        parts += _lost(plot, band) if band.used else _guide(plot, band)
    top = plot.bottom + 34
    parts += [text(590 + 88 * i, top, head, size=11, fill=GREY) for i, head in enumerate(heads)]
    for index, band in enumerate(bands):
        parts += _band(plot, band, top + 8 + pitch * index)
    return svg(590 + 88 * len(heads), height, parts)


def window(histogram: Histogram, bands: Sequence[Band]) -> tuple[float, float]:
    """Return the log2 magnitudes to draw: all of the tensor's, and the ends of the narrow formats, in at most 46
    octaves."""
    start, amax = histogram.span
    if not amax:
        return -12.0, 4.0
    top = math.ceil(math.log2(amax))
    ends = [band for band in bands if band.used or band.format.value.bits <= 8]
    low = min([math.log2(max(start, 2.0**LOWEST)), *(lower(band) for band in ends)])
    high = max([top, *(upper(band) for band in ends)])
    high = min(high, top + 12)
    return math.floor(max(low, high - MOST_OCTAVES)) - 1.0, math.ceil(high) + 1.0


def lower(band: Band) -> float:
    """Return log2 of the magnitude up to which everything is flushed."""
    return math.log2(band.format.value.underflow_at / band.scale)


def upper(band: Band) -> float:
    return math.log2(band.format.value.overflow_at / band.scale)


def heat_map_svg(
    labels: Sequence[str], histograms: Histograms, marks: Sequence[tuple[float, float] | None] = ()
) -> str:
    """Draw one line per tensor, one column per power of two, darker for a larger share of the elements (square root).

    The separate column counts zeros; a label in orange has Inf or NaN. ``marks``: for each row the log2 magnitudes at
    which a format's range starts and ends, drawn as orange bars. ValueError if there is no row.
    """
    if not labels:
        raise ValueError("a heat map needs at least one row")
    octaves, whole = histograms.octaves(), histograms.elements.clamp(min=1)
    used = octaves.sum(0).nonzero().flatten()
    first, last = (int(used[0]), int(used[-1])) if len(used) else (127, 128)
    first = max(first, last - 63)  # only BF16 and FP32 hold 2^-63 of the largest as well
    columns, height = last - first + 1, 15 if len(labels) <= 60 else 10
    left = 60 + (6.4 if height == 15 else 5.8) * max(map(len, labels))
    plot = Box(left, 6, min(18.0, 760 / columns) * columns, height * len(labels), first - 127.0, last - 126.0)
    shares = (octaves[:, first : last + 1] / whole[:, None]).tolist()
    zeros = (histograms.counts[:, ZERO] / whole).tolist()
    bad = histograms.counts[:, [INF, NAN]].sum(1).tolist()
    parts = [_outline(plot), text(left - 29, plot.bottom + 18, "0", anchor="middle")]
    for index, label in enumerate(labels):
        y = plot.top + index * height
        fill = BAD if bad[index] else INK
        parts.append(text(left - 42, y + height * 0.75, label, size=min(11, height), anchor="end", fill=fill))
        parts.append(_cell(left - 36, y, 14, height, zeros[index], f"{label}: {zeros[index]:.3%} zeros"))
        parts += _cells(plot, y, height, shares[index], label)
        parts += _marks(plot, y, height, marks[index] if marks else None)
    return svg(plot.left + plot.width + 20, plot.bottom + 34, [*parts, *_x_axis(plot, plot.bottom)])


def _cells(plot: Box, y: float, height: float, row: list[float], label: str) -> list[str]:
    width, low = plot.width / len(row), round(plot.low)
    places = [(low + i, plot.left + i * width, share) for i, share in enumerate(row) if share]
    tip = "{}: {:.3%} in 2{} .. 2{}"
    return [
        _cell(x, y, width, height, share, tip.format(label, share, superscript(e), superscript(e + 1)))
        for e, x, share in places
    ]


def _cell(x: float, y: float, width: float, height: float, share: float, tip: str) -> str:
    return rect(x, y, width, height, f"fill='{blue(math.sqrt(share / 0.5))}'", tip)


def _marks(plot: Box, y: float, height: float, ends: tuple[float, float] | None) -> list[str]:
    inside = [end for end in ends or () if plot.low < end < plot.high]
    return [line(plot.x(end), y + 1, plot.x(end), y + height - 1, BAD, 2.2) for end in inside]


def _density(histogram: Histogram, plot: Box) -> list[str]:
    """Draw the outline of the histogram: share of elements per octave, on a square-root axis with its ticks."""
    counts = histogram.counts[:N_MAGNITUDES]
    used = counts.nonzero().flatten().tolist()
    if not used:
        return [_outline(plot), text(plot.left + plot.width / 2, plot.top + 60, "no magnitudes", anchor="middle")]
    ends = [math.log2(end) if end > 0 else float(LOWEST) for end in edges()[used[0] : used[-1] + 2].tolist()]
    whole = max(1, histogram.elements)
    drawn = counts[used[0] : used[-1] + 1].tolist()
    heights = [n / whole / (b - a) for n, a, b in zip(drawn, ends[:-1], ends[1:], strict=True)]
    top = max(heights)

    def y(value: float) -> float:
        return plot.bottom - (plot.height - 6) * math.sqrt(value / top)

    path = [f"M{plot.x(ends[0]):.1f} {plot.bottom:.1f}"]
    for height, end in zip(heights, ends[1:], strict=True):
        path.append(f"V{y(height):.1f}H{plot.x(end):.1f}")
    path.append(f"V{plot.bottom:.1f}Z")
    return [*_y_ticks(plot, top, y), f"<path d='{''.join(path)}' fill='#9ecae1' stroke='#3182bd' stroke-width='.7'/>"]


def _y_ticks(plot: Box, top: float, y: Callable[[float], float]) -> list[str]:
    parts = [_outline(plot)]
    ticks = [tick for tick in (0.001, 0.01, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6) if 0.01 * top < tick <= top]
    for tick in ticks:
        parts.append(line(plot.left, y(tick), plot.left + plot.width, y(tick), "#dddddd", 0.7))
        parts.append(
            text(plot.left - 6, y(tick) + 4, f"{tick:.3g}".lstrip("0") if tick < 1 else f"{tick}", anchor="end")
        )
    place = f"{plot.left - 44:.0f} {plot.top + plot.height / 2:.0f}"
    name = text(0, 0, "share per octave", anchor="middle", fill=GREY)
    return [*parts, f"<g transform='translate({place}) rotate(-90)'>{name}</g>"]


def _x_axis(plot: Box, y: float) -> list[str]:
    """Draw powers of two under a plot, every 1, 2, 4 or 8 octaves."""
    step = next(s for s in (1, 2, 4, 8, 16, 32) if (plot.high - plot.low) / s <= max(2.0, plot.width / 34))
    parts = []
    for exponent in range(math.ceil(plot.low / step) * step, math.floor(plot.high) + 1, step):
        x = plot.x(exponent)
        parts.append(line(x, y, x, y + 4, INK, 0.8))
        parts.append(text(x, y + 18, f"2{superscript(exponent)}", size=12, anchor="middle"))
    return parts


def _lost(plot: Box, band: Band) -> list[str]:
    """Draw hatched regions outside the range of the format in use, with a line at either end."""
    parts = []
    for start, end, at in ((plot.low, lower(band), lower(band)), (upper(band), plot.high, upper(band))):
        left, right = plot.x(start), plot.x(end)
        if right > left:
            parts.append(rect(left, plot.top, right - left, plot.height, "fill='url(#hatch)'"))
        if plot.low < at < plot.high:
            parts.append(line(plot.x(at), plot.top - 4, plot.x(at), plot.bottom, band.colour, 1.6))
    return parts


def _guide(plot: Box, band: Band) -> list[str]:
    """Draw a thin dashed line through the histogram where a format starts to flush."""
    at = lower(band)
    if not plot.low < at < plot.high:
        return []
    return [line(plot.x(at), plot.top, plot.x(at), plot.bottom, band.colour, 1.1, "4 3")]


def _band(plot: Box, band: Band, y: float) -> list[str]:
    """Draw a bar over the format's range: dark where numbers are normal, light where they are subnormal."""
    spec = band.format.value
    start, end = lower(band), upper(band)
    normal = start if spec.integer else math.log2(spec.min_normal / band.scale)
    thick = "bold" if band.used else "normal"
    parts = [text(plot.left - 8, y + 10, band.label, anchor="end", weight=thick)]
    for a, b, opacity in ((start, normal, 0.35), (normal, end, 0.9)):
        left, right = plot.x(a), plot.x(b)
        if right > left:
            parts.append(rect(left, y + 1, right - left, 11, f"fill='{band.colour}' fill-opacity='{opacity}'"))
    for at, arrow, shift in ((start, "◂", 4.0), (end, "▸", -4.0)):
        if not plot.low <= at <= plot.high:
            parts.append(text(plot.x(at) + shift, y + 10, arrow, anchor="middle", fill="#ffffff"))
    parts += [text(590 + 88 * i, y + 10, value, weight=thick) for i, value in enumerate(band.figures)]
    return parts


def _outline(plot: Box) -> str:
    return rect(plot.left, plot.top, plot.width, plot.height, "fill='none' stroke='#bbbbbb' stroke-width='.7'")

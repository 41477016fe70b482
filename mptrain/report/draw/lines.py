"""Curves over training steps as SVG: losses, and their differences from the baseline's.

Every curve ends in its label, on the right; a curve that leaves the plot (it diverged) ends in an arrow there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

from mptrain.report.compare.comparison import Curve
from mptrain.report.draw import axes
from mptrain.report.draw.axes import Axis, Style
from mptrain.report.draw.svg import GREY, INK, line, rect, svg, text

LEFT, TOP, HEIGHT, WHOLE = 62.0, 26.0, 290.0, 960.0  # the plot and its labels are WHOLE pixels wide
PITCH = 15.0  # distance of the labels
BAND_REACH = 0.5  # most that a band may add to a plot on either side, in spans of the curves
MOST_SHADED = 6  # most curves with shaded extremes: more would be illegible
SHADED = "fill='#b9b9b9' fill-opacity='.55'"  # the band
Point = tuple[float, float]


class Series(NamedTuple):
    """``outside``: the step from which it is outside the band, None if never.

    A series that is not ``steady`` (it diverged) does not count for the range of the axis, unless all have diverged.
    """

    label: str
    curve: Curve
    style: Style
    outside: int | None = None
    steady: bool = True


def lines_svg(series: Sequence[Series], *, name: str, band: Curve | None = None, band_name: str = "band") -> str:
    """Draw curves over steps, with the ``band`` shaded; logarithmic if the values span more than a factor of ten.

    ValueError if no series has a finite value.
    """
    finite = [one for one in series if _finite(one.curve.values)]
    if not finite:
        raise ValueError("no curve has a finite value")
    values = _range_of(finite, band)
    log = min(values) > 0 and max(values) > 10 * min(values)
    bottom = TOP + max(HEIGHT, PITCH * (len(finite) + 1))
    y = axes.value_axis(min(values), max(values), bottom, TOP, log=log)
    return _plot(finite, y, band, f"{name}{', logarithmic' if log else ''}", band_name, axes.number)


def difference_svg(series: Sequence[Series], *, name: str, noise: Curve | None = None, band_name: str = "noise") -> str:
    """Draw relative differences in percent around 0, with the ``noise`` shaded. ValueError if no value is finite."""
    finite = [one._replace(curve=_scaled(one.curve, 100.0)) for one in series if _finite(one.curve.values)]
    if not finite:
        raise ValueError("no curve has a finite value")
    shaded = _scaled(noise, 100.0) if noise else None
    values = _middle(finite, shaded)
    bottom = TOP + max(HEIGHT, PITCH * (len(finite) + 1))
    y = axes.value_axis(min(values), max(values), bottom, TOP)
    return _plot(finite, y, shaded, name, band_name, _percent, zero=True)


def tail(curve: Curve, first: int) -> Curve:
    """Return the curve from step ``first`` on."""
    indices = [index for index, step in enumerate(curve.steps) if step >= first]
    parts = [[column[index] for index in indices] if column else [] for column in (curve.values, curve.low, curve.high)]
    return Curve([curve.steps[index] for index in indices], *parts)


def _plot(
    series: list[Series],
    y: Axis,
    band: Curve | None,
    name: str,
    band_name: str,
    form: Callable[[float, float], str],
    *,
    zero: bool = False,
) -> str:
    right, bottom = WHOLE - 58 - max(axes.text_width(one.style.name) for one in series), y.start
    steps = [step for one in series for step in (one.curve.steps[0], one.curve.steps[-1])]
    x = axes.step_axis(steps, LEFT, right)
    parts = [text(LEFT - 6, 13, name, fill=GREY), *axes.y_grid(y, LEFT, right, form)]
    legend: list[tuple[str, str]] = []
    if band and band.low and _finite(band.low):
        parts.append(_area(band, x, y, f"{SHADED} class='band'"))
        legend.append((rect(0, -9, 22, 10, SHADED), band_name))
    if zero:
        parts.append(line(LEFT, y.at(0.0), right, y.at(0.0), INK, 1.1))
    parts += [_curve(one, index, len(series), x, y) for index, one in reversed(list(enumerate(series)))]
    if any(_outside(one, x, y) for one in series):
        parts += [_outside(one, x, y) for one in series]
        ring = f"<circle cx='11' cy='-4' r='6' fill='none' stroke='{INK}' stroke-width='1.4'/>"
        legend.append((ring, "leaves the band here"))
    parts += axes.x_grid(x, bottom)
    parts += _end_labels(series, x, y)
    parts += _legend(legend, bottom + 50)
    return svg(WHOLE, bottom + (62 if legend else 42), parts)


def _curve(one: Series, index: int, count: int, x: Axis, y: Axis) -> str:
    curve, style = one.curve, one.style
    parts = []
    if curve.low and _finite(curve.low) and count <= MOST_SHADED:
        parts.append(_area(curve, x, y, f"fill='{style.colour}' fill-opacity='.13' class='extremes'"))
    pieces = clipped(_points(curve, x, y), y.end, y.start)
    path = "".join(_path(piece) for piece in pieces)
    parts.append(axes.curve(path, style))
    inside = [p for p in _points(curve, x, y) if p and y.end <= p[1] <= y.start]
    many = 5 if count <= 6 else 3
    for place in range(many if len(inside) >= 2 * many else 0):
        at = inside[int((place + (index + 0.5) / count) / many * len(inside))]
        parts.append(axes.marker(style.shape, *at, 3.0, style.colour))
    left_at = _exit(pieces, _points(curve, x, y), y)
    if left_at:
        parts.append(axes.marker("triangle" if left_at[1] <= y.end else "down", *left_at, 5.0, style.colour))
    return axes.group_of(parts, _tip(one), f"data-series='{escape(one.label)}'")


def _tip(one: Series) -> str:
    finite = [(s, v) for s, v in zip(one.curve.steps, one.curve.values, strict=True) if math.isfinite(v)]
    last = f"{finite[-1][1]:.5g} at step {finite[-1][0]:,}"
    outside = "" if one.outside is None else f", outside the band from step {one.outside:,}"
    return f"{one.label}: {last}{outside}"


def _outside(one: Series, x: Axis, y: Axis) -> str:
    """Draw a ring where the curve leaves the band for good, empty if it never does."""
    if one.outside is None:
        return ""
    pairs = zip(one.curve.steps, one.curve.values, strict=True)
    after = [(step, value) for step, value in pairs if step >= one.outside and math.isfinite(value)]
    if not after or not x.holds(after[0][0]) or not y.holds(after[0][1]):
        return ""
    ring = f"<circle class='outside' cx='{x.at(after[0][0]):.1f}' cy='{y.at(after[0][1]):.1f}' r='6' fill='none'"
    tip = f"{one.label}: outside the band from step {one.outside:,}"
    return axes.group_of([f"{ring} stroke='{INK}' stroke-width='1.4'/>"], tip)


def _end_labels(series: list[Series], x: Axis, y: Axis) -> list[str]:
    """Draw the labels in the order of the curves' ends; a line leads to those of curves that reach the plot's right."""
    right = x.end
    ends = [[p for p in _points(one.curve, x, y) if p][-1] for one in series]
    heights = [min(max(end[1], y.end), y.start) for end in ends]
    places = axes.spread(heights, PITCH, y.end, y.start)
    labels = []
    for one, end, at, place in zip(series, ends, heights, places, strict=True):
        parts = []
        if end[0] > right - 8 and y.end <= end[1] <= y.start:
            parts.append(line(end[0], at, right + 18, place, one.style.colour, 0.7))
        label = axes.group_of([*parts, *axes.end_label(right, place, one.style)], one.label)
        labels.append(label)
    return labels


def _legend(entries: list[tuple[str, str]], y: float) -> list[str]:
    parts, x = [], LEFT
    for symbol, words in entries:
        parts.append(f"<g transform='translate({x:.1f} {y:.1f})'>{symbol}{text(28, 0, words)}</g>")
        x += 52 + axes.text_width(words)
    return parts


def clipped(points: Sequence[Point | None], top: float, bottom: float) -> list[list[Point]]:
    """Return the pieces of the line within ``top`` and ``bottom`` (pixels), cut where it crosses; None is a gap."""
    pieces: list[list[Point]] = [[]]
    before: Point | None = None
    for point in points:
        if before and point:
            ends = _within(before, point, top, bottom)
            if ends and pieces[-1] and pieces[-1][-1] == ends[0]:
                pieces[-1].append(ends[1])
            elif ends:
                pieces.append(list(ends))
        elif point and top <= point[1] <= bottom:
            pieces.append([point])
        before = point
    return [piece for piece in pieces if piece]


def _within(a: Point, b: Point, top: float, bottom: float) -> tuple[Point, Point] | None:
    """Return the part of the segment from ``a`` to ``b`` between two heights, None if there is none."""
    if max(a[1], b[1]) < top or min(a[1], b[1]) > bottom:
        return None

    def cut(point: Point, other: Point) -> Point:
        edge = min(max(point[1], top), bottom)
        if edge == point[1]:
            return point
        return (point[0] + (edge - point[1]) / (other[1] - point[1]) * (other[0] - point[0]), edge)

    return cut(a, b), cut(b, a)


def _exit(pieces: list[list[Point]], points: Sequence[Point | None], y: Axis) -> Point | None:
    """Return where the curve leaves the plot for good (its start, if it was never inside), None if it ends inside."""
    if not pieces:
        first = next(point for point in points if point)
        return (first[0], min(max(first[1], y.end), y.start))
    last = pieces[-1][-1]
    return last if last[1] in (y.end, y.start) else None


def _path(piece: list[Point]) -> str:
    start = f"M{piece[0][0]:.1f} {piece[0][1]:.2f}"
    return start + ("".join(f"L{px:.1f} {py:.2f}" for px, py in piece[1:]) or "h1.5")


def _area(curve: Curve, x: Axis, y: Axis, attributes: str) -> str:
    """Draw the band of a curve, held inside the plot; in pieces where an edge is not known."""
    pieces: list[list[tuple[float, float, float]]] = [[]]
    for step, low, high in zip(curve.steps, curve.low, curve.high, strict=True):
        if math.isfinite(low) and math.isfinite(high) and x.holds(step):
            bottom, top = (min(max(_at(y, value), y.end), y.start) for value in (low, high))
            pieces[-1].append((x.at(step), bottom, top))
        elif pieces[-1]:
            pieces.append([])
    outlines = []
    for piece in filter(None, pieces):
        there = "L".join(f"{px:.1f} {lo:.1f}" for px, lo, _ in piece)
        back = "L".join(f"{px:.1f} {hi:.1f}" for px, _, hi in reversed(piece))
        outlines.append(f"M{there}L{back}Z")
    return f"<path {attributes} d='{''.join(outlines)}' stroke='none'/>"


def _points(curve: Curve, x: Axis, y: Axis) -> list[Point | None]:
    pairs = zip(curve.steps, curve.values, strict=True)
    return [(x.at(step), _at(y, value)) if math.isfinite(value) else None for step, value in pairs]


def _at(y: Axis, value: float) -> float:
    """Return pixels; values that a logarithmic axis cannot show are far below it."""
    return y.at(value) if not y.log or value > 0 else 10 * y.start


def _finite(values: Sequence[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def _range_of(series: Sequence[Series], band: Curve | None) -> list[float]:
    steady = [one for one in series if one.steady] or series
    values = [value for one in steady for value in _finite([*one.curve.values, *one.curve.low, *one.curve.high])]
    if not band:
        return values
    floor = 0.0 if min(values) >= 0 else -math.inf  # a loss is never below 0
    return values + [max(floor, value) for value in _near(values, [*band.low, *band.high])]


def _near(values: Sequence[float], band: Sequence[float]) -> list[float]:
    """Return the ends of a band, held within ``BAND_REACH`` times the span of the curves: with two seeds it is 30
    times as wide."""
    least, most = min(values), max(values)
    reach = BAND_REACH * (most - least)
    return [min(max(value, least - reach), most + reach) for value in _finite(band)]


def _middle(series: Sequence[Series], band: Curve | None) -> list[float]:
    """Return 0, the ends of the curves, and all but the 5 % furthest out on either side: the first steps would hide
    the rest."""
    steady = [one for one in series if one.steady] or series
    values = [0.0, *(_finite(one.curve.values)[-1] for one in steady)]
    for one in steady:
        values += _most(one.curve.values)
    return values + (_near(values, [*_most(band.low), *_most(band.high)]) if band else [])


def _most(values: Sequence[float]) -> list[float]:
    """Return all but the 5 % furthest out on either side."""
    ordered = sorted(_finite(values))
    cut = len(ordered) // 20
    return ordered[cut : len(ordered) - cut]


def _scaled(curve: Curve, factor: float) -> Curve:
    parts = [[factor * value for value in column] for column in (curve.values, curve.low, curve.high)]
    return Curve(curve.steps, *parts)


def _percent(tick: float, step: float) -> str:
    return "0 %" if abs(tick) < step / 1e3 else f"{'+' if tick > 0 else ''}{axes.number(tick, step)} %"

"""Common parts of a comparison's charts: axes with round ticks, distinct styles, labels that do not overlap.

Series differ in colour, dashes and marker at once, so that nothing is lost in grey print or to colour-blind readers.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import NamedTuple

from mptrain.report import wording
from mptrain.report.draw.svg import GREY, INK, line, text

# Okabe and Ito's without yellow, which is invisible on white. 7 colours, 6 dashes and 6 shapes: 42 differ in two.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#777777")
DASHES = ("8 3", "2.5 2.5", "10 3 2.5 3", "5 2", "14 4", "7 2.5 2 2.5 2 2.5")
SHAPES = ("circle", "square", "triangle", "diamond", "down", "cross")
GRID = "#e2e2e2"
LABEL = 26  # characters of a label in a figure; tooltip and tables show all of it
NARROW, BROAD = frozenset(" ijlftrI.,:;'|!()[]-"), frozenset("mwMW%@—…")


class Style(NamedTuple):
    """The style of one variant in every figure; ``name``: its label, short enough for all of them."""

    colour: str
    dashes: str
    shape: str
    name: str
    width: float = 1.7


def styles_of(labels: Sequence[str], baseline: int | None = None) -> list[Style]:
    """Return a style for every label; the one at the index ``baseline`` is black and solid."""
    styles, index = [], 0
    for place, name in enumerate(wording.brief(labels, LABEL)):
        if place == baseline:
            styles.append(Style(INK, "", "circle", name, 2.2))
            continue
        colour, dashes, shape = (of[index % len(of)] for of in (PALETTE, DASHES, SHAPES))
        styles.append(Style(colour, dashes, shape, name))
        index += 1
    return styles


class Axis(NamedTuple):
    """Values from ``low`` to ``high`` on pixels from ``start`` to ``end``; logarithmic if ``log`` (then low > 0)."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        part = ((math.log(value) if self.log else value) - low) / (high - low)
        return self.start + part * (self.end - self.start)

    def ticks(self, most: int = 6) -> list[float]:
        """Return round values within the axis, about ``most`` of them."""
        if not self.log:
            return round_ticks(self.low, self.high, most)
        octaves = math.log10(self.high / self.low)
        if octaves < 0.7:
            return round_ticks(self.low, self.high, most)
        leads = (1, 2, 5) if octaves < 3 else (1,)
        every = max(1, math.ceil(octaves / most))
        candidates = []
        for power in range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1):
            candidates += [lead * 10.0**power for lead in leads if power % every == 0]
        return [tick for tick in candidates if self.low <= tick <= self.high]

    def holds(self, value: float) -> bool:
        return math.isfinite(value) and self.low <= value <= self.high


def round_ticks(low: float, high: float, most: int) -> list[float]:
    """Return multiples of 1, 2 or 5 times a power of ten."""
    step = round_step((high - low) / most)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def round_step(least: float) -> float:
    power = 10.0 ** math.floor(math.log10(least))
    return next(lead * power for lead in (1, 2, 5, 10) if lead * power >= least * (1 - 1e-9))


def value_axis(low: float, high: float, start: float, end: float, *, log: bool = False) -> Axis:
    """Return an axis with a little room at both ends; a single value gets some around it."""
    if log:
        room = max(1.02, (high / low) ** 0.03)
        return Axis(low / room, high * room, start, end, log=True)
    room = 0.04 * (high - low) or 0.05 * abs(high) or 1.0
    return Axis(low - room, high + room, start, end)


def step_axis(steps: Iterable[int], start: float, end: float) -> Axis:
    """Make the axis from the first step of any series to the last; whole ticks."""
    all_steps = list(steps)
    low, high = min(all_steps), max(all_steps)
    return Axis(float(low), float(high if high > low else low + 1), start, end)


def step_ticks(axis: Axis) -> list[int]:
    return [round(tick) for tick in axis.ticks(7) if tick == round(tick)]


def number(tick: float, step: float) -> str:
    """Write as many decimals as the ticks' distance needs; powers of ten instead of many zeros."""
    if tick and not 1e-4 <= abs(tick) < 1e6:
        return f"{tick:.0e}".replace("e+0", "e").replace("e-0", "e-").replace("e+", "e")
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{round(tick, decimals) + 0.0:,.{decimals}f}"


def y_grid(axis: Axis, left: float, right: float, form: Callable[[float, float], str] = number) -> list[str]:
    """Draw a thin line and its value for every tick; the value's x is ``left`` minus 6."""
    ticks = axis.ticks()
    parts = []
    for index, tick in enumerate(ticks):
        near = ticks[index - 1] if index else ticks[1] if len(ticks) > 1 else 0.0
        y = axis.at(tick)
        parts.append(line(left, y, right, y, GRID, 0.8))
        parts.append(marked(text(left - 6, y + 4, form(tick, abs(tick - near) or 1.0), anchor="end"), "y-tick"))
    return parts


def x_grid(axis: Axis, y: float) -> list[str]:
    """Draw the steps under a plot whose bottom is ``y``."""
    parts = [line(axis.start, y, axis.end, y, INK, 0.8)]
    for tick in step_ticks(axis):
        x = axis.at(tick)
        parts.append(line(x, y, x, y + 4, INK, 0.8))
        parts.append(marked(text(x, y + 17, f"{tick:,}", anchor="middle"), "x-tick"))
    return [*parts, text((axis.start + axis.end) / 2, y + 32, "step", anchor="middle", fill=GREY)]


def marked(element: str, name: str) -> str:
    """Return ``element`` with a class, for tests and for scripts that read a figure."""
    tag, _, rest = element.partition(" ")
    return f"{tag} class='{name}' {rest}"


def marker(shape: str, x: float, y: float, size: float, colour: str, *, fill: str = "") -> str:
    """Draw a shape of ``size`` pixels from its middle to its rim, filled with its colour by default."""
    paint = f"fill='{fill or colour}' stroke='{colour}' stroke-width='1.2'"
    if shape == "circle":
        return f"<circle cx='{x:.1f}' cy='{y:.1f}' r='{size:.1f}' {paint}/>"
    if shape == "cross":
        side = f"{2 * size:.1f}"
        path = f"M{x - size:.1f} {y - size:.1f}l{side} {side}m0 -{side}l-{side} {side}"
        return f"<path d='{path}' fill='none' stroke='{colour}' stroke-width='2'/>"
    corners = {
        "square": ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
        "triangle": ((0, -1.15), (1.1, 0.85), (-1.1, 0.85)),
        "down": ((0, 1.15), (1.1, -0.85), (-1.1, -0.85)),
        "diamond": ((0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)),
    }[shape]
    points = " ".join(f"{x + size * dx:.1f},{y + size * dy:.1f}" for dx, dy in corners)
    return f"<polygon points='{points}' {paint}/>"


def sample(x: float, y: float, style: Style) -> str:
    """Draw a piece of line with its marker, 26 pixels wide, before a label."""
    stroke = line(x, y, x + 26, y, style.colour, style.width, style.dashes)
    return stroke + marker(style.shape, x + 13, y, 3.2, style.colour)


def end_label(right: float, y: float, style: Style) -> list[str]:
    """Draw a sample and the name of a series, right of a plot that ends at ``right``."""
    return [sample(right + 20, y, style), marked(text(right + 52, y + 4, style.name), "end")]


def curve(path: str, style: Style) -> str:
    stroke = f"stroke='{style.colour}' stroke-width='{style.width}' stroke-dasharray='{style.dashes or 'none'}'"
    return f"<path class='curve' d='{path}' fill='none' {stroke} stroke-linejoin='round'/>"


def group_of(parts: Iterable[str], tip: str, attributes: str = "") -> str:
    """Return elements with one tooltip."""
    return f"<g {attributes}><title>{escape(tip)}</title>{''.join(parts)}</g>"


def spread(targets: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Return places as near as possible to the ``targets`` (least squares), ``gap`` apart and within ``low`` and
    ``high``.

    ``high`` is exceeded only if they cannot all fit.
    """
    order = sorted(range(len(targets)), key=lambda index: targets[index])
    blocks: list[tuple[float, int]] = []  # mean of the wanted places less the gaps before them, and how many
    for place, index in enumerate(order):
        mean, size = targets[index] - place * gap, 1
        while blocks and blocks[-1][0] >= mean:
            before, many = blocks.pop()
            mean, size = (before * many + mean * size) / (many + size), many + size
        blocks.append((mean, size))
    top = max(low, high - gap * (len(targets) - 1))
    flat = [min(max(mean, low), top) for mean, size in blocks for _ in range(size)]
    places = [0.0] * len(targets)
    for place, index in enumerate(order):
        places[index] = flat[place] + place * gap
    return places


def text_width(words: str) -> float:
    """Return the pixels that the words may take at a size of 11, generously: the reader's font is not known."""
    return 11 * sum(_em(letter) for letter in words)


def _em(letter: str) -> float:
    if letter in NARROW:
        return 0.42
    if letter in BROAD or unicodedata.east_asian_width(letter) in "WF":
        return 1.05
    return 0.78 if letter.isupper() else 0.66

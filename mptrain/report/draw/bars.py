"""Horizontal bars as SVG: intervals of the differences, speed, memory by role.

One line per variant, with its full name in the tooltip.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

from mptrain.report import wording
from mptrain.report.compare.comparison import Interval, Memory, Speed, Variant
from mptrain.report.draw import axes
from mptrain.report.draw.axes import Axis, Style
from mptrain.report.draw.svg import GREY, INK, line, pattern, rect, svg, text

WHOLE, FIGURES, TOP, PITCH, THICK = 800.0, 190.0, 20.0, 24.0, 14.0  # FIGURES: pixels of the texts right of the bars
SHADE = "#b9b9b9"
WITHIN = f"fill='{SHADE}' fill-opacity='.45'"  # the margin
PIECE = f"stroke='{INK}' stroke-width='.6'"
# Ground colour and the pattern over it: distinct in grey print. Further roles share the last.
FILLS = (
    ("#0072b2", ""),
    ("#ffffff", "<path d='M0 6L6 0' stroke='#d55e00' stroke-width='1.6'/>"),
    ("#56b4e9", "<path d='M0 3H6' stroke='#ffffff' stroke-width='1.4'/>"),
    ("#ffffff", "<path d='M3 0V6' stroke='#009e73' stroke-width='1.8'/>"),
    ("#e69f00", "<circle cx='3' cy='3' r='1.2' fill='#ffffff'/>"),
    ("#ffffff", "<circle cx='3' cy='3' r='1.3' fill='#222222'/>"),
    ("#d9d9d9", ""),
    ("#ffffff", "<path d='M0 3H6M3 0V6' stroke='#cc79a7' stroke-width='1.2'/>"),
    ("#999999", "<path d='M0 0L6 6' stroke='#ffffff' stroke-width='1.4'/>"),
    ("#f0e442", "<path d='M0 6L6 0' stroke='#222222' stroke-width='0.9'/>"),
)


def intervals_svg(variants: Sequence[Variant], styles: Sequence[Style], key: str, margin: float | None) -> str:
    """Draw the difference to the baseline of each variant with its 95 % interval, around 0; the ``margin`` shaded.

    ``key``: the field of :class:`Loss` to draw. ValueError if no variant has one.
    """
    unit = "pt" if key == "top1_delta" else "%"
    rows = [(v, s, getattr(v.loss, key)) for v, s in zip(variants, styles, strict=True)]
    rows = [(v, s, interval) for v, s, interval in rows if interval is not None and math.isfinite(interval.mean)]
    if not rows:
        raise ValueError(f"no variant has a {key}")
    left = _left([style for _, style, _ in rows])
    reach = _reach([interval for _, _, interval in rows], margin)
    bottom = TOP + PITCH * len(rows)
    x = Axis(-reach, reach, left, WHOLE - FIGURES)
    parts = []
    if margin:
        wide = x.at(100 * margin) - x.at(-100 * margin)
        parts.append(rect(x.at(-100 * margin), TOP, wide, bottom - TOP, f"{WITHIN} class='margin'"))
    parts += [*_x_axis(x, bottom, unit), line(x.at(0), TOP, x.at(0), bottom, INK, 1.1)]
    for index, (variant, style, interval) in enumerate(rows):
        parts.append(_interval(variant, style, interval, x, TOP + PITCH * (index + 0.5), unit))
    if margin:
        parts += _key(left, bottom + 46, WITHIN, f"margin: {100 * margin:g} {unit}")
    return svg(WHOLE, bottom + (56 if margin else 30), parts)


def _reach(intervals: Iterable[Interval], margin: float | None) -> float:
    """Return half the axis in percent: all of the intervals, unless some are so wide that the others would be dots."""
    known = list(intervals)
    ends = [abs(100 * end) for i in known for end in (i.low, i.high) if math.isfinite(end)]
    most = 8 * max([100 * (margin or 0), *(abs(100 * i.mean) for i in known)])
    return 1.08 * (max([*(min(end, most) for end in ends), most / 8, 150 * (margin or 0)]) or 1.0)


def _interval(variant: Variant, style: Style, interval: Interval, x: Axis, y: float, unit: str) -> str:
    mean = 100 * interval.mean
    parts = [_name(style, x, y)]
    ends = [100 * end for end in (interval.low, interval.high)]
    if all(map(math.isfinite, ends)):
        low, high = (min(max(x.at(end), x.start), x.end) for end in ends)
        parts.append(line(low, y, high, y, style.colour, 2.4))
        for end, place in zip(ends, (low, high), strict=True):
            if x.holds(end):
                parts.append(line(place, y - 5, place, y + 5, style.colour, 2.0))
            else:
                parts.append(text(place, y + 4, "◂" if end < 0 else "▸", anchor="middle", fill=style.colour))
    if x.holds(mean):
        parts.append(axes.marker(style.shape, x.at(mean), y, 4.6, style.colour))
    parts.append(text(x.end + 10, y + 4, wording.delta(interval, unit)))
    return axes.group_of(parts, f"{variant.label}: {wording.delta(interval, unit)}, {interval.n} seeds", _row(variant))


def speed_svg(variants: Sequence[Variant], styles: Sequence[Style]) -> str:
    """Draw ratios to the baseline's speed with the seeds' extremes; no bar where the speed is an emulation's."""
    left, bottom = _left(styles), TOP + PITCH * len(variants)
    x = _ratios([r for v in variants for r in (v.speed.ratio, v.speed.ratio_high, v.speed.limit)], left)
    parts = [*_x_axis(x, bottom, "x"), line(x.at(1), TOP - 4, x.at(1), bottom, INK, 1.1, "3 2")]
    limits = False
    for index, (variant, style) in enumerate(zip(variants, styles, strict=True)):
        y = TOP + PITCH * (index + 0.5)
        row = [_name(style, x, y), *_speed(variant.speed, variant.emulated, style, x, y)]
        limits = limits or (variant.speed.limit is not None and not variant.emulated)
        parts.append(axes.group_of(row, _speed_tip(variant), _row(variant)))
    if limits:
        parts.append(_limit(left + 8, bottom + 42))
        parts.append(text(left + 28, bottom + 46, "the most that faster GEMMs alone could give (Amdahl)"))
    return svg(WHOLE, bottom + (56 if limits else 30), parts)


def _speed(speed: Speed, emulated: bool, style: Style, x: Axis, y: float) -> list[str]:
    if emulated:
        return [_instead("emulated", x, y)]
    if speed.ratio is None or not wording.known(speed.ratio):
        return [_instead("not measured", x, y)]
    paint = f"class='bar' fill='{style.colour}' fill-opacity='.85'"
    parts = [rect(x.start, y - THICK / 2, x.at(speed.ratio) - x.start, THICK, paint)]
    if speed.ratio_low is not None and speed.ratio_high is not None and speed.ratio_high > speed.ratio_low:
        low, high = x.at(speed.ratio_low), x.at(speed.ratio_high)
        parts += [line(low, y, high, y, "#ffffff", 3.4), line(low, y, high, y, INK, 1.4)]
        parts += [line(at, y - 4, at, y + 4, INK, 1.4) for at in (low, high)]
    if speed.limit is not None and wording.known(speed.limit):
        parts.append(_limit(x.at(speed.limit), y))
    words = wording.ratio(speed.ratio) + wording.span(speed.ratio_low, speed.ratio_high)
    return [*parts, text(x.end + 10, y + 4, words)]


def _instead(words: str, x: Axis, y: float) -> str:
    """Draw words in a bar's place, on a white ground."""
    ground = rect(x.start + 4, y - 8, axes.text_width(words) + 6, 16, "fill='#fff'")
    return ground + text(x.start + 8, y + 4, words, fill=GREY)


def _speed_tip(variant: Variant) -> str:
    speed = variant.speed
    limit = f", at most {wording.ratio(speed.limit)}" if speed.limit is not None else ""
    note = f" ({speed.note})" if speed.note else ""
    return f"{variant.label}: {'emulated' if variant.emulated else wording.ratio(speed.ratio) + limit}{note}"


def _limit(x: float, y: float) -> str:
    return axes.marker("diamond", x, y, 3.6, INK, fill="#ffffff")


class Stack(NamedTuple):
    """One bar of several pieces: its style, its label, the text behind it, and its parts."""

    drawn: Style
    label: str
    figures: str
    memory: Memory


def memory_svg(variants: Sequence[Variant], styles: Sequence[Style]) -> str:
    """Draw peaks in GiB, by role where they are known, with their ratio. ValueError if no variant has one."""
    rows = []
    for variant, style in zip(variants, styles, strict=True):
        memory = variant.memory
        if memory.peak_gib is not None and math.isfinite(memory.peak_gib):
            ratio = "" if memory.ratio is None else f", {wording.ratio(memory.ratio)}"
            rows.append(Stack(style, variant.label, f"{wording.gib(memory.peak_gib)} GiB{ratio}", memory))
    if not rows:
        raise ValueError("no variant has a peak of memory")
    return stacks_svg(rows)


def stacks_svg(rows: Sequence[Stack], limit_gib: float = 0.0) -> str:
    """Draw peaks in GiB by role; ``limit_gib``: the available memory, a line across."""
    left, bottom = _left([row.drawn for row in rows]), TOP + PITCH * len(rows)
    roles = list(dict.fromkeys(role for row in rows for role in row.memory.roles_gib))
    key = f"{zlib.crc32(repr([(row.label, row.memory) for row in rows]).encode()):08x}"  # ids are unique in a page
    most = max(limit_gib, *(max(r.memory.peak_gib or 0.0, sum(r.memory.roles_gib.values())) for r in rows))
    x = Axis(0.0, most or 1.0, left, WHOLE - FIGURES)
    parts = [_patterns(key), *_x_axis(x, bottom, " GiB")]
    for index, row in enumerate(rows):
        y = TOP + PITCH * (index + 0.5)
        drawn = [_name(row.drawn, x, y), *_stack(row.memory, roles, key, x, y), text(x.end + 10, y + 4, row.figures)]
        parts.append(axes.group_of(drawn, f"{row.label}: {row.figures}", f"data-variant='{escape(row.label)}'"))
    if limit_gib:
        parts.append(line(x.at(limit_gib), TOP - 6, x.at(limit_gib), bottom + 4, INK, 1.4, "4 2"))
    place, y = left, bottom + 46
    for index, role in enumerate(roles):
        if place + 50 + axes.text_width(role) > WHOLE:
            place, y = left, y + 18
        parts += _key(place, y, f"fill='{_fill(index, key)}' {PIECE}", role)
        place += 48 + axes.text_width(role)
    return svg(WHOLE, y + 10 if roles else bottom + 30, parts)


def _stack(memory: Memory, roles: Sequence[str], key: str, x: Axis, y: float) -> list[str]:
    """Draw one piece per role; what the roles do not explain of the peak stays empty."""
    parts, start = [], 0.0
    pieces = [(role, memory.roles_gib[role], _fill(roles.index(role), key)) for role in memory.roles_gib]
    rest = (memory.peak_gib or 0.0) - sum(memory.roles_gib.values())
    if rest > 0:
        pieces.append(("not attributed", rest, "#ffffff" if pieces else SHADE))
    for role, size, fill in pieces:
        wide, paint = x.at(start + size) - x.at(start), f"class='bar' fill='{fill}' {PIECE}"
        parts.append(rect(x.at(start), y - THICK / 2, wide, THICK, paint, f"{role}: {wording.gib(size)} GiB"))
        start += size
    return parts


def _patterns(key: str) -> str:
    patterns = [pattern(f"role{i}-{key}", f"fill='{ground}'", over) for i, (ground, over) in enumerate(FILLS)]
    return f"<defs>{''.join(patterns)}</defs>"


def _fill(index: int, key: str) -> str:
    return f"url(#role{min(index, len(FILLS) - 1)}-{key})"


def _left(styles: Sequence[Style]) -> float:
    return 22 + max(axes.text_width(style.name) for style in styles)


def _name(style: Style, x: Axis, y: float) -> str:
    return axes.marked(text(x.start - 10, y + 4, style.name, anchor="end"), "name")


def _row(variant: Variant) -> str:
    return f"data-variant='{escape(variant.label)}'"


def _ratios(values: Iterable[float | None], left: float) -> Axis:
    finite = [value for value in values if value is not None and math.isfinite(value)]
    return Axis(0.0, 1.05 * max([1.0, *finite]), left, WHOLE - FIGURES)


def _x_axis(x: Axis, bottom: float, unit: str) -> list[str]:
    ticks = x.ticks(5)
    step = ticks[1] - ticks[0] if len(ticks) > 1 else 1.0
    parts = [line(x.start, bottom, x.end, bottom, INK, 0.8)]
    for tick in ticks:
        parts.append(line(x.at(tick), TOP, x.at(tick), bottom, axes.GRID, 0.8))
        sign = "+" if x.low < 0 and tick > step / 1e3 else ""
        gap = " " if unit in ("%", "pt") else ""
        label = f"{sign}{axes.number(tick, step) if abs(tick) > step / 1e3 else '0'}{gap}{unit}"
        parts.append(axes.marked(text(x.at(tick), bottom + 17, label, anchor="middle"), "x-tick"))
    return parts


def _key(x: float, y: float, paint: str, words: str) -> list[str]:
    return [rect(x, y - 10, 22, 12, paint), text(x + 28, y, words)]

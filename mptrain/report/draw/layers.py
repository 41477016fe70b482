"""A map of underflow as SVG: layers by variants, darker where more of a tensor's elements became zero."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from mptrain.report import wording
from mptrain.report.compare.comparison import Variant
from mptrain.report.draw import axes
from mptrain.report.draw.axes import Style
from mptrain.report.draw.svg import BAD, GREY, INK, blue, rect, svg, text
from mptrain.report.wording import percent

LOWEST = 1e-6
PITCH, MOST = 15.0, 40
EDGE = "stroke='#cccccc' stroke-width='.5'"
NAME = 34  # characters of a layer and role
Place = tuple[str, str]  # layer, role


class Shown(NamedTuple):
    """Rows worst first, the number ``left_out``, and the cells by variant."""

    places: list[Place]
    left_out: int
    cells: Sequence[Mapping[Place, Mapping[str, Any]]]


def worst(variants: Sequence[Variant], most: int = MOST) -> Shown:
    """Sort (layer, role) by the most overflows in any variant, then by the share lost to zero."""
    cells = [{(str(r["layer"]), str(r["role"])): r for r in v.health.layers} for v in variants]
    places = list(dict.fromkeys(place for one in cells for place in one))

    def badness(place: Place) -> tuple[float, float]:
        rows = [one[place] for one in cells if place in one]
        return max(_overflow(row) for row in rows), max(_share(row) for row in rows)

    ordered = sorted(places, key=badness, reverse=True)
    return Shown(ordered[:most], max(0, len(ordered) - most), cells)


def layers_svg(variants: Sequence[Variant], styles: Sequence[Style], most: int = MOST) -> str:
    """Draw one line per (layer, role), one column per variant that counted its casts; ``▲``: overflow.

    ValueError if no variant did.
    """
    pairs = [(variant, style) for variant, style in zip(variants, styles, strict=True) if variant.health.layers]
    counted, heads = [variant for variant, _ in pairs], [style.name for _, style in pairs]
    if not counted:
        raise ValueError("no variant has counted casts")
    shown = worst(counted, most)
    names = wording.brief([f"{layer} {role}" for layer, role in shown.places], NAME)
    left = 16 + max(axes.text_width(name) for name in names)
    wide = 64.0 if len(counted) <= 8 else 26.0
    slant = max(axes.text_width(head) for head in heads) * 0.71
    top = 14 + slant
    parts = []
    for column, (variant, head) in enumerate(zip(counted, heads, strict=True)):
        x = left + wide * (column + 0.5)
        turned = f"<g transform='translate({x:.1f} {top - 6:.1f}) rotate(-45)'>{text(0, 0, head)}</g>"
        parts.append(axes.group_of([turned], variant.label))
    for row, (place, name) in enumerate(zip(shown.places, names, strict=True)):
        y = top + PITCH * row
        label = axes.marked(text(left - 8, y + 11, name, anchor="end"), "name")
        parts.append(axes.group_of([label], " ".join(place)))
        for column, (variant, one) in enumerate(zip(counted, shown.cells, strict=True)):
            parts.append(_cell(variant, place, one.get(place), left + wide * column, y, wide))
    right, bottom = left + wide * len(counted), top + PITCH * len(shown.places)
    parts += _legend(left, bottom + 14)
    return svg(max(right + slant + 8, left + 460, 780), bottom + 52, parts)


def shade(part: float) -> str:
    """Return white for 0; from light to dark blue over six decades, by the logarithm."""
    if part <= 0:
        return "#ffffff"
    return blue(0.12 + 0.88 * min(1.0, max(0.0, 1 - math.log10(part) / math.log10(LOWEST))))


def _cell(variant: Variant, place: Place, row: Mapping[str, Any] | None, x: float, y: float, wide: float) -> str:
    frame = x + 0.5, y + 0.5, wide - 1, PITCH - 1
    where = f"{variant.label}, {' '.join(place)}"
    if row is None:
        dot = text(x + wide / 2, y + 11, "·", anchor="middle", fill=GREY)
        return axes.group_of([rect(*frame, "fill='#f6f6f6'"), dot], f"{where}: not cast")
    part, over = _share(row), _overflow(row)
    parts = [rect(*frame, f"class='cell' fill='{shade(part)}' {EDGE}")]
    if over:
        parts.append(
            axes.marker("triangle", x + (10 if wide > 40 else wide / 2), y + PITCH / 2 + 1, 4.4, BAD, fill="#fff")
        )
    if wide > 40:
        ink = "#ffffff" if part > 3e-3 else INK
        parts.append(text(x + wide - 5, y + 11, f"{percent(part)} %", size=10, anchor="end", fill=ink))
    tip = f"{where}: {percent(part)} % became zero ({part:.3g}), {over:,} overflows"
    return axes.group_of(parts, tip, f"data-place='{escape(' '.join(place))}'")


def _legend(left: float, y: float) -> list[str]:
    parts = []
    for index, power in enumerate(range(-6, 1)):
        parts.append(rect(left + 38 * index, y, 38, 10, f"fill='{shade(10.0**power)}' {EDGE}"))
        name = f"{100 * 10.0**power:g} %" if power > -5 else f"{100 * 10.0**power:.0e} %".replace("e-0", "e-")
        parts.append(text(left + 38 * index + 19, y + 23, name, size=9, anchor="middle"))
    after = left + 38 * 7 + 16
    parts.append(axes.marker("triangle", after, y + 5, 4.4, BAD, fill="#fff"))
    return [*parts, text(after + 10, y + 9, "overflowed"), text(after + 84, y + 9, "· not cast", fill=GREY)]


def _share(row: Mapping[str, Any]) -> float:
    value = row.get("underflow_frac")
    return 0.0 if value is None or math.isnan(value) else float(value)


def _overflow(row: Mapping[str, Any]) -> int:
    return int(row.get("overflow_events") or 0)

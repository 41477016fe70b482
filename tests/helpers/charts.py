"""A chart's SVG read back: texts, axes, curves."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest

SVG = "{http://www.w3.org/2000/svg}"


def tree(svg):
    return ET.fromstring(svg)


def texts(svg, name=None):
    return [e for e in tree(svg).iter(f"{SVG}text") if name is None or e.get("class") == name]


def value_of(tick):
    """What a tick says: ``1,000``, ``+0.5 %``, ``2⁻³``, ``2.5x``, ``1e-4``."""
    said = tick.replace(",", "")
    if said.startswith("2") and (power := said[1:].translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789"))) != said[1:]:
        return float(power)
    return float(re.match(r"[-+]?[\d.]+(e-?\d+)?", said)[0])


def reader(svg, which, *, log=False):
    """Pixels -> value, by the first and last tick of an axis (``x-tick`` or ``y-tick``)."""
    side = which[0]
    ticks = [(float(e.get(side)), value_of(e.text)) for e in texts(svg, which)]
    lift = 4.0 if side == "y" else 0.0  # the words of a y tick stand a little below its line
    (a, va), (b, vb) = ticks[0], ticks[-1]
    assert a != b
    for place, value in ticks:  # and all between them agree
        part = (place - a) / (b - a)
        expected = va * (vb / va) ** part if log else va + part * (vb - va)
        assert value == pytest.approx(expected, rel=1e-2, abs=abs(vb - va) / 300)

    def value(pixels):
        part = (pixels + lift - a) / (b - a)
        return va * (vb / va) ** part if log else va + part * (vb - va)

    return value


def numbers_of(svg):
    """Every x and y at which something is drawn."""
    for e in tree(svg).iter():
        if e.tag in (f"{SVG}line",):
            yield float(e.get("x1")), float(e.get("y1"))
            yield float(e.get("x2")), float(e.get("y2"))
        elif e.tag == f"{SVG}circle" and e.get("class"):
            yield float(e.get("cx")), float(e.get("cy"))
        elif e.tag == f"{SVG}path" and e.get("class"):
            for pair in re.findall(r"(-?[\d.]+) (-?[\d.]+)", e.get("d")):
                yield float(pair[0]), float(pair[1])
        elif e.tag == f"{SVG}rect" and e.get("class"):
            yield float(e.get("x")), float(e.get("y"))
            yield float(e.get("x")) + float(e.get("width")), float(e.get("y")) + float(e.get("height"))


def assert_inside(svg):
    width, height = map(float, tree(svg).get("viewBox").split()[2:])
    places = list(numbers_of(svg))
    assert places
    for x, y in places:
        assert -0.1 <= x <= width + 0.1
        assert -0.1 <= y <= height + 0.1


def part(variant, place):
    return next(r["underflow_frac"] for r in variant.health.layers if (r["layer"], r["role"]) == place)

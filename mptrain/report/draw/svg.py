"""SVG primitives: lines, texts, rectangles, colours."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from html import escape

COLOURS = {
    "fp16": "#0072b2",
    "bf16": "#56b4e9",
    "fp8_e4m3": "#d55e00",
    "fp8_e5m2": "#e69f00",
    "fp4_e2m1": "#cc79a7",
    "int8": "#009e73",
    "int4": "#666666",
}
INK, GREY, BAD = "#222222", "#777777", "#d55e00"
BLUES = ((255, 255, 255), (158, 202, 225), (49, 130, 189), (8, 48, 107))  # from ColorBrewer, light to dark
FONT = "font-family='system-ui,Segoe UI,Helvetica,Arial,sans-serif'"


def blue(depth: float) -> str:
    """Return a colour between white (0) and dark blue (1 or more)."""
    place = min(1.0, depth) * (len(BLUES) - 1)
    at = min(int(place), len(BLUES) - 2)
    mixed = [round(a + (place - at) * (b - a)) for a, b in zip(BLUES[at], BLUES[at + 1], strict=True)]
    return "#{:02x}{:02x}{:02x}".format(*mixed)


def superscript(exponent: int) -> str:
    return str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def line(x1: float, y1: float, x2: float, y2: float, colour: str, width: float, dashes: str = "") -> str:
    dashed = f" stroke-dasharray='{dashes}'" if dashes else ""
    ends = f"x1='{x1:.1f}' y1='{y1:.1f}' x2='{x2:.1f}' y2='{y2:.1f}'"
    return f"<line {ends} stroke='{colour}' stroke-width='{width}'{dashed}/>"


def rect(x: float, y: float, width: float, height: float, paint: str, tip: str = "") -> str:
    """Return a rectangle with the attributes ``paint``, and a tooltip."""
    title = f"<title>{escape(tip)}</title>" if tip else ""
    return f"<rect x='{x:.2f}' y='{y:.1f}' width='{width:.2f}' height='{height:.1f}' {paint}>{title}</rect>"


def text(
    x: float, y: float, words: str, *, size: float = 11, anchor: str = "start", fill: str = INK, weight: str = "normal"
) -> str:
    place = f"x='{x:.1f}' y='{y:.1f}' font-size='{size}' text-anchor='{anchor}' fill='{fill}' font-weight='{weight}'"
    return f"<text {place}>{escape(words)}</text>"


def pattern(name: str, ground: str, over: str, more: str = "") -> str:
    """Return a pattern of 6 pixels: the paint of its ground, and the shapes over it."""
    shapes = f"<rect width='6' height='6' {ground}/>{over}"
    return f"<pattern id='{name}' width='6' height='6' patternUnits='userSpaceOnUse' {more}>{shapes}</pattern>"


def svg(width: float, height: float, parts: Iterable[str]) -> str:
    """Return a stand-alone SVG image, with the hatch pattern that marks lost values."""
    body = "".join(parts)
    name = f"hatch{zlib.crc32(body.encode()):08x}"  # unique in a page: a pattern in a folded part may not be found
    lines = f"<line x1='0' y1='0' x2='0' y2='6' stroke='{BAD}' stroke-width='1.6' stroke-opacity='.7'/>"
    hatch = pattern(name, f"fill='{BAD}' fill-opacity='.10'", lines, "patternTransform='rotate(45)'")
    size = f"width='{width:.0f}' height='{height:.0f}' viewBox='0 0 {width:.0f} {height:.0f}'"
    drawn = body.replace("#hatch", f"#{name}")
    return f"<svg xmlns='http://www.w3.org/2000/svg' {size} {FONT} role='img'><defs>{hatch}</defs>{drawn}</svg>"

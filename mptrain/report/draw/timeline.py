"""The loss scale over training with its events on the same axis: a lane per variant, a shape per kind of event."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any, NamedTuple

from mptrain.report.compare.comparison import Curve, Variant
from mptrain.report.draw import axes
from mptrain.report.draw.axes import Axis, Style
from mptrain.report.draw.svg import GREY, line, superscript, svg, text

LEFT, TOP, SCALES, PITCH, WHOLE = 62.0, 26.0, 150.0, 15.0, 960.0
ROW = 11.0  # height of a lane's row, one per kind of event
NEAR = 7.0  # pixels within which events of a kind merge into one mark


class Kind(NamedTuple):
    shape: str
    colour: str
    words: str


KINDS = {
    "skipped": Kind("cross", "#d55e00", "step skipped"),
    "scale_backed_off": Kind("down", "#0072b2", "scale backed off"),
    "scale_grew": Kind("triangle", "#009e73", "scale grew"),
    "alarm": Kind("diamond", "#222222", "alarm"),
}
OTHER = Kind("circle", "#777777", "other event")


def timeline_svg(variants: Sequence[Variant], styles: Sequence[Style]) -> str:
    """Draw scales (log2) over lanes of events. ValueError if no variant has a scale or an event."""
    pairs = list(zip(variants, styles, strict=True))
    scaled = [(v, s, v.health.scale) for v, s in pairs if v.health.scale and _logs(v.health.scale)]
    lanes = [(variant, style) for variant, style in pairs if variant.health.events]
    if not scaled and not lanes:
        raise ValueError("no variant has a loss scale or an event")
    steps = [step for _, _, scale in scaled for step in scale.steps]
    steps += [int(event["step"]) for variant, _ in lanes for event in variant.health.events]
    names = [style.name for v, style, _ in scaled] + [style.name for _, style in lanes]
    x = axes.step_axis(steps, LEFT, WHOLE - 58 - max(map(axes.text_width, names)))
    parts, top = _scales(scaled, x) if scaled else ([], TOP - 6)
    for variant, style in lanes:
        kinds = [kind for kind in [*KINDS, ""] if _of_kind(variant, kind)]
        height = ROW * len(kinds) + 6
        parts += _lane(variant, style.name, kinds, x, top)
        top += height
    parts += axes.x_grid(x, top)
    happened = [kind for kind in [*KINDS, ""] if any(_of_kind(variant, kind) for variant, _ in lanes)]
    parts += _legend(happened, top + 52)
    return svg(WHOLE, top + (64 if happened else 42), parts)


def _scales(scaled: Sequence[tuple[Variant, Style, Curve]], x: Axis) -> tuple[list[str], float]:
    """Return the upper panel, and the height at which the lanes may start."""
    powers = [power for _, _, scale in scaled for power in _logs(scale)]
    low, high = math.floor(min(powers)), math.ceil(max(powers))
    bottom = TOP + max(SCALES, PITCH * (len(scaled) + 1))
    y = Axis(low - 0.5, high + 0.5, bottom, TOP)
    parts = [text(LEFT - 6, 13, "loss scale", fill=GREY)]
    every = max(1, math.ceil((high - low) / 8))
    for power in range(low, high + 1, every):
        parts.append(line(LEFT, y.at(power), x.end, y.at(power), axes.GRID, 0.8))
        tick = text(LEFT - 6, y.at(power) + 4, f"2{superscript(power)}", anchor="end")
        parts.append(axes.marked(tick, "y-tick"))
    parts.append(line(LEFT, bottom, x.end, bottom, axes.GRID, 0.8))
    heights = [y.at(_logs(scale)[-1]) for _, _, scale in scaled]
    places = axes.spread(heights, PITCH, TOP, bottom)
    for (variant, style, scale), place in zip(scaled, places, strict=True):
        shapes = [axes.curve(_stairs(scale, x, y), style), *axes.end_label(x.end, place, style)]
        parts.append(axes.group_of(shapes, f"loss scale of {variant.label}", f"data-series='{escape(variant.label)}'"))
    return parts, bottom + 12


def _stairs(scale: Curve, x: Axis, y: Axis) -> str:
    """Return the path of a scale, which holds until the step that changes it; gaps where it is unknown."""
    path, open_ = [], False
    for step, value in zip(scale.steps, scale.values, strict=True):
        if not math.isfinite(value) or value <= 0:
            open_ = False
            continue
        at = y.at(math.log2(value))
        path.append(f"H{x.at(step):.1f}V{at:.2f}" if open_ else f"M{x.at(step):.1f} {at:.2f}h1")
        open_ = True
    return "".join(path)


def _lane(variant: Variant, name: str, kinds: Sequence[str], x: Axis, top: float) -> list[str]:
    height = ROW * len(kinds) + 6
    parts = [line(LEFT, top + height, x.end, top + height, axes.GRID, 0.8)]
    for row, what in enumerate(kinds):
        kind = KINDS.get(what, OTHER)
        y = top + 3 + ROW * (row + 0.5)
        for events in bunched(_of_kind(variant, what), x):
            middle = (x.at(int(events[0]["step"])) + x.at(int(events[-1]["step"]))) / 2
            mark = axes.marker(kind.shape, middle, y, 3.4, kind.colour)
            parts.append(axes.group_of([mark], _tip(variant, events), "class='event'"))
    label = axes.marked(text(x.end + 20, top + height / 2 + 4, name), "end")
    return [*parts, axes.group_of([label], variant.label)]


def _of_kind(variant: Variant, kind: str) -> list[dict[str, Any]]:
    """List events in the order of steps; an empty ``kind``: those without a mark of their own."""
    events = [e for e in variant.health.events if (e["event"] if e["event"] in KINDS else "") == kind]
    return sorted(events, key=lambda event: int(event["step"]))


def bunched(events: Iterable[dict[str, Any]], x: Axis) -> list[list[dict[str, Any]]]:
    """Group events so near each other that their marks would overlap."""
    bunches: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        bunches[int((x.at(int(event["step"])) - x.start) / NEAR)].append(event)
    return list(bunches.values())


def _tip(variant: Variant, events: Sequence[dict[str, Any]]) -> str:
    """Describe the first few events."""
    lines = [f"{variant.label}: {len(events)} events"] if len(events) > 1 else [variant.label]
    for event in events[:4]:
        where = " ".join(str(event[key]) for key in ("reason", "layer", "role") if event.get(key))
        seed = "" if event.get("seed") is None else f", seed {event['seed']}"
        scale = "" if event.get("scale") is None else f" to {event['scale']:g}"
        kind = KINDS[event["event"]].words if event["event"] in KINDS else str(event["event"])
        lines.append(f"step {int(event['step']):,}{seed}: {kind}{scale} {where}".rstrip())
    return "\n".join([*lines, *(["…"] if len(events) > 4 else [])])


def _legend(kinds: Sequence[str], y: float) -> list[str]:
    parts, left = [], LEFT
    for name in kinds:
        kind = KINDS.get(name, OTHER)
        parts += [axes.marker(kind.shape, left + 6, y - 4, 4.0, kind.colour), text(left + 16, y, kind.words)]
        left += 40 + axes.text_width(kind.words)
    return parts


def _logs(scale: Curve) -> list[float]:
    return [math.log2(value) for value in scale.values if math.isfinite(value) and value > 0]

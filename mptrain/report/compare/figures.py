"""The figures of a group of runs for the HTML report, each with its caption, or the sentence that replaces an empty
one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from mptrain.report.compare.comparison import Curve, Group, Kind, Variant
from mptrain.report.draw import axes
from mptrain.report.draw.axes import Style
from mptrain.report.draw.bars import intervals_svg, memory_svg, speed_svg
from mptrain.report.draw.layers import MOST, layers_svg, worst
from mptrain.report.draw.lines import MOST_SHADED, Series, difference_svg, lines_svg, tail
from mptrain.report.draw.timeline import timeline_svg

ROOM = 120  # characters for labels in a caption
KEYS = {"training loss": "train_delta", "top-1": "top1_delta"}  # else val_delta


class Figure(NamedTuple):
    """A figure as SVG with its caption; if ``drawn`` is empty, ``caption`` is the sentence in its place."""

    name: str
    title: str
    drawn: str
    caption: str


def figures(group: Group, margin: float) -> list[Figure]:
    """Return every figure of the group, or the sentence in its place."""
    styles = styles_of(group)
    shown = [_losses(group, styles), _late_losses(group, styles), _differences(group, styles)]
    shown += [_intervals(group, styles, margin), _speed(group, styles), _memory(group, styles)]
    return [*filter(None, shown), _timeline(group, styles), _layers(group, styles)]


def styles_of(group: Group) -> list[Style]:
    """Return the style of each variant, the same in every figure."""
    kinds = [variant.verdict.kind for variant in group.variants]
    baseline = kinds.index(Kind.baseline) if Kind.baseline in kinds else None
    return axes.styles_of([variant.label for variant in group.variants], baseline)


def _losses(group: Group, styles: Sequence[Style]) -> Figure:
    series = _series(group, styles, "curve")
    if not series:
        return Figure("loss", "Training loss", "", "no run has recorded a training loss.")
    shaded = any(line.curve.low for line in series) and len(series) <= MOST_SHADED
    seeds = "; shading spans their extremes" if shaded else ""
    window = f", averaged over {group.window_steps:,} steps" if group.window_steps > 1 else ""
    caption = f"Mean over the seeds{window}{seeds}. {_band(group, group.band)}"
    return Figure("loss", "Training loss", _loss_lines(series, group.band), caption)


def _late_losses(group: Group, styles: Sequence[Style]) -> Figure | None:
    """Draw the second half again, without the steep first steps; None if it is too short."""
    series = _series(group, styles, "curve")
    last = max((line.curve.steps[-1] for line in series), default=0)
    first = min((line.curve.steps[0] for line in series), default=0)
    half = [line._replace(curve=tail(line.curve, first + (last - first) // 2)) for line in series]
    half = [line for line in half if len(_finite(line.curve)) >= 3]
    if not half:
        return None
    band = tail(group.band, half[0].curve.steps[0]) if group.band else None
    return Figure("loss-late", "Training loss, second half", _loss_lines(half, band), "Zoom on the second half.")


def _loss_lines(series: list[Series], band: Curve | None) -> str:
    return lines_svg(series, name="training loss (nats)", band=band, band_name="baseline with a new seed (95 %)")


def _differences(group: Group, styles: Sequence[Style]) -> Figure:
    title = "Training loss relative to the baseline"
    if group.baseline is None:
        return Figure("difference", title, "", "there is no baseline to compare with.")
    series = [
        one for one, v in zip(*_paired(group, styles, "difference"), strict=True) if v.verdict.kind is not Kind.baseline
    ]
    if not series:
        return Figure("difference", title, "", "no other variant has steps and seeds in common with the baseline.")
    band = "baseline with a new seed (95 %)"
    svg = difference_svg(series, name="difference of training loss", noise=group.noise, band_name=band)
    caption = f"Per-seed difference from {group.baseline}, averaged; above 0 is worse. {_band(group, group.noise)}"
    return Figure("difference", title, svg, f"{caption} {_off(series)}")


def _intervals(group: Group, styles: Sequence[Style], margin: float) -> Figure:
    key = KEYS.get(group.metric, "val_delta")
    title = f"Difference of {group.metric}"
    shown = [(v, s) for v, s in zip(group.variants, styles, strict=True) if v.verdict.kind is not Kind.baseline]
    usable = [getattr(v.loss, key) for v, _ in shown if getattr(v.loss, key) is not None]
    if not any(math.isfinite(interval.mean) for interval in usable):
        return Figure("interval", title, "", "no variant has one.")
    top1 = key == "top1_delta"
    svg = intervals_svg([v for v, _ in shown], [s for _, s in shown], key, margin)
    side = "left" if top1 else "right"
    unit = "points of accuracy" if top1 else "percent of the baseline's"
    return Figure("interval", title, svg, f"In {unit}, with 95 % intervals over seeds; {side} of 0 is worse.")


def _speed(group: Group, styles: Sequence[Style]) -> Figure:
    title = f"Speed relative to the baseline ({group.unit}/s)"
    if not any(v.emulated or v.speed.ratio is not None for v in group.variants):
        return Figure("speed", title, "", "no ratio of speeds was measured.")
    caption = "Medians over the seeds, whiskers: their extremes."
    if any(v.emulated for v in group.variants):
        caption += " Emulated: the numerics are exact, the speed is not meaningful, so none is shown."
    return Figure("speed", title, speed_svg(group.variants, styles), caption)


def _memory(group: Group, styles: Sequence[Style]) -> Figure:
    if not any(v.memory.peak_gib is not None and math.isfinite(v.memory.peak_gib) for v in group.variants):
        return Figure("memory", "Peak memory", "", "no run has measured it.")
    caption = "Median over the seeds, and its ratio to the baseline's; by role where runs recorded it."
    return Figure("memory", "Peak memory", memory_svg(group.variants, styles), caption)


def _timeline(group: Group, styles: Sequence[Style]) -> Figure:
    title = "Loss scale and events"
    calm = [v.label for v in group.variants if not v.health.events]
    if not any(v.health.events or (v.health.scale and _finite(v.health.scale)) for v in group.variants):
        return Figure("timeline", title, "", "no loss scale, no skipped step and no alarm in any run.")
    caption = "The loss scale of one seed above, the events of all seeds below; a mark's tooltip says what it was."
    left_out = [f"{v.health.more_events:,} of {v.label}" for v in group.variants if v.health.more_events]
    if left_out:
        caption += f" More events than are shown: {_listed(left_out)}."
    if calm:
        caption += f" Without any event: {_listed(calm)}."
    return Figure("timeline", title, timeline_svg(group.variants, styles), caption)


def _layers(group: Group, styles: Sequence[Style]) -> Figure:
    title = "Underflow and overflow by layer"
    counted = [v for v in group.variants if v.health.layers]
    if not counted:
        return Figure("layers", title, "", "no variant has counted casts.")
    if not any(row["overflow_events"] or row["underflow_frac"] for v in counted for row in v.health.layers):
        return Figure("layers", title, "", "no counted cast underflowed or overflowed.")
    caption = "Fraction of a tensor's elements flushed to zero by the cast, on sampled steps; worst first."
    left_out = worst(counted).left_out
    if left_out:
        caption += f" The worst {MOST} of {MOST + left_out} are shown."
    silent = [v.label for v in group.variants if not v.health.layers]
    if silent:
        caption += f" No counted casts: {_listed(silent)}."
    return Figure("layers", title, layers_svg(group.variants, styles), caption)


def _series(group: Group, styles: Sequence[Style], which: str) -> list[Series]:
    return _paired(group, styles, which)[0]


def _paired(group: Group, styles: Sequence[Style], which: str) -> tuple[list[Series], list[Variant]]:
    """Return the variants that have such a curve, as series."""
    series: list[Series] = []
    owners: list[Variant] = []
    for variant, style in zip(group.variants, styles, strict=True):
        curve: Curve | None = getattr(variant, which)
        if curve is not None and _finite(curve):
            outside = variant.loss.outside_step if which == "difference" else None
            steady = variant.verdict.kind is not Kind.diverged
            series.append(Series(variant.label, curve, style, outside, steady))
            owners.append(variant)
    return series, owners


def _band(group: Group, band: Curve | None) -> str:
    if band is None or not band.low:
        return "No grey band: the baseline has too few seeds for one." if group.baseline else ""
    return f"Grey: 95 % prediction band for {group.baseline} with a new seed."


def _off(series: Sequence[Series]) -> str:
    if all(line.steady for line in series) or not any(line.steady for line in series):
        return ""
    return "A diverged curve may leave the plot, which is drawn for the others."


def _finite(curve: Curve) -> list[float]:
    return [value for value in curve.values if math.isfinite(value)]


def _listed(labels: Sequence[str]) -> str:
    """Join as many labels as fit two lines, at least one."""
    shown = list(labels[:1])
    for label in labels[1:]:
        if sum(map(len, shown)) + len(label) > ROOM:
            break
        shown.append(label)
    more = f" and {len(labels) - len(shown)} more" if len(labels) > len(shown) else ""
    return ", ".join(shown) + more

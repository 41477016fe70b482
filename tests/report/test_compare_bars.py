"""Bars, intervals, the timeline and the heat map of a comparison, read back from their SVG."""

from __future__ import annotations

import math
import re

import comparisons
import pytest
from charts import SVG, assert_inside, part, reader, tree

from mptrain.report import wording
from mptrain.report.compare.comparison import Curve, Health, Interval, Kind, Loss, Memory, Speed, Variant, Verdict
from mptrain.report.draw import axes
from mptrain.report.draw.bars import intervals_svg, memory_svg, speed_svg
from mptrain.report.draw.layers import layers_svg, shade, worst
from mptrain.report.draw.lines import Series, lines_svg
from mptrain.report.draw.timeline import timeline_svg


def styled(variants):
    return variants, axes.styles_of([v.label for v in variants], 0)


def row_of(svg, label):
    return next(e for e in tree(svg).iter(f"{SVG}g") if e.get("data-variant") == label)


def bars_of(svg, label):
    return [e for e in row_of(svg, label).iter(f"{SVG}rect") if e.get("class") == "bar"]


def test_bars_are_as_long_as_the_speeds_and_an_emulation_has_none():
    variants, styles = styled([comparisons.baseline(), comparisons.fp16(), comparisons.fp8(), comparisons.running()])
    svg = speed_svg(variants, styles)
    assert_inside(svg)
    x = reader(svg, "x-tick")
    for variant in variants[:2]:
        (bar,) = bars_of(svg, variant.label)
        assert x(float(bar.get("x"))) == pytest.approx(0, abs=0.01)
        assert x(float(bar.get("x")) + float(bar.get("width"))) == pytest.approx(variant.speed.ratio, abs=0.01)
    ends = {round(x(float(e.get("x1"))), 2) for e in row_of(svg, "fp16").iter(f"{SVG}line")}
    assert ends == {2.19, 2.3}
    for label, said in (("fp8", "emulated"), ("bf16", "not measured")):
        assert not bars_of(svg, label)
        assert said in [e.text for e in row_of(svg, label).iter(f"{SVG}text")]


def test_memory_is_stacked_by_role_and_the_rest_of_the_peak_is_shown():
    variants, styles = styled([comparisons.baseline(), comparisons.fp8()])
    svg = memory_svg(variants, styles)
    assert_inside(svg)
    x = reader(svg, "x-tick")
    sizes = [x(float(b.get("x")) + float(b.get("width"))) - x(float(b.get("x"))) for b in bars_of(svg, "fp32")]
    rest = 8.9 - sum(comparisons.ROLES.values())
    assert sizes == pytest.approx([*comparisons.ROLES.values(), rest], abs=0.03)
    fills = [bar.get("fill") for bar in bars_of(svg, "fp32")]
    assert len(set(fills)) == len(fills)
    assert [x(float(b.get("width")) + float(b.get("x"))) for b in bars_of(svg, "fp8")] == pytest.approx([9.4], abs=0.03)
    assert {f"url(#{e.get('id')})" for e in tree(svg).iter(f"{SVG}pattern")} >= set(fills[:-1])
    with pytest.raises(ValueError, match="peak"):
        memory_svg([comparisons.running()], styles[:1])


def test_intervals_stand_around_0_beside_the_margin():
    variants, styles = styled([comparisons.fp16(), comparisons.fp8()])
    svg = intervals_svg(variants, styles, "val_delta", 0.005)
    assert_inside(svg)
    x = reader(svg, "x-tick")
    (margin,) = [e for e in tree(svg).iter(f"{SVG}rect") if e.get("class") == "margin"]
    left = float(margin.get("x"))
    assert [x(left), x(left + float(margin.get("width")))] == pytest.approx([-0.5, 0.5], abs=0.01)
    whole = next(e for e in row_of(svg, "fp8").iter(f"{SVG}line"))
    assert [x(float(whole.get(end))) for end in ("x1", "x2")] == pytest.approx([0.81, 1.43], abs=0.01)


def test_an_interval_that_is_far_too_wide_is_cut_with_an_arrow_and_one_seed_has_a_point_alone():
    wide = Variant("wide", Verdict(Kind.undecided, ""), loss=Loss(val_delta=Interval(0.01, -0.9, 0.92, 2, "paired t")))
    one = Variant(
        "one", Verdict(Kind.undecided, ""), loss=Loss(val_delta=Interval(0.002, math.nan, math.nan, 1, "paired t"))
    )
    variants, styles = styled([wide, one])
    svg = intervals_svg(variants, styles, "val_delta", 0.005)
    assert_inside(svg)
    assert {"◂", "▸"} < {e.text for e in row_of(svg, "wide").iter(f"{SVG}text")}
    assert not list(row_of(svg, "one").iter(f"{SVG}line"))
    assert "+0.20 %" in [e.text for e in row_of(svg, "one").iter(f"{SVG}text")]


def test_the_timeline_has_the_scale_and_every_event():
    variants, styles = styled([comparisons.baseline(), comparisons.fp16()])
    svg = timeline_svg(variants, styles)
    assert_inside(svg)
    x, y = reader(svg, "x-tick"), reader(svg, "y-tick")
    group = next(e for e in tree(svg).iter(f"{SVG}g") if e.get("data-series") == "fp16")
    path = next(e for e in group if e.get("class") == "curve").get("d")
    start = re.match(r"M([\d.]+) ([\d.]+)", path)
    assert (x(float(start[1])), y(float(start[2]))) == (pytest.approx(0, abs=1), pytest.approx(16, abs=0.02))
    stairs = [(x(float(at)), y(float(to))) for at, to in re.findall(r"H([\d.]+)V([\d.]+)", path)]
    for step, power in ((10, 13), (300, 14), (600, 15), (1200, 16), (2000, 16)):
        assert min(abs(at - step) + 10 * abs(to - power) for at, to in stairs) < 1
    marks = [e for e in tree(svg).iter(f"{SVG}g") if e.get("class") == "event"]
    said = "\n".join(mark.find(f"{SVG}title").text for mark in marks)
    assert "step 3, seed 0: step skipped overflow blocks.3.mlp.up" in said
    assert "step 1,500, seed 1: alarm 32 steps skipped in a row: lower optim.lr" in said
    shapes = {tuple(child.tag.removeprefix(SVG) for child in mark if child.tag != f"{SVG}title") for mark in marks}
    assert shapes == {("path",), ("polygon",)}
    alarm = next(mark for mark in marks if "alarm" in mark.find(f"{SVG}title").text)
    assert x(float(alarm[1].get("points").split(",")[0])) == pytest.approx(1500, abs=5)


def test_events_of_another_kind_have_a_mark_too():
    odd = Variant("odd", Verdict(Kind.none, ""), health=Health(events=[{"step": 5, "event": "resumed"}]))
    svg = timeline_svg([odd], axes.styles_of(["odd"]))
    assert "resumed" in svg
    assert "other event" in svg


def cells_of(svg, place):
    found = [e for e in tree(svg).iter(f"{SVG}g") if e.get("data-place") == place]
    return [next(r for r in e.iter(f"{SVG}rect")).get("fill") for e in found], found


def test_the_heat_map_is_darker_where_more_is_lost_and_marks_overflow():
    variants, styles = styled([comparisons.baseline(), comparisons.fp16(), comparisons.fp8()])
    svg = layers_svg(variants, styles)
    assert_inside(svg)
    fills, cells = cells_of(svg, "blocks.5.mlp.down grad_output")
    loss = [
        next(r for r in v.health.layers if r["layer"] == "blocks.5.mlp.down" and r["role"] == "grad_output")
        for v in variants[1:]
    ]
    assert fills == [shade(row["underflow_frac"]) for row in loss]
    assert [bool(list(cell.iter(f"{SVG}polygon"))) for cell in cells] == [False, True]
    assert [cell.find(f"{SVG}title").text.split(",")[0] for cell in cells] == ["fp16", "fp8"]
    depth = [sum(int(shade(10.0**p)[i : i + 2], 16) for i in (1, 3, 5)) for p in range(-6, 1)]
    assert depth == sorted(depth, reverse=True)
    assert len(set(depth)) == 7
    assert shade(0.0) == "#ffffff" != shade(1e-9)


def test_only_the_worst_rows_are_drawn_the_overflowing_ones_first():
    variants = [comparisons.fp16(), comparisons.fp8()]
    shown = worst(variants, 10)
    assert shown.left_out == 72 - 10
    assert shown.places[:6] == [
        (f"blocks.{i}.mlp.down", "grad_output") for i in sorted(range(6), key=lambda i: -part_of(variants[1], i))
    ]
    kept = [part(variants[1], place) for place in shown.places[6:]]
    assert min(kept) >= max(
        part(variants[1], (r["layer"], r["role"]))
        for r in variants[1].health.layers
        if (r["layer"], r["role"]) not in shown.places and not r["overflow_events"]
    )
    rows = {e.get("data-place") for e in tree(layers_svg(*styled(variants), 10)).iter(f"{SVG}g")} - {None}
    assert rows == {" ".join(place) for place in shown.places}


def part_of(variant, block):
    return part(variant, (f"blocks.{block}.mlp.down", "grad_output"))


def test_what_nothing_is_known_of_is_refused_not_drawn_empty():
    empty, styles = [Variant("x", Verdict(Kind.none, ""))], axes.styles_of(["x"])
    for draw in (timeline_svg, layers_svg, memory_svg):
        with pytest.raises(ValueError, match="no variant"):
            draw(empty, styles)
    with pytest.raises(ValueError, match="val_delta"):
        intervals_svg(empty, styles, "val_delta", 0.005)


def test_markup_in_a_label_stays_text():
    nasty = "<b>&\"'"
    variant = Variant(
        nasty,
        Verdict(Kind.none, ""),
        loss=Loss(val_delta=comparisons.around(0.1, 0.01)),
        speed=Speed(1.0, 1.5, note=nasty),
        memory=Memory(1.0, 1.0, {nasty: 0.5}),
        health=Health(
            layers=[{"layer": nasty, "role": nasty, "overflow_events": 1, "underflow_frac": 0.1}],
            events=[{"step": 1, "event": nasty, "reason": nasty}],
        ),
    )
    styles = axes.styles_of([nasty])
    for draw in (speed_svg, memory_svg, timeline_svg, layers_svg):
        assert nasty in "".join(tree(draw([variant], styles)).itertext())  # parses, and says what the label says
    for svg in (
        intervals_svg([variant], styles, "val_delta", 0.01),
        lines_svg([Series(nasty, Curve([1], [1.0]), styles[0])], name=""),
    ):
        assert nasty in "".join(tree(svg).itertext())


def test_short_labels_stay_different():
    labels = [f"a-very-long-name-{i}-that-ends-alike" for i in range(12)]
    for width in (8, 12, 26):
        found = wording.brief(labels, width)
        assert len(set(found)) == 12
        assert max(map(len, found)) <= width
    assert wording.brief(["fp32", "bf16"], 8) == ["fp32", "bf16"]

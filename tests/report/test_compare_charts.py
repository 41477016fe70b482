"""The charts of a comparison, read back: places are turned into values by the ticks that a reader would go by."""

from __future__ import annotations

import itertools
import math
import re
import xml.etree.ElementTree as ET

import comparisons
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mptrain.report import wording
from mptrain.report.compare.comparison import Curve, Health, Interval, Kind, Loss, Memory, Speed, Variant, Verdict
from mptrain.report.draw import axes
from mptrain.report.draw.bars import intervals_svg, memory_svg, speed_svg
from mptrain.report.draw.layers import layers_svg, shade, worst
from mptrain.report.draw.lines import Series, clipped, difference_svg, lines_svg, tail
from mptrain.report.draw.timeline import timeline_svg

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


def curve_of(svg, label):
    """The points of a drawn curve, in pieces."""
    group = next(e for e in tree(svg).iter(f"{SVG}g") if e.get("data-series") == label)
    path = next(e for e in group if e.get("class") == "curve").get("d")
    pieces = [piece for piece in path.split("M") if piece]
    return [[tuple(map(float, p.split())) for p in re.split(r"L|h1\.5", piece) if p] for piece in pieces]


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


def series(*curves, **of_all):
    styles = axes.styles_of([f"v{i}" for i in range(len(curves))])
    return [
        Series(f"v{i}", curve, style, **of_all) for i, (curve, style) in enumerate(zip(curves, styles, strict=True))
    ]


def styled(variants):
    return variants, axes.styles_of([v.label for v in variants], 0)


def test_a_curve_is_where_its_axes_say():
    curve = comparisons.curve(2.4)
    svg = lines_svg(series(curve, comparisons.curve(2.6, 1)), name="loss", band=curve)
    assert_inside(svg)
    x, y = reader(svg, "x-tick"), reader(svg, "y-tick")
    (points,) = curve_of(svg, "v0")
    assert len(points) == len(curve.steps)
    for (px, py), step, value in zip(points, curve.steps, curve.values, strict=True):
        assert x(px) == pytest.approx(step, abs=0.3)
        assert y(py) == pytest.approx(value, abs=1e-3)


def test_more_than_a_decade_is_drawn_on_a_logarithmic_axis_and_less_is_not():
    steps = list(range(0, 100, 5))
    falling = Curve(steps, [50.0 * 0.9**step for step in steps])
    svg = lines_svg(series(falling), name="loss")
    assert "logarithmic" in texts(svg)[0].text
    y = reader(svg, "y-tick", log=True)
    (points,) = curve_of(svg, "v0")
    for (_, py), value in zip(points, falling.values, strict=True):
        assert y(py) == pytest.approx(value, rel=2e-2)
    assert "logarithmic" not in lines_svg(series(Curve(steps, [v + 20 for v in falling.values])), name="loss")


def test_a_gap_is_a_gap_and_a_lone_point_is_seen():
    nan = math.nan
    svg = lines_svg(series(Curve([0, 1, 2, 3, 4, 5, 6], [nan, 3.0, 2.0, nan, 2.5, nan, nan])), name="loss")
    assert [len(piece) for piece in curve_of(svg, "v0")] == [2, 1]
    with pytest.raises(ValueError, match="finite"):
        lines_svg(series(Curve([0, 1], [nan, nan])), name="loss")


def test_a_single_step_can_be_drawn():
    assert_inside(lines_svg(series(Curve([7], [3.0])), name="loss"))
    assert_inside(difference_svg(series(Curve([7], [0.0])), name="loss"))


def test_a_diverged_curve_leaves_the_plot_and_does_not_flatten_the_others():
    calm, wild = comparisons.curve(2.4), comparisons.diverged().curve
    pair = series(calm, wild)
    alone, both = (lines_svg(found, name="loss") for found in (pair[:1], [pair[0], pair[1]._replace(steady=False)]))
    assert [e.text for e in texts(alone, "y-tick")] == [e.text for e in texts(both, "y-tick")]
    assert_inside(both)
    *_, last = curve_of(both, "v1")
    top = min(py for piece in curve_of(both, "v0") for _, py in piece)
    assert last[-1][1] < top
    y = reader(both, "y-tick")
    assert y(last[-1][1]) > max(calm.values)


def test_a_difference_is_in_percent_around_0_with_the_noise_and_a_ring_where_it_leaves_it():
    curve, noise = comparisons.difference(2.427, 2), comparisons.noise_band()
    svg = difference_svg([series(curve)[0]._replace(outside=430)], name="difference", noise=noise)
    assert_inside(svg)
    x, y = reader(svg, "x-tick"), reader(svg, "y-tick")
    assert "0 %" in [e.text for e in texts(svg, "y-tick")]
    last = curve_of(svg, "v0")[-1][-1]
    assert y(last[1]) == pytest.approx(100 * curve.values[-1], abs=0.01)
    (ring,) = [e for e in tree(svg).iter(f"{SVG}circle") if e.get("class") == "outside"]
    assert x(float(ring.get("cx"))) == pytest.approx(430, abs=1)
    assert y(float(ring.get("cy"))) == pytest.approx(100 * curve.values[43], abs=0.01)
    band = next(e for e in tree(svg).iter(f"{SVG}path") if e.get("class") == "band").get("d")
    edges = {round(y(float(py)), 1) for px, py in re.findall(r"(-?[\d.]+) (-?[\d.]+)", band) if x(float(px)) > 1500}
    assert edges == {-0.2, 0.2}
    assert "outside" not in difference_svg(series(curve), name="difference", noise=noise)


def test_the_last_part_of_a_curve_keeps_its_band():
    part = tail(Curve([0, 10, 20], [3.0, 2.0, 1.0], [2.5, 1.5, 0.5], [3.5, 2.5, 1.5]), 10)
    assert part == Curve([10, 20], [2.0, 1.0], [1.5, 0.5], [2.5, 1.5])
    assert tail(Curve([0, 10], [3.0, 2.0]), 10) == Curve([10], [2.0])


def test_twenty_series_differ_in_more_than_colour_and_their_labels_keep_apart():
    curves = [comparisons.curve(2.4 + 0.001 * i, i) for i in range(20)]
    svg = lines_svg(series(*curves), name="loss")
    assert_inside(svg)
    places = sorted(float(e.get("y")) for e in texts(svg, "end"))
    assert len(places) == 20
    assert min(b - a for a, b in itertools.pairwise(places)) >= 14
    styles = axes.styles_of([str(i) for i in range(20)], 0)
    assert len({(s.dashes, s.shape, s.colour) for s in styles}) == 20
    assert len({(s.dashes, s.shape) for s in styles[:7]}) == 7  # in grey print, as many as there are dashes
    assert all(a.colour != b.colour and a.dashes != b.dashes for a, b in itertools.pairwise(styles))
    assert [s.dashes for s in styles].count("") == 1  # the baseline alone is solid


finite = st.floats(-1e3, 1e3)


@given(st.lists(finite, min_size=1, max_size=25), st.floats(1, 20))
def test_labels_are_spread_in_order_and_no_further_than_they_must(wanted, gap):
    low, high = -1e3, 1e3
    found = axes.spread(wanted, gap, low, high)
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = [found[i] for i in order]
    assert all(b - a >= gap - 1e-6 for a, b in itertools.pairwise(placed))
    assert placed[0] >= low - 1e-6
    assert placed[-1] <= high + 1e-6
    near = [wanted[i] for i in order]
    if all(b - a >= gap for a, b in itertools.pairwise(near)):
        assert placed == pytest.approx(near, abs=1e-6)


@given(st.floats(-1e9, 1e9), st.floats(1e-9, 1e9))
def test_ticks_are_round_and_within_the_axis(low, size):
    high = low + size
    assume(high - low > 1e-6 * max(abs(low), abs(high)))  # else fewer digits than a tick can have
    ticks = axes.round_ticks(low, high, 6)
    assert 1 <= len(ticks) <= 8
    assert low - 1e-6 * size <= min(ticks)
    assert max(ticks) <= high + 1e-6 * size
    steps = {b - a for a, b in itertools.pairwise(ticks)}
    for step in steps:
        lead = step / 10.0 ** math.floor(math.log10(step * (1 + 1e-6)))
        assert min(abs(lead - round_) for round_ in (1, 2, 5)) < 1e-3 * max(1.0, abs(low) / size)


def test_a_line_is_cut_where_it_crosses_the_plot():
    assert clipped([(0, -10), (10, 10), None, (20, 50)], 0, 100) == [[(5.0, 0.0), (10, 10)], [(20, 50)]]
    assert clipped([(0, 50), (10, 150), (20, 50)], 0, 100) == [[(0, 50), (5.0, 100.0)], [(15.0, 100.0), (20, 50)]]
    assert clipped([(0, -10), (10, -20)], 0, 100) == []
    assert clipped([(0, -50), (10, 150)], 0, 100) == [[(2.5, 0.0), (7.5, 100.0)]]


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


def part(variant, place):
    return next(r["underflow_frac"] for r in variant.health.layers if (r["layer"], r["role"]) == place)


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

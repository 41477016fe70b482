"""The charts of a comparison, read back: places are turned into values by the ticks that a reader would go by."""

from __future__ import annotations

import itertools
import math
import re

import comparisons
import pytest
from charts import SVG, assert_inside, reader, texts, tree
from hypothesis import assume, given
from hypothesis import strategies as st

from mptrain.report.compare.comparison import Curve
from mptrain.report.draw import axes
from mptrain.report.draw.lines import Series, clipped, difference_svg, lines_svg, tail


def curve_of(svg, label):
    """The points of a drawn curve, in pieces."""
    group = next(e for e in tree(svg).iter(f"{SVG}g") if e.get("data-series") == label)
    path = next(e for e in group if e.get("class") == "curve").get("d")
    pieces = [piece for piece in path.split("M") if piece]
    return [[tuple(map(float, p.split())) for p in re.split(r"L|h1\.5", piece) if p] for piece in pieces]


def series(*curves, **of_all):
    styles = axes.styles_of([f"v{i}" for i in range(len(curves))])
    return [
        Series(f"v{i}", curve, style, **of_all) for i, (curve, style) in enumerate(zip(curves, styles, strict=True))
    ]


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

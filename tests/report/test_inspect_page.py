"""The page of ``mptrain inspect``: whole, loading nothing, drawn where the numbers are."""

import math
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest
import torch
from safetensors.torch import save_file

from mptrain.formats import Format
from mptrain.kernels.bins import edges
from mptrain.report.draw.magnitudes import Band, heat_map_svg, histogram_svg
from mptrain.report.draw.svg import COLOURS
from mptrain.report.inspect import tensors
from mptrain.report.inspect.terminal import share_text
from mptrain.report.wording import percent, scale_text, short
from mptrain.telemetry import record
from mptrain.telemetry.histogram import Histogram, Histograms, Share

pytestmark = pytest.mark.usefixtures("one_thread")


class Page(HTMLParser):
    """Collects what a page would load, and checks that elements close in order."""

    VOID = ("meta",)

    def __init__(self):
        super().__init__()
        self.open, self.loads, self.opened, self.details = [], [], 0, 0

    def handle_starttag(self, tag, attributes):
        names = dict(attributes)
        self.loads += [tag] if tag in ("script", "link", "img", "iframe") else []
        self.loads += [value for key, value in names.items() if key in ("src", "href", "xlink:href")]
        self.details += tag == "details"
        self.opened += tag == "details" and "open" in names
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.loads += [value for key, value in attributes if key in ("src", "href", "xlink:href")]


def test_the_page_is_whole_loads_nothing_and_names_every_tensor(run, inspect, tmp_path):
    file = tmp_path / "page.html"
    inspect(run, "--html", file)
    text = file.read_text()
    page = Page()
    page.feed(text)
    assert page.open == []
    assert page.loads == []
    assert "url(http" not in text
    assert "@import" not in text
    assert page.details == 4 + 12  # a heat map for each role, a histogram for each tensor
    drawn = [ET.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)]
    assert len(drawn) == 16
    assert text.index("<b>blocks.1.mlp</b><span class='role'>grad_output") < text.index(
        "<b>blocks.0.mlp</b><span class='role'>"
    )
    used = set(re.findall(r"url\(#(\w+)\)", text))
    assert used <= set(re.findall(r"<pattern id='(\w+)'", text))
    assert used


def test_names_from_the_file_cannot_write_html(tmp_path, inspect):
    evil = "<script>alert('1')</script>&"
    save_file({f"{evil}.weight": torch.randn(9)}, tmp_path / "f.safetensors")
    inspect(tmp_path / "f.safetensors", "--html", tmp_path / "page.html")
    assert "<script" not in (tmp_path / "page.html").read_text()
    record.append(tmp_path / record.FILE, record.Record(1, {}, [(evil, evil, "")], {"amax": torch.ones(1)}))
    assert "alert" in inspect(tmp_path)


def shapes(svg, tag):
    return [element.attrib for element in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}" + tag)]


def x_of(svg):
    """Pixels per octave and the pixel of 2^0, from the labels of the axis."""
    places = {}
    for element in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text"):
        power = re.fullmatch("2([⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+)", element.text or "")
        if power:
            places[int(power.group(1).translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")))] = float(
                element.attrib["x"]
            )
    (a, xa), (b, xb) = min(places.items()), max(places.items())
    return lambda log2: xa + (log2 - a) * (xb - xa) / (b - a)


def test_a_bar_ends_where_its_format_does_on_the_axis_of_the_histogram():
    histogram = Histogram.of(torch.randn(5000))
    svg = histogram_svg(histogram, [Band("E4M3", Format.fp8_e4m3, 64.0), Band("INT4", Format.int4, 2.0)])
    x = x_of(svg)
    for fmt, scale in ((Format.fp8_e4m3, 64.0), (Format.int4, 2.0)):
        bars = [bar for bar in shapes(svg, "rect") if bar.get("fill") == COLOURS[fmt.name] and "x" in bar]
        spec = fmt.value
        assert float(bars[0]["x"]) == pytest.approx(x(math.log2(spec.underflow_at / scale)), abs=0.2)
        end = float(bars[-1]["x"]) + float(bars[-1]["width"])
        assert end == pytest.approx(x(math.log2(spec.overflow_at / scale)), abs=0.2)
        if not spec.integer:
            assert float(bars[1]["x"]) == pytest.approx(x(math.log2(spec.min_normal / scale)), abs=0.2)


def test_the_outline_of_a_histogram_stands_over_its_magnitudes():
    svg = histogram_svg(Histogram.of(torch.tensor([0.3] * 50 + [5.0] * 10 + [0.0])), [])
    x = x_of(svg)
    path = shapes(svg, "path")[0]["d"]
    steps = [(float(y), float(end)) for y, end in re.findall(r"V([\d.]+)H([\d.]+)", path)]
    heights = sorted(steps)[:2]  # y grows downwards: the two highest steps
    for (_, end), value in zip(heights, (0.3, 5.0), strict=True):
        right = edges()[torch.searchsorted(edges(), value)]
        assert end == pytest.approx(x(math.log2(right)), abs=0.2)


def test_what_the_format_in_use_loses_is_hatched():
    x = torch.randn(5000)
    band = Band("cast", Format.fp8_e4m3, 512.0, used=True)
    svg = histogram_svg(Histogram.of(x), [band])
    hatched = [bar for bar in shapes(svg, "rect") if "hatch" in bar.get("fill", "")]
    assert len(hatched) == 2
    assert float(hatched[1]["x"]) == pytest.approx(x_of(svg)(math.log2(464 / 512)), abs=0.2)


def test_a_heat_map_is_dark_where_the_elements_are():
    tensors = [torch.full((100,), 1.5), torch.cat([torch.full((90,), 12.0), torch.zeros(10)]), torch.zeros(4)]
    each = [Histogram.of(x) for x in tensors]
    many = Histograms(torch.stack([h.counts for h in each]), torch.tensor([h.amax for h in each]).double())
    svg = heat_map_svg(["a<b", "b", "c"], many, [(-1.0, 2.5), None, None])
    x = x_of(svg)
    titled = [e for e in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}rect") if len(e)]
    cells = {e[0].text: e.attrib for e in titled}
    assert float(cells["a<b: 100.000% in 2⁰ .. 2¹"]["x"]) == pytest.approx(x(0), abs=0.2)
    assert float(cells["b: 90.000% in 2³ .. 2⁴"]["x"]) == pytest.approx(x(3), abs=0.2)
    assert cells["b: 10.000% zeros"]["fill"] not in ("#ffffff", cells["c: 100.000% zeros"]["fill"])
    marks = [line for line in shapes(svg, "line") if line["stroke-width"] == "2.2"]
    assert [float(mark["x1"]) for mark in marks] == [pytest.approx(x(2.5), abs=0.2)]  # 2^-1 is outside the map
    with pytest.raises(ValueError, match="at least one row"):
        heat_map_svg([], many)


def test_drawing_what_has_no_magnitudes():
    for x in (torch.zeros(5), torch.tensor([math.nan, math.inf]), torch.empty(0), torch.tensor([2.0**-149, 3e38])):
        svg = histogram_svg(Histogram.of(x), [Band("FP16", Format.fp16, 1.0), Band("INT8", Format.int8, 2.0**127)])
        assert len(shapes(svg, "rect")) > 1
        one = Histogram.of(x)
        ET.fromstring(heat_map_svg(["x"], Histograms(one.counts[None], torch.tensor([one.amax]).double())))


def test_a_page_needs_histograms(tmp_path, refused):
    record.append(tmp_path / record.FILE, record.Record(1, {}, [("a", "b", "")], {"amax": torch.ones(1)}))
    assert "no histograms to draw" in refused(tmp_path, "--html", tmp_path / "x.html")


def test_shares_in_words():
    assert [percent(x) for x in (0, 1e-6, 0.0003, 0.005, 0.0123, 0.34, 1)] == [
        "0",
        "<0.01",
        "0.03",
        "0.5",
        "1.2",
        "34",
        "100",
    ]
    assert share_text(Share(0.17, 0.18, 0.171)) == "17-18%"
    assert share_text(Share(0.17, 0.17, 0.17)) == "17%"
    assert [scale_text(s) for s in (0.25, 1.0, 448.0, 3e7)] == ["2^-2", "2^0", "448", "3e7"]
    assert short("model.layers.11.self_attention.q_proj", 22) == "model…attention.q_proj"
    assert len(short("model.layers.11.self_attention.q_proj", 9)) == 9


def test_places_of_tensors():
    assert tensors.place_of("model/blocks.0.w.weight", True) == ("blocks.0.w", "weight")
    assert tensors.place_of("optimizer/state/3/exp_avg", True) == ("optimizer 3", "exp_avg")
    assert tensors.place_of("optimizer/state/3/step", True) is None
    assert tensors.place_of("rng/cpu", True) is None
    assert tensors.place_of("rng/cpu", False) == ("rng/cpu", "weight")
    assert tensors.place_of("weight", False) == ("weight", "weight")

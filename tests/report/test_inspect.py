"""``mptrain inspect`` on the folder of a run and on safetensors files: figures, tables, drawings and errors."""

import json
import math
import re
import struct
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest
import torch
from safetensors.torch import save_file

from mptrain import cli
from mptrain.checkpoint.checkpoints import Checkpoints
from mptrain.formats import Format, overflows, round_to, underflows
from mptrain.kernels.bins import edges
from mptrain.report.draw.magnitudes import Band, heat_map_svg, histogram_svg
from mptrain.report.draw.svg import COLOURS
from mptrain.report.inspect import tensors
from mptrain.report.inspect.terminal import share_text
from mptrain.report.wording import percent, scale_text, short
from mptrain.telemetry import record
from mptrain.telemetry.histogram import JUDGED, Histogram, Histograms, Share

pytestmark = pytest.mark.usefixtures("one_thread")

SCALES = {"input": 32.0, "weight": 448.0, "grad_output": 3e6, "update": 1.0}
FORMATS = {"input": "fp8_e4m3", "weight": "fp8_e4m3", "grad_output": "fp8_e5m2", "update": ""}
SIZES = {"input": 1.0, "weight": 0.02, "grad_output": 1e-4, "update": 1e-5}
LOST = [4096.0, 1024.0, 0.0, 512.25, 3.0]


def tensor_of(layer, role, step):
    generator = torch.Generator().manual_seed(step + 7 * layer + 100 * len(role))
    x = torch.randn(4096, generator=generator) * torch.exp(torch.randn(4096, generator=generator)) * SIZES[role]
    x[: 64 * layer] = 0
    if (layer, role) == (1, "grad_output"):
        x[100], x[101] = math.inf, math.nan
    return x


def recorded(step, layers=3, without=()):
    rows, tables = [], {name: [] for name in ("histogram", "counts", "scale", "amax", "errors", "blocks", "lost")}
    for layer in range(layers):
        for role, fmt in FORMATS.items():
            x = tensor_of(layer, role, step)
            rows.append((f"blocks.{layer}.mlp", role, fmt))
            finite = x[x.isfinite()].double()
            kept = round_to(finite * SCALES[role], Format[fmt]) / SCALES[role] if fmt else finite
            fields = [x.abs().reshape(-1, size).amax(1).view(torch.int32) >> 23 for size in (32, 128)]
            tables["histogram"].append(Histogram.of(x).counts)
            tables["counts"].append(count_cast(x * SCALES[role], Format[fmt or "fp16"]))
            tables["scale"].append(torch.tensor(SCALES[role]))
            tables["amax"].append(x[x.isfinite()].abs().max())
            tables["errors"].append(torch.stack([(finite**2).sum(), ((finite - kept) ** 2).sum()]))
            tables["blocks"].append(torch.stack([torch.bincount(f.long(), minlength=256) for f in fields]))
            tables["lost"].append(torch.tensor(LOST if role == "update" else [0.0] * 5, dtype=torch.float64))
    stacked = {name: torch.stack(parts) for name, parts in tables.items() if name not in without}
    return record.Record(step, {"loss_scale": 8.0}, rows, stacked)


def count_cast(x, fmt):
    """int64 [5] by the definitions: elements, overflows, underflows, Inf and NaN of a cast to ``fmt``."""
    found = overflows(x, fmt), underflows(x, fmt) & x.isfinite(), x.isinf(), x.isnan()
    return torch.tensor([x.numel(), *(int(mask.sum()) for mask in found)])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    for step in (1, 10):
        record.append(folder / record.FILE, recorded(step))
    return folder


@pytest.fixture
def inspect(capsys, monkeypatch):
    def call(*words, columns=100):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert cli.main(["inspect", *map(str, words)]) == 0
        return capsys.readouterr().out

    return call


@pytest.fixture
def refused(capsys):
    def call(*words):
        with pytest.raises(SystemExit) as leaving:
            cli.main(["inspect", *map(str, words)])
        assert leaving.value.code == 2
        return capsys.readouterr().err

    return call


def rows_of(text):
    return {(row["layer"], row["role"]): row for row in json.loads(text)["rows"]}


def test_figures_are_those_of_the_tensors(run, inspect):
    rows = rows_of(inspect(run, "--json"))
    assert len(rows) == 12
    for (layer, role), row in rows.items():
        x = tensor_of(int(layer.split(".")[1]), role, 10)
        finite = x[x.isfinite()]
        assert row["elements"] == 4096
        assert row["zeros"] == int((x == 0).sum())
        assert row["inf"] + row["nan"] == 4096 - len(finite)
        assert row["amax"] == float(finite.abs().max())
        median = float(finite[finite != 0].abs().median())
        assert row["percentiles"]["50"] == pytest.approx(median, rel=0.126)
        assert [*row["formats"]] == [fmt.name for fmt in JUDGED]
        for name, judged in row["formats"].items():
            y = finite.double() * judged["scale"]
            for kind, oracle in (("saturated", overflows), ("flushed", underflows)):
                actual = float(oracle(y, Format[name]).sum()) / 4096
                assert judged[kind]["low"] <= actual <= judged[kind]["high"]
            assert judged["flushed"]["low"] == judged["flushed"]["high"]


def test_the_cast_of_the_run_is_told_by_its_exact_counts(run, inspect):
    rows = rows_of(inspect(run, "--json", "--step", 1))
    for (layer, role), row in rows.items():
        if role == "update":
            assert row["used"] is None
            continue
        x = tensor_of(int(layer.split(".")[1]), role, 1)
        fmt, scale, used = Format[FORMATS[role]], SCALES[role], row["used"]
        counted = count_cast(x * scale, fmt).tolist()
        assert [used[name] for name in ("elements", "saturated", "flushed", "inf", "nan")] == counted
        finite = x[x.isfinite()].double()
        noise = finite - round_to(finite * scale, fmt) / scale
        assert used["sqnr_db"] == pytest.approx(10 * math.log10(float((finite**2).sum() / (noise**2).sum())))
        assert used["headroom_bits"] == pytest.approx(math.log2(fmt.value.max / (float(finite.abs().max()) * scale)))


def test_the_spread_of_blocks_is_counted_in_bits(run, inspect):
    rows = rows_of(inspect(run, "--json"))
    for layer in range(3):
        x = tensor_of(layer, "weight", 10)
        top = math.floor(math.log2(float(x.abs().max())))
        for size in (32, 128):
            amaxes = x.abs().reshape(-1, size).amax(1)
            amaxes = amaxes[amaxes > 0].sort().values
            spread = rows[f"blocks.{layer}.mlp", "weight"]["spread"][str(size)]
            for name, q in (("median", 0.5), ("first", 0.01)):
                block = float(amaxes[max(0, math.ceil(q * len(amaxes)) - 1)])
                assert spread[name] == top - math.floor(math.log2(block))


def test_lost_updates_are_shown_for_updates_only(run, inspect):
    rows = rows_of(inspect(run, "--json"))
    assert {role for (_, role), row in rows.items() if row["lost"]} == {"update"}
    lost = rows["blocks.0.mlp", "update"]["lost"]
    assert [*lost.values()] == LOST
    text = inspect(run)
    line = next(line for line in text.split("updates lost")[1].splitlines() if "blocks.0.mlp" in line)
    assert line.split()[2:] == ["4,096", "25", "%", "0", "%", "13", "%", "0.07", "%"]


def test_the_worst_row_is_first_and_its_cells_say_why(run, inspect):
    first = json.loads(inspect(run, "--json"))["rows"][0]
    assert (first["layer"], first["role"]) == ("blocks.1.mlp", "grad_output")  # Inf and NaN
    text = inspect(run)
    lines = [line for line in text.splitlines() if "blocks" in line]
    assert lines[0].split()[:2] == ["blocks.1.mlp", "grad_output"]
    row = rows_of(inspect(run, "--json"))["blocks.2.mlp", "weight"]
    cells = next(line for line in lines if line.split()[:2] == ["blocks.2.mlp", "weight"]).split()[2:]
    assert len(cells) == len(JUDGED)
    e2m1 = row["formats"]["fp4_e2m1"]
    assert cells[4] == f"0/{percent(e2m1['flushed']['low'])}/{percent(e2m1['subnormal']['estimate'])}"


@pytest.mark.parametrize("columns", [80, 100, 160])
def test_tables_fit_the_terminal_and_cut_no_figure(run, inspect, columns):
    text = inspect(run, columns=columns)
    lines = text.splitlines()[1:]  # the first is the path, whole to be copied
    assert 60 < max(map(len, lines)) <= columns
    assert "…" not in "".join(line[20:] for line in lines)


def test_one_format_shows_ranges_where_the_bins_do_not_decide(run, inspect):
    text = inspect(run, "--format", "fp8_e4m3", "--role", "input")
    row = rows_of(inspect(run, "--format", "fp8_e4m3", "--role", "input", "--json"))["blocks.0.mlp", "input"]
    assert [*row["formats"]] == ["fp8_e4m3"]
    subnormal = row["formats"]["fp8_e4m3"]["subnormal"]
    assert subnormal["low"] < subnormal["high"]
    line = next(line for line in text.splitlines() if "blocks.0.mlp" in line)
    assert f"{percent(subnormal['low'])}-{percent(subnormal['high'])}%" in line
    assert scale_text(row["formats"]["fp8_e4m3"]["scale"]) in line.split()
    assert "weight" not in text


def test_rows_left_out_are_counted(tmp_path, inspect):
    record.append(tmp_path / record.FILE, recorded(5, layers=9))
    text = inspect(tmp_path)
    assert "16 more of 36 rows" in text
    assert "more of" not in inspect(tmp_path, "--all")
    assert text.count("blocks.") < inspect(tmp_path, "--all").count("blocks.")
    assert "more of" not in inspect(tmp_path, "--layer", r"\.[13]\.")


def test_each_table_of_a_record_may_be_missing(tmp_path, inspect):
    for index, name in enumerate(("histogram", "counts", "scale", "amax", "errors", "blocks", "lost")):
        folder = tmp_path / str(index)
        folder.mkdir()
        record.append(folder / record.FILE, recorded(5, layers=1, without=(name,)))
        assert "blocks.0.mlp" in inspect(folder)
        assert len(rows_of(inspect(folder, "--json"))) == 4
    record.append(tmp_path / record.FILE, record.Record(5, {}, recorded(5).rows, {}))
    assert "blocks.2.mlp" in inspect(tmp_path)


def test_what_is_not_recorded_is_answered_with_what_is(run, refused):
    assert "recorded: 1, 10" in refused(run, "--step", 7)
    assert "did you mean 'weight'" in refused(run, "--role", "wieght")
    assert "did you mean 'fp8_e4m3'" in refused(run, "--format", "fp8_e4m")
    assert "known: blocks.0.mlp, blocks.1.mlp" in refused(run, "--layer", "attention")
    assert "not a regular expression" in refused(run, "--layer", "(")


def test_what_is_no_run_is_answered_clearly(tmp_path, refused):
    assert "does not exist" in refused(tmp_path / "none")
    assert "not the folder of a run" in refused(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": torch.ones(3)}, tmp_path / "step-1.safetensors")
    message = refused(tmp_path)
    assert "sampled no histograms" in message
    assert f"mptrain inspect {tmp_path / 'step-1.safetensors'}" in message
    (tmp_path / record.FILE).write_bytes(b"\0" * 99)
    assert "holds no whole record" in refused(tmp_path)
    (tmp_path / "torn.safetensors").write_bytes((tmp_path / "step-1.safetensors").read_bytes()[:-4])
    assert "truncated" in refused(tmp_path / "torn.safetensors")
    (tmp_path / "notes.txt").write_text("a text")
    assert "not a safetensors file" in refused(tmp_path / "notes.txt")
    save_file({"a": torch.arange(3)}, tmp_path / "whole.safetensors")
    assert "no floating-point weights (1 other" in refused(tmp_path / "whole.safetensors")
    assert "--step is for the folder of a run" in refused(tmp_path / "whole.safetensors", "--step", 1)


def test_weights_of_any_safetensors_file(tmp_path, inspect):
    path = tmp_path / "model.safetensors"
    x = torch.randn(64, 32) * 0.02
    save_file(
        {
            "model.layers.0.q_proj.weight": x.bfloat16(),
            "model.layers.0.q_proj.bias": x[0].half(),
            "encoder/kernel": x,
            "f8": x.to(torch.float8_e4m3fn),
            "ids": torch.arange(4),
        },
        path,
    )
    rows = rows_of(inspect(path, "--json"))
    assert set(rows) == {
        ("model.layers.0.q_proj", "weight"),
        ("model.layers.0.q_proj", "bias"),
        ("encoder/kernel", "weight"),
        ("f8", "weight"),
    }
    assert rows["model.layers.0.q_proj", "weight"]["amax"] == float(x.bfloat16().float().abs().max())
    assert rows["f8", "weight"]["zeros"] == int((x.to(torch.float8_e4m3fn).float() == 0).sum())
    text = inspect(path)
    assert "1 BF16" in text
    assert "1 F8_E4M3" in text
    assert "left out: 1 I64" in text
    assert "as cast" not in text


def test_a_type_that_torch_lacks_is_left_out(tmp_path, inspect):
    """F4 and whatever comes: the header names them, nothing reads them."""
    table = {
        "w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "s": {"dtype": "F8_E8M0", "shape": [4], "data_offsets": [8, 12]},
    }
    head = json.dumps(table).encode()
    (tmp_path / "f.safetensors").write_bytes(
        struct.pack("<Q", len(head)) + head + struct.pack("<2f", 1, 2) + b"\x7f" * 4
    )
    assert set(rows_of(inspect(tmp_path / "f.safetensors", "--json"))) == {("w", "weight")}
    assert "left out: 1 F8_E8M0" in inspect(tmp_path / "f.safetensors")


class Moments:
    """The state of an AdamW of one parameter; making a real one takes seconds for its imports."""

    def state_dict(self):
        state = {"step": torch.tensor(1.0), "exp_avg": torch.ones(4) * 0.1, "exp_avg_sq": torch.ones(4)}
        return {"state": {0: state}, "param_groups": [{"lr": 0.1, "params": [0]}]}

    def load_state_dict(self, state): ...


def test_weights_and_moments_of_a_checkpoint_of_ours(tmp_path, inspect):
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8))
    path = Checkpoints(tmp_path, 1).save(3, {"model": model, "optimizer": Moments()}, {"step": 3})
    rows = rows_of(inspect(path, "--json"))
    assert ("0", "weight") in rows
    assert rows["0", "weight"]["amax"] == float(model[0].weight.detach().abs().max())
    assert ("optimizer 0", "exp_avg") in rows
    assert ("optimizer 0", "exp_avg_sq") in rows
    assert {role for _, role in rows} == {"weight", "bias", "exp_avg", "exp_avg_sq"}
    text = inspect(path)
    assert f"{path}: 6 float32" in text
    assert "left out: 1 float32" in text


def test_a_checkpoint_that_cannot_be_inspected_is_one_message(tmp_path, refused):
    path = Checkpoints(tmp_path / "checkpoints", 1).save(3, {"model": torch.nn.Linear(8, 8)}, {"step": 3})
    assert f"{path} is a checkpoint" in refused(path, "--step", 3)
    (tmp_path / "config.json").write_text("{}")
    path.rename(path.with_name("aside-1-step-00000003"))
    path = Checkpoints(tmp_path / "checkpoints", 1).save(4, {"model": torch.nn.Linear(8, 8)}, {"step": 4})
    assert f"sampled no histograms; for its weights: mptrain inspect {path}\n" in refused(tmp_path)
    content = (path / "rank-00000.safetensors").read_bytes()
    for damaged in (content[:-4], content[:-1] + bytes([content[-1] ^ 1]), b""):
        (path / "rank-00000.safetensors").write_bytes(damaged)
        (line,) = refused(path).splitlines()
        assert f"checkpoint {path} is damaged: " in line
        assert "rank-00000.safetensors" in line
    (path / "checkpoint.json").unlink()
    (line,) = refused(path).splitlines()
    assert f"checkpoint {path} is damaged: checkpoint.json" in line


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

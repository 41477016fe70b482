"""The deployment matrix in the report: file, terminal, Markdown, HTML; every number that of the data."""

from __future__ import annotations

import io
import json
import math

import comparisons
import deployments
import pytest
from pages import DRAWN, Page, exact, tables_of
from rich.cells import cell_len
from rich.console import Console

from mptrain.report.compare.comparison import Interval
from mptrain.report.compare.files import write_all
from mptrain.report.deploy import cells
from mptrain.report.deploy import matrix as deployment
from mptrain.report.deploy.matrix import Evaluation, Latency, LayerError
from mptrain.report.deploy.page import markdown_parts, section
from mptrain.report.deploy.terminal import print_evaluation, print_matrix
from mptrain.tools.files import json_text
from mptrain.tools.settings import to_plain

SAMPLES = {"realistic": deployments.realistic, "images": deployments.images}


def written(folder, matrix):
    folder.mkdir(exist_ok=True)
    (folder / deployment.FILE).write_text(json_text(to_plain(matrix)))
    return folder


@pytest.mark.parametrize("name", SAMPLES)
def test_a_matrix_is_read_as_it_was_written(name, tmp_path):
    matrix = SAMPLES[name]()
    assert deployment.read(written(tmp_path, matrix) / deployment.FILE) == matrix


def test_infinities_and_unknown_ends_survive_the_file(tmp_path):
    matrix = deployments.images()
    matrix.cells.append(
        deployment.Deployed(
            "fp32", "bf16", 1, Interval(2.0, math.nan, math.nan, 1, "t"), worst_db=math.inf, worst_layer="a"
        )
    )
    found = deployment.read(written(tmp_path, matrix) / deployment.FILE)
    assert found is not None
    assert found.cells[-1].worst_db == math.inf
    assert math.isnan(found.cells[-1].metric.low)
    assert found.cells[:-1] == matrix.cells[:-1]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"cells": 3}', '{"cells": []}', '{"cells": [{"what": 1}]}'])
def test_what_is_no_matrix_is_none(text, tmp_path):
    (tmp_path / deployment.FILE).write_text(text)
    assert deployment.read(tmp_path / deployment.FILE) is None
    assert deployment.read(tmp_path / "missing.json") is None


def test_every_number_of_the_section_is_that_of_the_data():
    matrix = deployments.realistic()
    found = Page(section(matrix))
    square, detail = found.cells("deploy"), found.cells("deploy-cells")
    assert len(square) == len(matrix.trained) * len(matrix.deployed) == 20
    for cell in matrix.cells:
        shown = square[f"{cell.trained}/{cell.deployed}"]
        assert exact(shown) == (cell.metric and cell.metric.mean)
        name = cells.name(cell)
        for key in ("kl_nats", "same_frac", "mib", "size_frac", "speed_ratio", "worst_layer", "layers"):
            value = cell.worst_db if key == "worst_layer" else getattr(cell, key)
            assert exact(detail[f"{name}/{key}"]) == value, (name, key)
        for key in ("metric", "own_delta", "base_delta"):
            interval, entry = getattr(cell, key), detail[f"{name}/{key}"]
            assert exact(entry) == (interval and interval.mean)
            if interval:
                assert [float(entry["data-low"]), float(entry["data-high"])] == [interval.low, interval.high]
                assert entry["data-method"] == interval.method
    assert detail["fp8 > int4/why"]["text"] == deployments.WHY
    assert square["fp32/int4"]["text"].replace("\xa0", " ") == "8.377 (+3.12 %)"
    assert square["fp8/int4"]["text"] == "-"
    text = found.all("section")[0]["text"]
    assert "intervals are over the seeds" in text
    assert "nothing about a GPU" in text
    assert matrix.notes[0] in text


def test_columns_that_nobody_fills_are_left_out_and_accuracies_are_points():
    found = Page(section(deployments.images()))
    assert "why" not in "".join(found.cells("deploy-cells"))
    assert found.cells("deploy")["fp32/int4"]["text"].replace("\xa0", " ") == "97.49 % (-0.56 pt)"
    assert found.cells("deploy-cells")["fp32 > int4/own_delta"]["text"] == "-0.56 pt [-1.71, +0.61]"
    assert "fp32 > int4/speed_ratio" not in found.cells("deploy-cells")
    assert "over validation samples" in found.all("section")[0]["text"]


def test_a_report_has_the_section_when_the_folder_has_a_matrix(tmp_path):
    html, markdown, _ = write_all(comparisons.realistic(), tmp_path)
    without = html.read_text(), markdown.read_text()
    assert "data-group='deploy'" not in without[0]
    write_all(comparisons.realistic(), written(tmp_path, deployments.realistic()))
    found = Page(html.read_text())
    assert exact(found.cells("deploy")["fp32/int8"]) == deployments.cell("fp32", "int8").metric.mean
    tables = tables_of(markdown.read_text())
    assert [len(rows) for rows in tables[1:]] == [5, 21]
    assert tables[1][1][4] == "8.377 (+3.12 %)"
    assert tables[2][4][0] == "fp32 > int4"
    assert tables[2][4][2] == "+3.12 % [+3.01, +3.23]"
    assert tables[2][-2][-1] == deployments.WHY
    assert all(len({len(row) for row in rows}) == 1 for rows in tables)
    assert tables_of("\n\n".join(markdown_parts(deployments.realistic()))) == tables[1:]
    (tmp_path / deployment.FILE).unlink()
    write_all(comparisons.realistic(), tmp_path)
    assert (html.read_text(), markdown.read_text()) == without


def terminal(show, *what, width=120):
    out = io.StringIO()
    show(Console(file=out, width=width, force_terminal=False), *what)
    return out.getvalue()


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("width", [80, 120, 220])
def test_the_terminal_table_fits_and_cuts_no_number(name, width):
    matrix = SAMPLES[name]()
    printed = terminal(print_matrix, matrix, width=width)
    assert all(cell_len(line) <= width for line in printed.splitlines())
    assert "…" not in printed
    columns = {column.key: column for column in cells.columns(matrix)}
    for cell in matrix.cells:
        for key in ("metric", "own_delta"):
            assert columns[key].cell(cell).text in printed
    if name == "realistic":
        assert ("left out at this width" in printed) == (width < 220)
        assert deployments.WHY in " ".join(printed.split())


def judged():
    def near(mean, half, method="t over samples"):
        return Interval(mean, mean - half, mean + half, 64, method)

    layers = [LayerError(f"blocks.{i}.mlp.up", 10.0 + i, 9.0 + i, 20.0 + i) for i in range(12)]
    latencies = [Latency(1, 2.5, 1.25, 102400.0, 0.5, 0.45, 0.56)]
    figures = near(1.5, 0.1), near(1.49, 0.1), near(0.01, 0.002), None, None, None, near(0.004, 0.001)
    return Evaluation("tokens", 64, 16384, *figures, 0.25, 0.981, "Some CPU", latencies, layers)


def test_an_evaluation_is_printed_with_intervals_latencies_and_the_worst_layers():
    printed = " ".join(terminal(print_evaluation, judged(), "int4").split())
    for text in (
        "1.5000 [1.4000, 1.6000]",
        "+0.01000 [+0.00800, +0.01200]",
        "4.482 [4.055, 4.953]",  # exp of 1.4, 1.5, 1.6
        "+1.01 % [+0.80, +1.21]",  # exp(0.01) - 1
        "98.10 % of 16,384 tokens",
        "batch 1: 2.50 ms (before 1.25), 102,400 tokens/s, 0.50x the speed [0.45, 0.56]",
        "the worst 10 of 12",
        "blocks.0.mlp.up",
    ):
        assert text in printed
    assert "blocks.10.mlp.up" not in printed


def test_a_browser_shows_the_section(browser, tmp_path):
    write_all(comparisons.realistic(), written(tmp_path, deployments.realistic()))
    for width in (1000, 400):
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width == 400}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.get((tmp_path / "report.html").as_uri())
        browser.execute_async_script(DRAWN)
        seen = browser.execute_script(
            "const b = document.documentElement; const s = document.querySelector(\"section[data-group='deploy']\");"
            "return {wide: b.scrollWidth, inner: b.clientWidth, tall: s.getBoundingClientRect().height,"
            "        cells: s.querySelectorAll('td').length};"
        )
        assert seen["wide"] <= seen["inner"]
        assert seen["tall"] > 300
        assert seen["cells"] > 100
    logged = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert json.dumps(logged) == "[]"

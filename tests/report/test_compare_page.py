"""The report of a comparison in HTML, Markdown and the terminal: every figure there, every number the data's."""

from __future__ import annotations

import functools
import io
import json
import math
import re
import xml.etree.ElementTree as ET

import comparisons
import pytest
from pages import DRAWN, Page, exact, tables_of
from rich.cells import cell_len
from rich.console import Console

from mptrain.report import wording
from mptrain.report.compare.comparison import Comparison, Interval
from mptrain.report.compare.markdown import markdown
from mptrain.report.compare.page import page
from mptrain.report.compare.terminal import print_comparison_table

FIGURES = {"loss", "loss-late", "difference", "interval", "speed", "memory", "timeline", "layers"}
SAMPLES = {name: getattr(comparisons, name) for name in ("realistic", "crowded", "degenerate")}


@functools.cache
def parsed(name):
    """The page of a sample, parsed once."""
    return Page(page(SAMPLES[name]()))


def expected_summary(variant):
    """What the summary table holds, read off the data."""
    found = {
        "val": variant.loss.val,
        "speed_ratio": None if variant.emulated else variant.speed.ratio,
        "memory_ratio": variant.memory.ratio,
        "overflow_events": variant.health.overflow_events,
        "underflow_frac": variant.health.underflow_frac,
        "skipped_steps": variant.health.skipped_steps,
    }
    return {f"{variant.label}/{name}": value for name, value in found.items()}


@pytest.mark.parametrize("name", SAMPLES)
def test_the_page_is_whole_and_needs_nothing_else(name):
    text, found = page(SAMPLES[name]()), parsed(name)
    assert "<script" not in text
    assert not found.all("script")
    assert {e["href"] for e in found.all("link")} == {"data:,"}
    outside = [e for e in found.found for key in ("src", "href", "xlink:href") if "//" in (e.get(key) or "")]
    assert outside == []
    assert re.findall(r"https?://[^'\" ]*", text.replace("http://www.w3.org/2000/svg", "")) == []
    assert "@import" not in text
    ids = re.findall(r" id='([^']+)'", text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#([^)]+)\)", text)) <= set(ids)
    for svg in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL):
        ET.fromstring(svg)


def test_every_figure_is_there_for_each_group():
    found = parsed("realistic")
    assert {e["data-figure"] for e in found.all("figure")} == FIGURES
    crowded = parsed("crowded")
    groups = {label: {e["data-figure"] for e in crowded.all("figure") if e["group"] == label} for label in GROUPS}
    assert groups == {GROUPS[0]: FIGURES, GROUPS[1]: {"interval", "speed"}}
    said = {e["data-no-figure"] for e in crowded.all("p") if "data-no-figure" in e}
    assert said == {"loss", "difference", "memory", "timeline", "layers"}


GROUPS = [group.label for group in comparisons.crowded().groups]


def test_numbers_in_the_summary_are_those_of_the_data():
    for name in ("realistic", "crowded"):
        comparison, found = SAMPLES[name](), parsed(name)
        for group in comparison.groups[:1]:
            cells = found.cells("summary", group.label if len(comparison.groups) > 1 else None)
            for variant in group.variants:
                for key, value in expected_summary(variant).items():
                    assert exact(cells[key]) == value, key
                delta = variant.loss.val_delta
                cell = cells[f"{variant.label}/val_delta"]
                assert exact(cell) == (delta and delta.mean)
                if delta:
                    assert [float(cell["data-low"]), float(cell["data-high"])] == [delta.low, delta.high]
                    assert (cell["data-n"], cell["data-method"]) == (str(delta.n), "paired t")
                shares = {
                    name: float(cells[f"{variant.label}/coverage"][f"data-{name}"]) for name in variant.health.coverage
                }
                assert shares == variant.health.coverage


def test_numbers_in_the_details_and_of_the_runs_are_those_of_the_data():
    comparison, found = comparisons.realistic(), parsed("realistic")
    details, runs = found.cells("details"), found.cells("runs")
    for variant in comparison.groups[0].variants:
        for part, names in (
            (variant.loss, ("masters", "train", "outside_step", "tokens_to_baseline", "tokens_ratio")),
            (variant.speed, ("tokens_per_s", "mfu_frac", "limit", "reached_frac")),
            (variant.memory, ("peak_gib",)),
        ):
            for name in names:
                assert exact(details[f"{variant.label}/{name}"]) == getattr(part, name)
        for run in variant.runs:
            for name in ("seed", "steps", "val_loss", "tokens_per_s", "peak_memory_gib", "skipped_steps"):
                assert exact(runs[f"{run.name}/{name}"]) == getattr(run, name)
            loss = exact(runs[f"{run.name}/train_loss"])
            assert loss == run.train_loss or (math.isnan(loss) and math.isnan(run.train_loss))
            assert runs[f"{run.name}/status"]["data-value"] == run.status.value
            assert runs[f"{run.name}/why"]["text"] == run.why
    assert exact(next(e for e in found.all("span") if e.get("data-key") == "margin_frac")) == comparison.margin_frac


def test_what_is_shown_is_the_value_rounded_and_an_emulated_speed_is_none():
    cells = parsed("realistic").cells("summary")
    assert cells["fp32/val"]["text"] == "2.4523"
    assert cells["fp32/val"]["data-value"] == "2.45234567"
    assert cells["fp16/val_delta"]["text"].replace("\xa0", " ") == "+0.02 % [-0.11, +0.15]"
    assert cells["fp16/speed_ratio"]["text"] == "2.24x"
    assert cells["fp8/speed_ratio"]["text"] == "emulated"
    assert "data-value" not in cells["fp8/speed_ratio"]
    assert cells["fp8/overflow_events"]["text"] == "1,234"
    assert cells["bf16/val"]["text"] == "-"
    images = parsed("crowded").cells("summary", GROUPS[1])
    assert images["bf16/top1"]["text"].replace("\xa0", " ") == "75.73 %"
    assert images["bf16/top1_delta"]["text"] == "-0.40 pt"


def test_every_verdict_is_said_in_words_beside_a_shape_of_its_own():
    found = parsed("realistic")
    said = [(e["data-kind"], e["text"]) for e in found.all("li") if "data-kind" in e]
    variants = comparisons.realistic().groups[0].variants
    assert [kind for kind, _ in said] == [v.verdict.kind.value for v in variants]
    for (_, text), variant in zip(said, variants, strict=True):
        assert text.startswith(f"{variant.label}: {variant.verdict.text}")
        assert variant.verdict.why in text
    items = re.findall(r"<li data-kind='[^']+'><svg[^>]*>(.*?)</svg>", page(comparisons.realistic()))
    assert len({re.sub("#[0-9a-f]+", "", icon) for icon in items}) == len(variants)  # whatever the colours


def test_runs_link_to_where_the_caller_says():
    found = Page(page(comparisons.realistic(), {"runs/fp16-s1": "../fp16-s1/?a='b'&c"}))
    assert [(e["href"], e["text"]) for e in found.all("a")] == [("../fp16-s1/?a='b'&c", "fp16-s1")]


def test_rules_and_notes_are_there():
    found = parsed("realistic")
    rules = next(e for e in found.all("details"))
    assert "open" not in rules
    for rule in comparisons.RULES:
        assert rule in rules["text"]
    assert comparisons.realistic().notes[0] in found.all("body")[0]["text"]


def test_rows_that_are_left_out_are_counted():
    text = parsed("realistic")
    captions = " ".join(e["text"] for e in text.all("figcaption"))
    assert "The worst 40 of 72 are shown." in captions
    assert "37 of fp16" in captions


def test_labels_cannot_write_html():
    comparison = comparisons.degenerate()
    nasty = comparison.groups[0].variants[0].label
    found = Page(page(comparison, {f"runs/{nasty}": f"../{nasty}"}))
    assert not [e for e in found.all("b") if e["text"] == ""]
    assert nasty in found.all("h1")[0]["text"]
    assert nasty in found.all("title")[0]["text"]
    assert found.cells("summary")[f"{nasty}/verdict"]["text"] == "no verdict"
    assert found.all("a")[0]["href"] == f"../{nasty}"


def test_nothing_to_compare_is_said():
    empty = Comparison("nothing", 0.01, [], [])
    assert "No runs to compare." in page(empty)
    assert "No runs to compare." in markdown(empty)
    assert "no runs to compare" in terminal(empty, 80)
    found = parsed("degenerate")
    said = {e["data-no-figure"]: e["text"] for e in found.all("p") if "data-no-figure" in e}
    assert set(said) == FIGURES - {"loss-late"}
    assert "there is no baseline" in said["difference"]
    assert not found.all("figure")
    assert "No variants in this group." in found.all("body")[0]["text"]


@pytest.mark.parametrize("name", SAMPLES)
def test_markdown_has_a_row_for_every_variant_with_its_text_unharmed(name):
    comparison = SAMPLES[name]()
    groups = [group for group in comparison.groups if group.variants]
    tables = tables_of(markdown(comparison))
    assert len(tables) == len(groups)
    for rows, group in zip(tables, groups, strict=True):
        assert len({len(row) for row in rows}) == 1
        assert [row[0] for row in rows[1:]] == [variant.label for variant in group.variants]
        for row, variant in zip(rows[1:], group.variants, strict=True):
            assert row[1] == f"{wording.SIGNS[variant.verdict.kind]} {variant.verdict.text or 'no verdict'}"
        assert "validation loss" in rows[0] or "training loss" in rows[0]


def test_markdown_has_the_figures_the_rules_and_the_reasons():
    text = markdown(comparisons.realistic())
    (rows,) = tables_of(text)
    fp16 = dict(zip(rows[0], rows[2], strict=True))
    assert fp16["validation loss"] == "2.4528"
    assert fp16["Δ validation loss (95 %)"] == "+0.02 % [-0.11, +0.15]"
    assert fp16["speed"] == "2.24x"
    assert rows[3][rows[0].index("speed")] == "emulated"
    folded = text.split("<details>")[1].split("</details>")[0]
    assert folded.count("\n- ") == len(comparisons.RULES)
    assert "\n- fp8: +1.12 %" in text


def terminal(comparison, width):
    out = io.StringIO()
    print_comparison_table(Console(file=out, width=width, force_terminal=False), comparison)
    return out.getvalue()


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_the_terminal_table_fits_and_cuts_no_number(name, width):
    comparison = SAMPLES[name]()
    printed = terminal(comparison, width)
    lines = printed.splitlines()
    assert all(
        cell_len(line) <= width for line in lines if line != comparison.title.rstrip() and line != comparison.title
    )
    for group in comparison.groups:
        for variant in group.variants:
            delta = variant.loss.top1_delta if group.metric == "top-1" else variant.loss.val_delta
            if delta and not math.isnan(delta.low):
                assert wording.delta(delta) in printed
            if variant.loss.val is not None:
                assert f" {variant.loss.val:.4f} " in printed
            for part in re.split(r"[ .]", variant.label):  # whole somewhere, if not in the table
                assert part in printed
    table = [
        line
        for line in lines
        if any(f" {word}" in line for word in ("✓", "▼", "✗")) and not line.startswith(("✓", "▼"))
    ]
    for line in table:
        assert "…" not in re.split("[✓▼✗]", line, maxsplit=1)[1]


def test_a_wide_terminal_shows_all_and_a_narrow_one_says_what_it_leaves_out():
    wide, narrow = terminal(comparisons.realistic(), 200), terminal(comparisons.realistic(), 80)
    assert "at this width" not in wide
    assert "fp8_e4m3 61 %, fp8_e5m2 31 %, bf16 8.0 %" in wide
    assert "left out at this width: overflow, underflow, skipped, FLOPs" in narrow
    assert "2.24x" in narrow
    assert "▼ fp8: worse by 1.1 % (+1.12 % [+0.81, +1.43] over 3 seeds lies above 0.5 %)" in narrow
    assert comparisons.realistic().notes[0] in narrow


def test_words_for_figures():
    assert (
        wording.loss(None)
        == wording.loss(math.nan)
        == wording.ratio(None)
        == wording.share(None)
        == wording.delta(None)
        == "-"
    )
    assert wording.delta(Interval(0.0021, -0.0005, 0.0047, 3, "")) == "+0.21 % [-0.05, +0.47]"
    assert wording.delta(Interval(-0.00001, -0.00004, 0.5, 3, "")) == "+0.00 % [+0.00, +50.00]"
    assert wording.delta(Interval(0.01, math.nan, math.nan, 1, ""), "pt") == "+1.00 pt"
    assert (wording.loss(2.40312), wording.ratio(1.2549), wording.gib(3.21), wording.share(0.0003)) == (
        "2.4031",
        "1.25x",
        "3.210",
        "0.03 %",
    )
    assert wording.coverage({"bf16": 0.08, "fp8_e4m3": 0.92}) == "fp8_e4m3 92 %, bf16 8.0 %"
    assert (wording.span(1.21, 1.29), wording.span(1.21, 1.2101), wording.span(None, 1.0)) == (" [1.21, 1.29]", "", "")


LOOK = """
const box = e => { const r = e.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; };
const figures = [...document.querySelectorAll('figure svg')].map(svg => ({
  name: svg.closest('figure').dataset.figure, box: box(svg),
  scale: svg.getBoundingClientRect().width / svg.viewBox.baseVal.width,
  texts: [...svg.querySelectorAll('text')].map(t => ({said: t.textContent, box: box(t),
    turned: !!t.closest('g[transform*=rotate]')}))}));
const icons = [...document.querySelectorAll('li svg, table svg')].map(box);
const body = document.documentElement;
return {figures, icons, wide: body.scrollWidth, inner: body.clientWidth,
        boxes: [...document.querySelectorAll('.wide')].map(box)};
"""


def overlap(a, b):
    """By how many pixels two boxes overlap, in the direction in which they do less."""
    return min(min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1]))


@pytest.mark.parametrize("name", SAMPLES)
def test_a_browser_shows_it_without_errors(name, browser, tmp_path):
    file = tmp_path / "report.html"
    file.write_text(page(SAMPLES[name]()), encoding="utf-8")
    browser.get_log("performance")
    for width in (1000, 400):
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width == 400}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.get(file.as_uri())
        browser.execute_async_script(DRAWN)
        seen = browser.execute_script(LOOK)
        assert seen["inner"] <= width
        assert seen["wide"] <= seen["inner"]  # nothing but the boxes that scroll is wider than the page
        assert all(box[2] <= width for box in seen["boxes"])
        assert all(8 < x2 - x1 < 40 and 8 < y2 - y1 < 20 for x1, y1, x2, y2 in seen["icons"])
        assert bool(seen["figures"]) == (name != "degenerate")
        for figure in seen["figures"]:
            look_at(figure)
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    sent = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [one["params"] for one in sent if one["method"] == "Network.requestWillBeSent"]
    ours = [
        one["request"]["url"] for one in asked if one["documentURL"] == file.as_uri()
    ]  # not the browser's start page
    assert len(ours) >= 2  # the file itself, at both widths
    assert {url for url in ours if not url.startswith("data:")} == {file.as_uri()}


def look_at(figure):
    """Not empty, and every text inside it and apart from the others."""
    left, top, right, bottom = figure["box"]
    assert right - left > 300, figure["name"]
    assert bottom - top > 40, figure["name"]
    texts = [(t["said"], t["box"], t["turned"]) for t in figure["texts"]]
    assert texts
    edge = 1.0 * figure["scale"]
    for said, (x1, y1, x2, y2), _ in texts:
        assert x2 > x1, said
        assert left - edge <= x1 <= x2 <= right + edge, (figure["name"], said)
        assert top - edge <= y1 <= y2 <= bottom + edge, (figure["name"], said)
    level = [(said, box) for said, box, turned in texts if not turned]
    for index, (said, box) in enumerate(level):
        for other, there in level[index + 1 :]:
            assert overlap(box, there) <= 2.0, (figure["name"], said, other)

"""A report's HTML taken apart again, and shown in a browser."""

from __future__ import annotations

import shutil
from html.parser import HTMLParser

import pytest
from markdown_it import MarkdownIt


class Page(HTMLParser):
    """Elements by tag with their attributes and text; fails on tags that do not match."""

    def __init__(self, text):
        super().__init__()
        self.found, self.open = [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        element = {"tag": tag, "text": "", **dict(attrs), "inside": [e["tag"] for e in self.open]}
        table = next((e for e in self.open if "data-table" in e), None)
        section = next((e for e in self.open if e["tag"] == "section"), None)
        element["table"] = table and table["data-table"]
        element["group"] = section and section["data-group"]
        self.found.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def all(self, tag):
        return [element for element in self.found if element["tag"] == tag]

    def cells(self, table, group=None):
        return {
            e["data-key"]: e
            for e in self.found
            if e["tag"] == "td" and e["table"] == table and (group is None or e["group"] == group)
        }


def chromium():
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def exact(cell):
    """The number in an attribute, None if it is not known."""
    value = cell.get("data-value")
    return None if value is None else float(value)


def tables_of(text):
    """GitHub's tables as a CommonMark parser with that extension reads them: rows of the cells' text."""
    tables, rows = [], None
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    for before, token in zip([None, *tokens], tokens, strict=False):
        if token.type == "table_open":
            rows = []
            tables.append(rows)
        elif token.type == "tr_open":
            rows.append([])
        elif token.type == "inline" and before is not None and before.type in ("th_open", "td_open"):
            assert {child.type for child in token.children} <= {"text", "text_special"}, token.content
            rows[-1].append("".join(child.content for child in token.children))
    return tables


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Headless Chromium that can reach no network."""
    driver, binary = shutil.which("chromedriver"), chromium()
    if not driver or not binary:
        pytest.skip("needs Chromium and its driver: apt-get install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install mptrain[test]")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    quiet = ["background-networking", "component-update", "sync", "default-apps", "gpu", "extensions"]
    for flag in [
        "headless=new",
        "no-sandbox",
        "no-first-run",
        "disable-dev-shm-usage",
        *(f"disable-{name}" for name in quiet),
    ]:
        options.add_argument(f"--{flag}")
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(driver)) as opened:
        yield opened


VOID = {"meta", "link", "wbr", "br"}
DRAWN = "const done = arguments[0]; document.fonts.ready.then(() => requestAnimationFrame(() => setTimeout(done, 50)));"

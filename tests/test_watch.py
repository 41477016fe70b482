"""The live table of a sweep that is started again, and what a run's folder says of a run that has not begun."""

import io
import json
import time

import pytest
from fake_runs import settings, write
from rich.console import Console

from mptrain.folder import claim
from mptrain.report import watch
from mptrain.report.comparison import Status


def fail(folder, why):
    (folder / "error.json").write_text(json.dumps({"error": why}))


def wait_for(text, out):
    limit = time.monotonic() + 10
    while text not in out.getvalue() and time.monotonic() < limit:
        time.sleep(0.01)
    assert text in out.getvalue()


@pytest.fixture
def out():
    return io.StringIO()


@pytest.fixture
def table(tmp_path, out, monkeypatch):
    """The table of the sweep in ``tmp_path``, as lines into ``out``."""
    monkeypatch.setattr(watch, "EVERY_S", 0.01)
    return watch.Watch(tmp_path, Console(file=out, width=200))


def test_a_failed_run_that_is_retried_is_read_again(tmp_path, table):
    run = write(tmp_path / "a", settings("fp8"), [5.0], finished=False)
    fail(run, "out of GPU memory")
    assert [found.status for found in table.runs()] == [Status.failed]
    (run / "error.json").unlink()
    with claim(run):
        assert [found.status for found in table.runs()] == [Status.running]


def test_every_end_of_a_run_is_told_once(tmp_path, table, out):
    run = write(tmp_path / "a", settings("fp8"), [5.0], finished=False)
    fail(run, "the first failure")
    table.start()
    try:
        wait_for("1 runs are there already", out)
        (run / "error.json").unlink()
        fail(run, "the second failure")
        wait_for("a: failed: the second failure", out)
        write(tmp_path / "again" / "a", settings("fp8"), val=2.5)
        (run / "error.json").unlink()
        (tmp_path / "again" / "a" / "summary.json").rename(run / "summary.json")
        wait_for("a: finished", out)
        time.sleep(0.1)
    finally:
        table.stop()
    said = out.getvalue()
    assert "the first failure" not in said
    assert said.count("the second failure") == said.count("a: finished") == 1

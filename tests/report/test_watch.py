"""The live table of a sweep that is started again, and what a run's folder says of a run that has not begun."""

import contextlib
import io
import json
import signal
import time

import pytest
from fake_runs import settings, write
from rich.console import Console

from mptrain import cli, sweep
from mptrain.report.compare import watch
from mptrain.runs.folder import claim
from mptrain.runs.read import Status, glance
from mptrain.tools.settings import to_plain


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
        wait_for("1 runs already finished", out)
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


# --- jobs that have not begun


def job(sweep, name="a"):
    folder = sweep / name
    folder.mkdir(parents=True)
    (folder / "job.json").write_text(json.dumps({"mark": "m", "names": [name]}))
    return folder


def test_a_job_that_never_began_is_stopped_and_nobody_waits_for_it(tmp_path, capsys, command_line):
    """Its process ended before it wrote the settings; on a waiting status ``--watch`` would look on for ever."""
    write(tmp_path / "b", settings("fp32"))
    folder = job(tmp_path)
    assert (glance(folder).status, glance(folder).why) == (Status.stopped, "never began: start the sweep again")
    with timeout(20):
        assert cli.main(["compare", str(tmp_path), "--watch"]) == 0
    assert "stopped" in capsys.readouterr().out
    (folder / "config.json").write_text('{"model": ')
    assert (glance(folder).status, glance(folder).why) == (Status.unreadable, "config.json is incomplete or corrupt")
    (folder / "config.json").rename(folder / "metrics.jsonl")
    assert glance(folder).why == "no config.json: its settings are unknown"


@contextlib.contextmanager
def timeout(seconds):
    def give_up(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("prepared", [False, True], ids=["before", "after"])
def test_a_job_that_prepares_is_at_work_before_the_run_holds_its_folder(tmp_path, prepared):
    """What the sweep holds while it composes, loads data and measures FP32, before and after ``config.json``."""
    folder = job(tmp_path)
    with sweep._alone(folder):
        if prepared:
            (folder / "config.json").write_text(json.dumps(to_plain(settings("fp8"))))
        assert glance(folder).status is Status.running
    assert glance(folder).status is Status.stopped

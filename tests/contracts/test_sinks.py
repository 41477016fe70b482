"""Every file of mptrain/loggers keeps the same promises. Adding a file tests it."""

import inspect
import io
import json
import math

import pytest
import torch
from rich.console import Console

from mptrain import loggers
from mptrain.config import LoggerConfig, RunConfig
from mptrain.loggers import NullSink, Sinks, Start, open_sinks
from mptrain.tools import registry
from mptrain.tools.settings import to_plain


@pytest.fixture
def start(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    settings = to_plain(RunConfig())
    console = Console(file=io.StringIO(), width=200)

    def begin(*, rank=0, ranks=1, since=0, **logger):
        config = settings | {"logger": settings["logger"] | {"wandb": False} | logger}
        return Start(tmp_path, config, console, torch.device("cpu"), rank, ranks, since)

    return begin


def tell(sink, first=1, last=3):
    """A run as the trainer tells it, with what JSON cannot hold among the figures."""
    for step in range(first, last + 1):
        sink.tick(step)
        sink.metrics(step, {"train/loss": math.nan if step == last else 1.0 / step, "train/grad_norm": math.inf})
        sink.event({"step": step, "event": "alarm", "reason": "a planted one", "layer": "head", "kind": "overflow"})
    sink.summary({"steps": last, "loss": math.nan, "memory": {"peak_gib": 1.5}})
    sink.close()


@pytest.mark.parametrize("kind", loggers.kinds())
class TestEverySink:
    def test_it_takes_a_whole_run(self, kind, start):
        wanted = {"wandb": True} if kind == "wandb" else {"also": kind}
        sink = registry.load("mptrain.loggers", kind).open_sink(start(ranks=2, **wanted))
        tell(sink)

    def test_it_has_every_method_of_a_sink(self, kind, start):
        wanted = {"wandb": True} if kind == "wandb" else {"also": kind}
        sink = registry.load("mptrain.loggers", kind).open_sink(start(ranks=2, **wanted))
        sink.close()
        for name, method in inspect.getmembers(NullSink, inspect.isfunction):
            assert list(inspect.signature(getattr(type(sink), name)).parameters) == list(
                inspect.signature(method).parameters
            ), name

    def test_another_rank_writes_no_file_of_the_run(self, kind, start, tmp_path):
        sink = registry.load("mptrain.loggers", kind).open_sink(start(rank=1, ranks=2, also=kind, wandb=True))
        if sink is not None:
            tell(sink)
        assert [path.name for path in tmp_path.rglob("*") if path.is_file()] in ([], ["rank1.jsonl"])


def test_a_new_file_is_a_new_sink(tmp_path, monkeypatch, start):
    """One file, nothing else: it is named in ``logger.also``, and offered to who mistypes it."""
    folder = tmp_path / "more"
    folder.mkdir()
    (folder / "plain_text.py").write_text(
        "from mptrain.loggers import NullSink\n\n"
        "class Lines(NullSink):\n"
        "    def __init__(self, path):\n        self.path = path\n"
        "    def metrics(self, step, values):\n"
        "        with self.path.open('a') as file:\n            file.write(f'{step} {values}\\n')\n\n"
        "def open_sink(start):\n"
        "    return Lines(start.folder / 'lines.txt') if 'plain_text' in start.config['logger']['also'] else None\n"
    )
    monkeypatch.setattr(loggers, "__path__", [*loggers.__path__, str(folder)])
    LoggerConfig(also="plain_text")
    with pytest.raises(ValueError, match=r"logger\.also=plain_txt is not in .*: did you mean 'plain_text'"):
        LoggerConfig(also="plain_txt")
    with pytest.raises(ValueError, match=r"set logger\.wandb=true"):
        LoggerConfig(also="wandb", wandb=False)
    for also, names in (("", ["ConsoleSink", "JsonLines"]), ("plain_text", ["ConsoleSink", "JsonLines", "Lines"])):
        sinks = Sinks([])
        open_sinks(sinks, start(also=also))
        assert [type(sink).__name__ for sink in sinks.sinks] == names
        sinks.metrics(1, {"train/loss": 2.0})
        sinks.close()
    assert (tmp_path / "lines.txt").read_text() == "1 {'train/loss': 2.0}\n"


def test_json_lines_of_a_resumed_run_hold_each_step_once(start, tmp_path):
    for since, last in ((0, 5), (3, 6)):
        sinks = Sinks([])
        open_sinks(sinks, start(since=since))
        tell(sinks, since + 1, last)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    undone = [json.loads(line)["step"] for line in (tmp_path / "undone.jsonl").read_text().splitlines()]
    assert sorted(undone) == [4, 4, 5, 5], "metrics and events"

"""Running train.py as a user does, in this process, on a few files and a tiny model."""

import contextlib
import io
import json
import runpy
import sys
import sysconfig
from pathlib import Path

from hydra.core.global_hydra import GlobalHydra

ROOT = Path(__file__).parents[2]
CORPUS = Path(sysconfig.get_path("stdlib")) / "asyncio"
TINY = (
    f"data.root={CORPUS}",
    "model.n_layer=2",
    "model.n_head=2",
    "model.n_embd=32",
    "model.block_size=32",
    "trainer.max_steps=6",
    "trainer.batch_size=2",
    "trainer.eval_batches=2",
    "telemetry.every=2",
)


def train(monkeypatch, tmp_path, *overrides, code=0):
    """Run train.py in this process; returns what it printed (stdout and stderr)."""
    flags = [word for word in overrides if word.startswith("-")]
    settings = [*TINY, f"runs_dir={tmp_path / 'runs'}", "logger=jsonl", *(w for w in overrides if w not in flags)]
    monkeypatch.setattr(sys, "argv", ["train.py", *flags, *settings])
    GlobalHydra.instance().clear()
    out, err = io.StringIO(), io.StringIO()
    status = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
        except SystemExit as leaving:
            status = leaving.code or 0
    text = out.getvalue() + err.getvalue()
    assert status == code, text
    return text


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def events_of(folder):
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]

"""Programs started by a run or a command: ``python -m mptrain.cli.subprocesses probe|run SETTINGS ...``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from mptrain import build
from mptrain.build import fp32
from mptrain.cli.errors import clear_errors
from mptrain.config import RunConfig
from mptrain.distributed.joining import left_cleanly
from mptrain.runs import baseline
from mptrain.tools.settings import from_plain


def probe(argv: list[str]) -> None:
    """Probe FP32 for a run: read settings from one JSON file, write figures to another."""
    settings_file, figures_file = argv
    config = from_plain(RunConfig, json.loads(Path(settings_file).read_text()), "config")
    Path(figures_file).write_text(baseline.figures_json(fp32.probe(config)))


def run(argv: list[str]) -> None:
    """Run from a JSON file of settings; ``mptrain verify-resume`` starts this, alone or under torchrun."""
    with left_cleanly():
        training = build.build(from_plain(RunConfig, json.loads(Path(argv[0]).read_text()), "config"))
        if training is None:
            raise SystemExit(0)
        training.train()
        stopped = training.trainer.interrupts.stopped_by
        raise SystemExit(0 if stopped is None else 128 + stopped)


if __name__ == "__main__":
    with clear_errors():
        {"probe": probe, "run": run}[sys.argv[1]](sys.argv[2:])

"""``mptrain bench dist``: every line of the benchmark on two ranks with tiny sizes, and that it sees what is slow."""

from __future__ import annotations

import json
import runpy
import time
from pathlib import Path

import pytest
import ranks
import torch

from mptrain.bench import dist, ranked, rows, saving
from mptrain.bench.by_hand import ByHand
from mptrain.checkpoint.checkpoints import Checkpoints
from mptrain.distributed.compression import KINDS
from mptrain.training.trainer import Trainer

pytestmark = pytest.mark.multi
MEASURE = Path(__file__).parents[2] / "recipes" / "measure.py"


def test_dry_run_has_every_row(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    path = tmp_path / "bench.json"
    assert dist.run(["--dry-run", "--json", str(path), "--folder", str(tmp_path), "--device", "cpu"]) == 0
    found = json.loads(path.read_text())
    assert found["machine"]["torch"] == torch.__version__
    assert found["machine"]["ranks"] == "2"
    assert found["machine"]["command"].startswith("mptrain bench dist --dry-run")
    rows = {row["name"]: row for row in found["rows"]}
    assert len(rows) == len(found["rows"]) == 2 * 3 + 2 * 4 + 1 + 4 * (len(KINDS) - 1)
    judged = {name: row["target"] for name, row in rows.items() if row["target"] is not None}
    assert sorted(judged.values()) == [0.1, 0.1, 1.03, 1.03]
    for name, row in rows.items():
        if row["measured"] is None:
            assert "while it is written" in name
            continue
        assert row["measured"] > 0
        within = "met" if row["target"] is not None and row["measured"] <= row["target"] else "missed"
        assert row["verdict"] == (within if name in judged else "information")
        assert row["noise"] is not None or name not in judged
    shares = {kind: rows[f"compress={kind}: bytes / none"]["measured"] for kind in KINDS if kind != "none"}
    assert shares["bf16"] == shares["fp16"] == 0.5
    assert 0.25 < shares["fp8"] < 0.27
    assert [entry.name for entry in tmp_path.iterdir()] == ["bench.json"], "checkpoints are taken away"
    table = runpy.run_path(str(MEASURE))["bench_table"](found)
    assert [name for name in rows if name not in table] == []


def _planted(rank, folder):
    """Verdicts under DDP with a sleep planted in one side's steps, then in the other's; then in background saves."""
    dist.WRAPPERS = saving.WRAPPERS = ("ddp",)
    found = {}
    for side in (Trainer, ByHand):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(side, "step", lambda self, step=side.step: (step(self), time.sleep(0.2)))
            found[side.__name__] = _verdicts(dist.measure_steps(ranked.TINY, "cpu"))
    saving.Checkpoints = SlowInBackground
    return found | {"save": _verdicts(saving.measure_checkpoints(ranked.TINY, "cpu", folder))}


def _verdicts(rows):
    return [row.verdict for row in rows if row.target is not None]


class SlowInBackground(Checkpoints):
    def __init__(self, *args, background):
        super().__init__(*args, background=background)
        self.delay_s = 1.0 if background else 0.0

    def save(self, *args):
        time.sleep(self.delay_s)
        return super().save(*args)


def test_what_is_slow_is_missed(tmp_path):
    wanted = {"Trainer": ["missed"], "ByHand": ["met"], "save": ["missed"]}
    assert ranks.run(2, _planted, tmp_path) == [wanted] * 2


@pytest.mark.parametrize(("stall", "verdict"), [(0.09, "met"), (0.11, "missed")])
def test_a_stall_is_judged_by_the_save_that_is_waited_for(stall, verdict):
    measured = object.__new__(saving.Saving)
    samples = {"synchronous": [1.0, 2.0, 4.0], "stall": [stall, 2 * stall, 40.0], "step": [1.0, 1.0, 1.0]}
    twins = {name + rows.TWIN: samples[name] for name in ("synchronous", "step")}
    measured.samples = samples | twins | {"step while writing": [1.5, 1.5]}
    first, *_, last = measured.rows("x", first=3.0)
    assert (first.verdict, first.measured, first.noise) == (verdict, stall, 1.0)
    assert last.measured == 1.5


def test_figures_are_medians_of_paired_ratios():
    turns = rows.Turns({}, repeats=0)
    turns.samples = {
        "a": [(2.0, 1.0), (30.0, 1.0), (9.0, 1.0)],
        "b": [(1.0, 1.0), (10.0, 2.0), (1.0, 4.0)],
        "b" + rows.TWIN: [(1.0, 0.0), (20.0, 0.0), (3.0, 0.0)],
    }
    row = turns.fill(ranked.Row("a / b", 3.0), "a", "b")
    assert (row.measured, row.cpu, row.noise, row.verdict) == (3.0, 0.5, 2.0, "met")
    assert "0.5" in str(row)


def test_more_ranks_than_gpus_is_said():
    with pytest.raises(ValueError, match=r"--ranks 99 on \d+ GPUs: give --device cpu"):
        dist.run(["--ranks", "99", "--device", "cuda"])

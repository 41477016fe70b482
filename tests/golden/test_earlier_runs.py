"""Run folders and a checkpoint of an earlier version, kept in earlier/: today's code resumes and reads them.

Written by train.py at version 0.1.0 (model=vit-nano of one block, data=digits, 8 steps). ``interrupted`` is fp16, cut
after its checkpoint of step 4.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KEPT = Path(__file__).parent / "earlier"
STEPS = 8
MPTRAIN = [sys.executable, "-c", "import sys; from mptrain.cli import main; sys.exit(main())"]


@pytest.fixture
def earlier(tmp_path, monkeypatch):
    monkeypatch.setenv("MPTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    shutil.copytree(KEPT, tmp_path / "earlier")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "earlier"


def losses_of(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["train/loss_step"] for row in rows if "train/loss_step" in row}


def test_an_earlier_run_is_resumed_from_its_checkpoint(earlier):
    quiet = ["hydra.run.dir=.", "hydra.output_subdir=null"]
    command = [sys.executable, str(ROOT / "train.py"), "run_dir=earlier/interrupted", "resume=auto", *quiet]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    again, before = losses_of(earlier / "interrupted"), losses_of(KEPT / "fp16")
    assert list(again) == list(range(1, STEPS + 1))
    assert again == pytest.approx(before, rel=2e-4)  # FP16 on another CPU, as in test_golden_losses.py
    summary = json.loads((earlier / "interrupted" / "summary.json").read_text())
    assert summary["val_loss"] == pytest.approx(
        json.loads((KEPT / "fp16" / "summary.json").read_text())["val_loss"], rel=2e-4
    )


def test_earlier_runs_are_compared(earlier):
    words = ["compare", "earlier/fp32", "earlier/fp16", "--json", "found.json", "--html", "found.html"]
    done = subprocess.run([*MPTRAIN, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    (group,) = json.loads(Path("found.json").read_text())["groups"]
    fp32, fp16 = group["variants"]
    assert [fp32["verdict"]["kind"], fp16["verdict"]["kind"]] == ["baseline", "undecided"]
    assert fp32["curve"]["values"] == list(losses_of(KEPT / "fp32").values())
    assert fp16["loss"]["val"] == json.loads((KEPT / "fp16" / "summary.json").read_text())["val_loss"]
    assert fp16["memory"]["ratio"] == pytest.approx(0.952, abs=1e-3)
    assert "<svg" in Path("found.html").read_text()


def test_an_earlier_run_is_inspected(earlier):
    words = ["inspect", "earlier/fp16", "--json", "--html", "found.html"]
    done = subprocess.run([*MPTRAIN, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "blocks.0.attention.qkv" in done.stdout
    assert "<svg" in Path("found.html").read_text()

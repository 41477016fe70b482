"""train.py as a user runs it: bad input, every precision to the end, a second run, resumption, interruption."""

import math
import os
import shutil
import signal
import subprocess
import sys
import time

import commands
import numpy as np
import pytest
import torch
import wandb_files
from commands import ROOT, TINY, events_of, rows_of, summary_of, train
from safetensors.torch import save_file

from mptrain.telemetry.meters import Throughput

PRECISIONS = sorted(path.stem for path in (ROOT / "conf" / "precision").glob("*.yaml"))
pytestmark = pytest.mark.usefixtures("command_line")


BAD = {
    "unknown option": (["precision=fp9"], ["precision=fp9", "did you mean 'fp8'"]),
    "unknown group": (["precison=fp8"], ["precison", "did you mean 'precision'"]),
    "unknown key": (["trainer.batch=3"], ["trainer.batch", "did you mean 'batch_size'"]),
    "added key": (["+trainer.foo=1"], ["trainer.foo"]),
    "added root key": (["+foo=1"], ["foo", "trainer"]),
    "unknown model key": (["model.nlayer=3"], ["model.nlayer", "did you mean 'n_layer'"]),
    "unknown kind": (["model.kind=gpd"], ["gpd", "did you mean 'gpt'"]),
    "illegal format": (["precision.compute=fp33"], ["precision.compute=fp33", "bf16"]),
    "format in the wrong place": (["precision=fp8", "precision.quantization.forward=bf16"], ["precision.quantization"]),
    "TE is not here": (["precision=fp8", "precision.backend=te"], ["precision.backend=te", "emulated"]),
    "no GPU": (["device=cuda"], ["device=cuda", "device=cpu"]),
    "zero batch": (["trainer.batch_size=0"], ["trainer.batch_size=0", "at least 1"]),
    "not a number": (["trainer.max_steps=x"], ["trainer.max_steps=x", "Integer"]),
    "not a number in an open group": (["model.n_layer=abc"], ["model.n_layer='abc'", "whole number"]),
    "no tokens file named": (["data=tokens", "~data.root"], ["data.train"]),
    "corpus shorter than a block": (["model.block_size=100000000"], ["model.block_size="]),
    "resume without a folder": (["resume=auto"], ["resume=auto", "run_dir"]),
    "no such checkpoint": (["resume=/nowhere/step.safetensors"], ["/nowhere/step.safetensors", "resume=auto"]),
    "no such baseline": (["baseline=/nowhere"], ["baseline=/nowhere", "FP32 run"]),
    "bad syntax": (["trainer.max_steps=["], ["["]),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="some of these settings work where there is a GPU")
@pytest.mark.parametrize("overrides", [pytest.param(case, id=name) for name, case in BAD.items()])
def test_bad_input_is_one_message_that_names_the_setting(monkeypatch, tmp_path, overrides):
    given, wanted = overrides
    text = train(monkeypatch, tmp_path, *given, code=2)
    error = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert "Traceback" not in text
    for words in wanted:
        assert words in error[0]
    assert not (tmp_path / "runs").exists()


def test_a_tokens_file_that_is_not_there(monkeypatch, tmp_path):
    missing = tmp_path / "train.bin"
    monkeypatch.setattr(commands, "TINY", ())
    text = train(monkeypatch, tmp_path, "data=tokens", f"data.train={missing}", f"data.validation={missing}", code=2)
    assert f"data.train={missing}" in text
    assert "Traceback" not in text


def test_token_shards_train(monkeypatch, tmp_path):
    words = np.random.Philox(key=[1, 2]).random_raw(4000) % np.uint64(50)
    for name in ("train", "validation"):
        words.astype("<u2").tofile(tmp_path / f"{name}.bin")
    monkeypatch.setattr(commands, "TINY", TINY[1:])
    given = [f"data.{name}={tmp_path / name}.bin" for name in ("train", "validation")]
    train(
        monkeypatch, tmp_path, "data=tokens", "data.vocab_size=50", *given, f"run_dir={tmp_path / 'a'}", "baseline=none"
    )
    assert abs(summary_of(tmp_path / "a")["train_loss"] - math.log(50)) < 0.5


@pytest.mark.parametrize("setting", ["run_dir", "runs_dir"])
def test_an_unwritable_folder_names_the_setting(monkeypatch, tmp_path, setting):
    (tmp_path / "file").write_text("in the way")
    text = train(monkeypatch, tmp_path, f"{setting}={tmp_path / 'file' / 'run'}", code=2)
    assert f"error: {setting}=" in text
    assert (tmp_path / "file").read_text() == "in the way"


def test_foreign_and_torn_checkpoints_are_refused_before_anything_is_made(monkeypatch, tmp_path):
    train(monkeypatch, tmp_path, "baseline=none", f"run_dir={tmp_path / 'a'}")
    (whole,) = (tmp_path / "a" / "checkpoints").iterdir()
    torn, foreign = tmp_path / "torn", tmp_path / "foreign.safetensors"
    shutil.copytree(whole, torn)
    tensors = torn / "rank-00000.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-100])
    save_file({"x": torch.ones(3)}, foreign)
    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    wide = train(monkeypatch, tmp_path, f"resume={whole}", "model.n_embd=64", f"run_dir={tmp_path / 'b'}", code=2)
    assert "another model" in wide
    going_on = f"run_dir={tmp_path / 'b'}", "trainer.max_steps=12"
    assert "is damaged" in train(monkeypatch, tmp_path, f"resume={torn}", *going_on, code=2)
    assert "not a checkpoint" in train(monkeypatch, tmp_path, f"resume={foreign}", f"run_dir={tmp_path / 'b'}", code=2)
    assert "already holds a run" in train(monkeypatch, tmp_path, f"run_dir={tmp_path / 'a'}", code=2)
    assert not (tmp_path / "b").exists()
    assert {path.name: path.read_bytes() for path in whole.iterdir()} == before


def test_what_the_products_ran_in_is_in_the_summary_or_ends_the_run(monkeypatch, tmp_path):
    done, stopped = tmp_path / "done", tmp_path / "stopped"
    text = train(monkeypatch, tmp_path, "precision=fp8", "baseline=none", f"run_dir={done}")
    shares = summary_of(done)["gemm_coverage"]
    assert sum(shares.values()) == pytest.approx(1.0)
    assert f"GEMM FLOPs     {summary_of(done)['gemm_flops']}" in text
    assert summary_of(done)["audit"] == []
    limits = ("precision=fp8", "precision.keep='.*'", "audit.min_coverage=0.5")
    text = train(monkeypatch, tmp_path, *limits, "baseline=none", f"run_dir={stopped}", code=2)
    assert "error: audit.min_coverage=0.5 is not reached" in text
    assert "nothing was quantized" in text
    assert (stopped / "config.json").is_file()
    assert not (stopped / "checkpoints").exists()


NEEDED = {"precision", "backend", "emulated", "steps", "skipped_steps", "train_loss", "val_loss", "tokens_per_s"}
NEEDED |= {"peak_memory_gib", "overflow_events", "underflow_frac", "baseline"}


def test_every_precision_runs_to_the_end_and_is_compared_with_the_fp32_run(monkeypatch, tmp_path):
    reference = tmp_path / "runs" / "reference"
    train(monkeypatch, tmp_path, "precision=fp32", f"run_dir={reference}")
    fp32 = summary_of(reference)
    assert fp32.keys() >= NEEDED
    assert fp32["baseline"]["source"] == "none"
    for name in PRECISIONS:
        if name == "fp32":
            continue
        folder = tmp_path / "runs" / f"of-{name}"
        text = train(monkeypatch, tmp_path, f"precision={name}", f"run_dir={folder}")
        summary = summary_of(folder)
        assert summary.keys() >= NEEDED
        assert summary["precision"] == name
        assert summary["steps"] == 6
        assert summary["fingerprint"] == fp32["fingerprint"]
        steps = [row["step"] for row in rows_of(folder) if "train/loss_step" in row]
        assert steps == [1, 2, 3, 4, 5, 6]
        assert str(folder) in text
        base = summary["baseline"]
        assert base["source"] == f"run {reference}"
        assert base["step"] == 6
        assert base["loss_delta"] == pytest.approx(summary["train_loss"] - fp32["train_loss"], abs=1e-12)
        ratio = pytest.approx(base["tokens_per_s"] / fp32["tokens_per_s"])
        assert base["speedup"] == (None if summary["emulated"] else ratio)  # an emulation is no speed-up
        assert base["memory_ratio"] == pytest.approx(summary["peak_memory_gib"] / fp32["peak_memory_gib"])
        assert abs(summary["plan"]["plan_error_frac"]) < 1e-3
        (graded,) = [row for row in rows_of(folder) if "memory/plan_error_frac" in row]
        assert graded["memory/plan_error_frac"] == summary["plan"]["plan_error_frac"]
        assert "memory plan" in text
        assert summary["val_loss"] != fp32["val_loss"]
        assert abs(base["loss_delta"]) < 0.02
        assert "undecided: 6 steps" in text
        # A scale from the amaxes of steps before may saturate an element or a few of the 10^5; no other precision may.
        assert summary["overflow_events"] <= (100 if name == "fp8-delayed" else 0)
        if summary["emulated"]:
            assert "numerics are exact, speed is not" in text
        if name == "fp8":
            assert "current scaling fits" in text


def test_the_probe_measures_fp32_on_the_same_weights_and_batches(monkeypatch, tmp_path):
    text = train(monkeypatch, tmp_path, "precision=bf16", "trainer.max_steps=10", f"run_dir={tmp_path / 'b'}")
    assert "a probe of 8 steps comes first" in text
    base = summary_of(tmp_path / "b")["baseline"]
    assert base["source"] == "probe of 8 steps"
    assert base["step"] == 8
    # The oracle: the FP32 run itself, in this process.
    train(monkeypatch, tmp_path, "precision=fp32", "trainer.max_steps=10", f"run_dir={tmp_path / 'f'}")
    losses = {row["step"]: row["train/loss_step"] for row in rows_of(tmp_path / "f") if "train/loss_step" in row}
    assert base["fp32_loss"] == losses[8]
    again = train(monkeypatch, tmp_path, "precision=fp16", "trainer.max_steps=10", f"run_dir={tmp_path / 'c'}")
    assert "in a process of its own" not in again  # the first probe's figures, or the FP32 run beside it


@pytest.mark.parametrize("name", PRECISIONS)
def test_a_resumed_run_continues_bit_for_bit(monkeypatch, tmp_path, name):
    given = [f"precision={name}", "baseline=none", "checkpoint.every=3", "checkpoint.keep=3"]
    train(monkeypatch, tmp_path, *given, f"run_dir={tmp_path / 'whole'}")
    half = tmp_path / "whole" / "checkpoints" / "step-00000003"
    train(monkeypatch, tmp_path, *given, f"run_dir={tmp_path / 'half'}", f"resume={half}")
    whole, half = rows_of(tmp_path / "whole"), rows_of(tmp_path / "half")
    losses = {row["step"]: row["train/loss_step"] for row in whole if "train/loss_step" in row and row["step"] > 3}
    assert losses == {row["step"]: row["train/loss_step"] for row in half if "train/loss_step" in row}
    ends = [summary_of(tmp_path / folder)["val_loss"] for folder in ("whole", "half")]
    assert ends[0] == ends[1]


def test_resume_auto_goes_on_in_the_same_folder_and_across_precisions(monkeypatch, tmp_path):
    given = ["baseline=none", f"run_dir={tmp_path / 'run'}"]
    train(monkeypatch, tmp_path, *given, "precision=bf16")
    train(monkeypatch, tmp_path, *given, "precision=fp8-delayed", "resume=auto", "trainer.max_steps=8")
    assert summary_of(tmp_path / "run")["steps"] == 8
    steps = [row["step"] for row in rows_of(tmp_path / "run") if "train/loss_step" in row]
    assert steps == [1, 2, 3, 4, 5, 6, 7, 8]


def test_runs_without_a_name_get_a_folder_each(monkeypatch, tmp_path):
    for _ in range(2):
        train(monkeypatch, tmp_path, "precision=bf16", "baseline=none", "trainer.max_steps=1")
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["gpt-bf16-1", "gpt-bf16-2"]


def test_wandb_offline_file_holds_the_metrics_and_the_comparison(monkeypatch, tmp_path):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    given = ["precision=fp8", "logger=default", "trainer.max_steps=8", f"run_dir={tmp_path / 'run'}"]
    given += ["debug.inject=3:head:grad_weight:inf", "telemetry.alarm_flushed_frac=0"]
    text = train(monkeypatch, tmp_path, *given)
    assert "W&B is off" not in text
    found = wandb_files.read(tmp_path / "run")
    logged, final, alerts = found.logged, found.final, found.alerts
    losses = [row["train/loss_step"] for row in rows_of(tmp_path / "run") if "train/loss_step" in row]
    assert logged["train/loss_step"] == losses
    assert logged["numerics/overflow_events"][0] == 0
    assert all(math.isfinite(value) for value in logged["speed/tokens_per_s"])
    shown = logged["magnitude/blocks.0.mlp.up/input/values"]
    assert [sum(counts) for counts in shown] == [2 * 32 * 32] * 3, "steps 1, 8, and 5: nobody saw what spoilt 3"
    assert logged["heatmap/grad_output/_type"] == ["html-file"] * 3
    assert logged["events/nrows"] == [len(events_of(tmp_path / "run"))]
    assert any("flushed to zero" in text for text in alerts)
    summary = summary_of(tmp_path / "run")
    assert final["baseline/source"] == "probe of 8 steps"
    for key in ("memory_ratio", "loss_delta"):
        assert final[f"baseline/{key}"] == pytest.approx(summary["baseline"][key])
    assert summary["baseline"]["speedup"] is None, "the speed of an emulation is no speed-up"


def start(tmp_path, *overrides):
    command = [sys.executable, "train.py", *TINY, "logger=jsonl", "baseline=none", *overrides]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_run_goes_on_from_there(monkeypatch, tmp_path, number):
    folder = tmp_path / "run"
    process = start(tmp_path, "precision=fp8", f"run_dir={folder}", "trainer.max_steps=100000")
    wait_for(folder / "metrics.jsonl", process)
    process.send_signal(number)
    text = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + number, text
    assert "resume=auto" in text
    assert "Traceback" not in text
    steps = summary_of(folder)["steps"]
    assert steps >= 1
    given = ["precision=fp8", "baseline=none", f"run_dir={folder}", "resume=auto", f"trainer.max_steps={steps + 2}"]
    train(monkeypatch, tmp_path, *given)
    assert summary_of(folder)["steps"] == steps + 2


def test_an_interrupted_probe_leaves_no_process_and_no_folder(monkeypatch, tmp_path):
    given = ["precision=bf16", "baseline=auto", f"runs_dir={tmp_path / 'runs'}", "trainer.max_steps=100000"]
    process = start(tmp_path, *given, "model.n_layer=40")
    for line in process.stdout:
        if "in a process of its own" in line:
            break
    time.sleep(1.0)
    process.send_signal(signal.SIGTERM)
    text = process.communicate(timeout=60)[0]
    assert process.returncode == 130, text
    assert "Traceback" not in text
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [".fp32-probes"]
    assert [path.name for path in (tmp_path / "runs" / ".fp32-probes").iterdir()] == ["lock"]


def wait_for(path, process):
    for _ in range(1200):
        if path.exists() and path.stat().st_size:
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    raise AssertionError(f"no {path} after a minute")


def test_the_traceback_is_there_for_those_who_ask(tmp_path):
    command = [sys.executable, "train.py", "trainer.batch_size=0"]
    shown = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "HYDRA_FULL_ERROR": "1"}, capture_output=True, text=True
    )
    assert "Traceback" in shown.stderr


def test_throughput_leaves_out_the_warm_up():
    meter = Throughput(100)
    for seconds in (9.0, 9.0, 9.0, 1.0, 2.0, 4.0):
        meter.add(seconds)
    assert meter.tokens_per_s() == 50.0
    assert meter.tokens_per_s(first=4) == 100.0
    assert meter.tokens_per_s(last=1) == 25.0


def test_deterministic_is_what_a_cpu_is_anyway(monkeypatch, tmp_path):
    """On a GPU it chooses other algorithms; here a run is the same with it, and the next run does not inherit it."""
    for name in ("true", "false"):
        train(
            monkeypatch,
            tmp_path,
            "precision=fp8",
            "baseline=none",
            f"deterministic={name}",
            f"run_dir={tmp_path / name}",
        )
        assert torch.are_deterministic_algorithms_enabled() is (name == "true")
    losses = [[row.get("train/loss_step") for row in rows_of(tmp_path / name)] for name in ("true", "false")]
    assert losses[0] == losses[1]

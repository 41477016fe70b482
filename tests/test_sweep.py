"""Sweeps as a user starts them: one folder, one report, nothing done twice, failures as rows; every launcher."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import wandb_files
from commands import ROOT, TINY, rows_of, summary_of, train
from hydra import compose, initialize_config_dir

from mptrain import config, sweep
from mptrain.precision.policy import conf_dir

pytestmark = pytest.mark.usefixtures("command_line")


def start(monkeypatch, tmp_path, *overrides, code=0):
    return train(monkeypatch, tmp_path, "-m", f"sweep_dir={tmp_path / 's'}", *overrides, code=code)


def runs_in(folder):
    return {path.parent.name: path.stat().st_mtime_ns for path in folder.glob("*/summary.json")}


def test_one_command_ends_with_table_verdicts_and_report(monkeypatch, tmp_path):
    said = start(monkeypatch, tmp_path, "precision=fp32,bf16", "seed=0,1")
    folder = tmp_path / "s"
    assert set(runs_in(folder)) == {f"precision={p},seed={s}" for p in ("fp32", "bf16") for s in (0, 1)}
    report = json.loads((folder / "report.json").read_text())
    variants = {v["label"]: v for v in report["groups"][0]["variants"]}
    assert report["groups"][0]["baseline"] == "fp32"
    assert "6 steps are too few" in variants["bf16"]["verdict"]["text"]
    values = [summary_of(folder / f"precision=bf16,seed={s}")["val_loss"] for s in (0, 1)]
    assert variants["bf16"]["loss"]["val"] == pytest.approx(sum(values) / 2)
    drawn = (folder / "report.html").read_text()
    assert drawn.count("<figure") >= 5
    for name in runs_in(folder):
        for key in ("train_loss", "val_loss", "tokens_per_s", "peak_memory_gib", "skipped_steps"):
            shown = re.search(rf"data-key='{re.escape(name)}/{key}' data-value='([^']+)'", drawn)
            assert float(shown[1]) == summary_of(folder / name)[key], f"{name}/{key}"
    assert "| bf16 |" in (folder / "report.md").read_text()
    assert said.rstrip().splitlines()[-1].startswith(f"report: {folder / 'report.html'}")
    assert "precision=bf16,seed=1: finished, loss" in said
    assert not (tmp_path / "runs").exists()  # no probe, no run outside the sweep
    assert "step 6/6" in (folder / "precision=bf16,seed=1" / "console.log").read_text()


def test_the_same_sweep_again_repeats_nothing_and_a_larger_one_adds(monkeypatch, tmp_path):
    start(monkeypatch, tmp_path, "precision=fp32", "seed=0,1")
    before = runs_in(tmp_path / "s")
    said = start(monkeypatch, tmp_path, "precision=fp32", "seed=0,1,2")
    after = runs_in(tmp_path / "s")
    assert {name: after[name] for name in before} == before
    assert set(before) == {"seed=0", "seed=1"}
    assert set(after) == {"seed=0", "seed=1", "seed=2"}
    assert "2 runs already finished" in said


def test_without_a_folder_the_sweep_has_one_of_its_own(monkeypatch, tmp_path):
    for seeds in ("0,1", "0,1", "1,2"):
        train(monkeypatch, tmp_path, "-m", "precision=fp32", f"seed={seeds}", "trainer.max_steps=1")
    names = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert len(names) == 2
    assert all(re.fullmatch("sweep-seed-[0-9a-f]+", name) for name in names), names


def test_a_sweep_that_names_its_last_number_of_seeds_goes_on_in_one_folder(monkeypatch, tmp_path):
    for seeds in ("0", "0,1"):
        given = ["-m", "precision=fp32", f"seed={seeds}", "sweep_seeds=4", "trainer.max_steps=1"]
        train(monkeypatch, tmp_path, *given)
    (folder,) = (tmp_path / "runs").iterdir()
    plan = json.loads((folder / "sweep.json").read_text())
    assert (plan["seeds"], plan["last_seeds"]) == ([0, 1], 4)
    assert len(runs_in(folder)) == 2
    said = train(monkeypatch, tmp_path, "-m", "precision=fp32", "seed=0,1", "sweep_seeds=7", code=2)
    assert "sweep_seeds=7 cannot work: use 0 or one of 4, 5, 6, 8, 10" in said


def test_jobs_that_would_compute_the_same_run_once(monkeypatch, tmp_path):
    start(monkeypatch, tmp_path, "precision=fp32,bf16", "precision.quantization.history=1,2", "seed=0")
    assert set(runs_in(tmp_path / "s")) == {"precision=fp32,history=1", "precision=bf16,history=1"}
    known = json.loads((tmp_path / "s" / "precision=fp32,history=1" / "job.json").read_text())
    assert known["names"] == ["precision=fp32,history=1", "precision=fp32,history=2"]


def test_a_job_that_fails_is_a_row_and_does_not_end_the_others(monkeypatch, tmp_path):
    said = start(monkeypatch, tmp_path, "precision=fp32,bf16", "optim=adamw-bf16,adamw", "seed=0", code=1)
    assert set(runs_in(tmp_path / "s")) == {
        "precision=fp32,optim=adamw", "precision=bf16,optim=adamw", "precision=bf16,optim=adamw-bf16"
    }  # fmt: skip
    assert "precision=fp32,optim=adamw-bf16 failed: optim.weights=bf16 stores BF16 weights" in said
    error = json.loads((tmp_path / "s" / "precision=fp32,optim=adamw-bf16" / "error.json").read_text())
    assert "Traceback" in error["traceback"]
    report = json.loads((tmp_path / "s" / "report.json").read_text())
    rows = [row for v in report["groups"][0]["variants"] for row in v["runs"]]
    assert [row["status"] for row in rows].count("failed") == 1


def test_settings_that_cannot_be_read_are_a_row_too(monkeypatch, tmp_path):
    said = start(monkeypatch, tmp_path, "precision=fp32", "trainer.clip=1.0,-1.0", code=1)
    assert "clip=-1.0 failed: trainer.clip=-1.0 cannot work" in said
    assert list(runs_in(tmp_path / "s")) == ["clip=1.0"]


def test_a_typo_ends_the_sweep_before_its_first_job(monkeypatch, tmp_path):
    said = start(monkeypatch, tmp_path, "precision=fp32,fp9", "seed=0", code=2)
    assert "precision=fp9 is unknown: did you mean" in said
    assert not runs_in(tmp_path / "s")


def test_what_belongs_to_sweeps_is_refused_without_m(monkeypatch, tmp_path):
    assert "sweep_dir is for sweeps: add -m" in train(monkeypatch, tmp_path, "sweep_dir=x", code=2)
    assert "ablation is for sweeps: add -m" in train(monkeypatch, tmp_path, "ablation=rate", code=2)
    assert "sweep_seeds is for sweeps: add -m" in train(monkeypatch, tmp_path, "sweep_seeds=4", code=2)


def command(tmp_path, *overrides):
    settings = [*TINY, "logger=jsonl", f"sweep_dir={tmp_path / 's'}", *overrides]
    return [sys.executable, str(ROOT / "train.py"), "-m", *settings]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_sweep_that_was_killed_goes_on_where_it_was(tmp_path, number):
    """A real process, ended in the middle of its second run; started again it does the rest, and the same losses."""
    words = command(tmp_path, "precision=fp32", "seed=0,1", "trainer.max_steps=60", "telemetry.every=1")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        second = tmp_path / "s" / "seed=1" / "metrics.jsonl"
        limit = time.monotonic() + 120
        while not (second.exists() and second.read_text().count("\n") > 5) and time.monotonic() < limit:
            time.sleep(0.02)
        process.send_signal(number)
        said = process.communicate()[0]
    assert process.returncode == (-9 if number is signal.SIGKILL else 130), said
    first = runs_in(tmp_path / "s")
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    assert "report:" in done.stdout
    after = runs_in(tmp_path / "s")
    assert set(after) == {"seed=0", "seed=1"}
    assert after["seed=0"] == first["seed=0"]
    steps = [row["step"] for row in rows_of(tmp_path / "s" / "seed=1") if "train/loss_step" in row]
    assert steps == list(range(1, 61))
    kept = list((tmp_path / "s" / "seed=1").glob("attempt-1/metrics.jsonl"))
    assert len(kept) == (number is signal.SIGKILL)  # Ctrl-C saves a checkpoint and goes on in the same files


RANKS = ["dist=ddp", "hydra.launcher.tasks_per_node=2", "trainer.accumulate=2"]


@pytest.mark.parametrize(
    "launcher",
    [
        ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
        ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5", "precision=bf16", *RANKS],
    ],
    ids=["joblib", "submitit, two ranks a job"],
)
def test_other_launchers_do_the_same(tmp_path, launcher):
    pytest.importorskip(f"hydra_plugins.hydra_{launcher[0].partition('=')[2].partition('_')[0]}_launcher")
    words = command(tmp_path, "precision=fp32,bf16", "seed=0", "baseline=none", *launcher)
    done = subprocess.run(
        words, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(runs_in(tmp_path / "s")) == (1 if "precision=bf16" in launcher else 2)
    ranks = {json.loads(path.read_text())["ranks"] for path in (tmp_path / "s").glob("*/run.json")}
    assert ranks == ({2} if "dist=ddp" in launcher else {1})
    assert "report:" in done.stdout


def test_a_slurm_sweep_composes_and_submits_an_array(tmp_path, monkeypatch):
    """A stand-in for sbatch takes the script: every job of the sweep is in it, with what was asked of the cluster."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    tools = tmp_path / "bin"
    tools.mkdir()
    script = f'#!/bin/sh\ncp "$1" {tmp_path}/submitted.sh\necho "sbatch stand-in: no cluster here" >&2\nexit 1\n'
    (tools / "sbatch").write_text(script)
    (tools / "sbatch").chmod(0o755)
    (tools / "srun").symlink_to("/bin/true")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PATH": f"{tools}:{os.environ['PATH']}"}
    words = command(
        tmp_path, "precision=fp32,bf16", "seed=0,1,2", "hydra/launcher=submitit_slurm",
        "hydra.launcher.partition=gpus", "hydra.launcher.gpus_per_node=1", "hydra.launcher.timeout_min=77",
    )  # fmt: skip
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    text = (tmp_path / "submitted.sh").read_text()
    for asked in ("--array=0-5", "--partition=gpus", "--gpus-per-node=1", "--time=77"):
        assert asked in text, done.stdout + done.stderr


@pytest.mark.filterwarnings("ignore::Warning:optuna", "ignore::Warning:hydra_plugins")
def test_a_search_minimizes_the_validation_loss(monkeypatch, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    start(
        monkeypatch, tmp_path, "hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=1",
        "hydra.sweeper.sampler.seed=1", "optim.lr=interval(1e-4,1e-2)", "precision=fp32", "trainer.max_steps=3",
    )  # fmt: skip
    folder = tmp_path / "s"
    assert len(runs_in(folder)) == 3
    text = (folder / "optimization_results.yaml").read_text()
    losses = [summary_of(folder / name)["val_loss"] for name in runs_in(folder)]
    assert f"best_value: {min(losses)}" in text


def worse(tmp_path, monkeypatch, *overrides):
    """The verdicts of a real sweep of a model that learns something in 100 steps."""
    learning = ["model.n_embd=64", "model.block_size=64", "trainer.max_steps=100"]
    start(monkeypatch, tmp_path, *learning, "trainer.eval_batches=16", "telemetry.every=50", *overrides)
    report = json.loads((tmp_path / "s" / "report.json").read_text())
    return {v["label"]: v["verdict"]["text"] for v in report["groups"][0]["variants"]}


def test_fp8_that_saturates_is_found_to_be_worse(monkeypatch, tmp_path):
    """A margin of -3: everything above an eighth of each tensor's amax is cut off."""
    found = worse(
        tmp_path,
        monkeypatch,
        "precision=fp32,fp8",
        "precision.quantization.margin=-3",
        "seed=0,1,2,3",
        "trainer.batch_size=4",
    )
    assert found["fp8"].startswith("worse by ")


def test_pure_bf16_weights_at_a_small_learning_rate_are_found_to_be_worse(monkeypatch, tmp_path):
    given = [
        "precision=bf16",
        "optim=adamw,adamw-bf16",
        "optim.lr=2e-5",
        "baseline=none",
        "seed=0,1,2",
        "trainer.batch_size=8",
    ]
    found = worse(tmp_path, monkeypatch, *given)
    assert found["bf16"] == "baseline"
    assert found["bf16 weights=bf16"].startswith("worse by ")


def test_a_sweep_is_one_group_in_wandb_with_its_report(monkeypatch, tmp_path):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    start(monkeypatch, tmp_path, "logger=default", "precision=fp32,bf16", "seed=0")
    folder = tmp_path / "s"
    runs = [wandb_files.read(folder / f"precision={name}") for name in ("fp32", "bf16")]
    report = wandb_files.read(folder)
    assert {run.group for run in (*runs, report)} == {"s"}
    assert report.job_type == "report"
    assert report.logged["comparison/nrows"] == [2]
    told = json.loads((folder / "report.json").read_text())["groups"][0]["variants"][1]
    assert report.final["bf16/val_loss"] == pytest.approx(told["loss"]["val"])
    assert report.final["bf16/verdict"] == told["verdict"]["text"]


def test_names_of_jobs():
    varied = ["precision", "precision.keep"]
    overrides = ["precision=fp8", "precision.keep='(.*[.])?head|x'", "model=gpt-nano"]
    assert sweep.folder_name(overrides, varied) == "precision=fp8,keep=._._head_x"
    assert sweep.folder_name(["model=gpt-nano", "sweep_dir=a/b"], []) == "model=gpt-nano"
    assert len(sweep.folder_name([f"a={'x' * 300}"], ["a"])) <= 100


@pytest.mark.parametrize("path", sorted((conf_dir() / "ablation").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_ablation_is_one_command_whose_jobs_compose(path):
    lines = path.read_text().splitlines()
    assert lines[0] == "# @package _global_"
    assert lines[1].startswith(f"# python train.py -m ablation={path.stem} ")
    assert len(lines) <= 20
    config.register()
    with initialize_config_dir(str(conf_dir()), version_base=None):
        params = compose("config", [f"ablation={path.stem}"], return_hydra_config=True).hydra.sweeper.params
        varied = sweep._varied([f"{key}={value}" for key, value in params.items()])
        assert "trainer.max_steps" not in varied
        assert varied["seed"] == ["0", "1", "2"]
        for key, values in varied.items():
            for value in values:
                config.parse(compose("config", [f"ablation={path.stem}", f"{key}={value}"]))
        assert int(params["trainer.max_steps"]) >= 100

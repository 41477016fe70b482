"""Going on with a run as a new user would: what is printed is pasted, what is typed counts, what changed is told."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import time

import pytest
from commands import CORPUS, ROOT, TINY, events_of, rows_of, summary_of, train

from mptrain import config
from mptrain.report.compare.compare import compare
from mptrain.runs import read as runs

pytestmark = pytest.mark.usefixtures("command_line")


def settings_of(folder):
    return json.loads((folder / "config.json").read_text())


def history_of(folder):
    return json.loads((folder / "history.json").read_text())["attempts"]


def interrupted(folder, *overrides):
    """A run that Ctrl-C stops after its first steps; returns what it printed."""
    command = [sys.executable, "train.py", *TINY, "logger=jsonl", "baseline=none", *overrides]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists() or not (folder / "metrics.jsonl").read_text().count("\n"):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    return process.communicate(timeout=60)[0]


def test_the_printed_command_goes_on_as_the_run_was_begun(tmp_path):
    """FP8 at another rate, in a folder with a space and an equals sign: pasted into a shell, it is the same run."""
    folder = tmp_path / "my runs" / "a=1"
    settings = ["precision=fp8", "optim.lr=3e-3", "trainer.max_steps=100000", f'run_dir="{folder}"']
    text = interrupted(folder, *settings)
    hint = next(line for line in text.splitlines() if "Continue with: " in line).partition("Continue with: ")[2]
    before = settings_of(folder)
    steps = summary_of(folder)["steps"]
    assert shlex.split(hint)[1:] == ["train.py", f'run_dir="{folder}"', "resume=auto"]
    more = f"{hint} trainer.max_steps={steps + 1}"
    done = subprocess.run(more, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    after = settings_of(folder)
    assert (after["precision"], after["optim"], after["model"], after["data"]) == tuple(
        before[name] for name in ("precision", "optim", "model", "data")
    )
    assert summary_of(folder)["precision"] == "fp8"
    assert [row["step"] for row in rows_of(folder) if "train/loss_step" in row] == list(range(1, steps + 2))


@pytest.fixture
def finished(monkeypatch, tmp_path):
    """A finished run of 6 steps in FP8 at a rate of its own, and a way to give it further commands."""
    folder = tmp_path / "a"
    train(monkeypatch, tmp_path, "precision=fp8", "optim.lr=3e-3", "baseline=none", f"run_dir={folder}", "seed=3")

    def go_on(*overrides, code=0):
        monkeypatch.setattr("commands.TINY", ())
        return train(monkeypatch, tmp_path, f"run_dir={folder}", "resume=auto", *overrides, code=code)

    return folder, go_on


def test_a_finished_run_is_told_and_left_as_it_is(finished):
    folder, go_on = finished
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    text = go_on()
    assert f"{folder} is finished (6 of 6 steps) and stays as it is: trainer.max_steps=12 continues it" in text
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_more_steps_reopen_it_with_its_own_settings(finished):
    folder, go_on = finished
    text = go_on("trainer.max_steps=8")
    settings = settings_of(folder)
    assert (settings["precision"]["name"], settings["optim"]["lr"], settings["seed"]) == ("fp8", 3e-3, 3)
    assert "resuming at step 6: trainer.max_steps was 6, is 8" in text
    summary = summary_of(folder)
    assert summary["steps"] == 8
    assert all(summary[name] is not None for name in ("train_loss", "tokens_per_s", "peak_memory_gib", "val_loss"))
    assert json.loads((folder / "config.1.json").read_text())["trainer"]["max_steps"] == 6
    (event,) = [event for event in events_of(folder) if event["event"] == "resumed"]
    assert (event["step"], event["reason"]) == (6, "trainer.max_steps: 6 -> 8")


def test_a_typed_precision_replaces_the_group_and_the_run_is_mixed(finished, monkeypatch, tmp_path):
    folder, go_on = finished
    text = go_on("precision=bf16", "trainer.max_steps=8")  # bf16 is Hydra's default: only the command line tells
    assert settings_of(folder)["precision"]["name"] == "bf16"
    assert settings_of(folder)["optim"]["lr"] == 3e-3
    assert "mixed run from here on" in text
    (attempt,) = history_of(folder)
    assert attempt["changes"]["precision.name"] == ["fp8", "bf16"]
    assert "precision.compute" not in attempt["changes"]
    other = tmp_path / "clean"
    monkeypatch.setattr("commands.TINY", TINY)
    train(
        monkeypatch,
        tmp_path,
        "precision=bf16",
        "baseline=none",
        f"run_dir={other}",
        "trainer.max_steps=8",
        "optim.lr=3e-3",
    )
    found = runs.read(folder)
    assert found.mixed.startswith("mixed: ")
    assert "precision.name fp8 -> bf16" in found.mixed
    assert runs.read(other).mixed == ""
    page = compare([folder, other])
    (row,) = [row for group in page.groups for v in group.variants for row in v.runs if row.folder.endswith("/a")]
    assert row.why.startswith("mixed: ")
    assert any("counts nowhere, mixed: " in note and str(folder) in note for note in page.notes)


def test_one_typed_key_overrides_one_key(finished):
    folder, go_on = finished
    go_on("precision.quantization.margin=1", "trainer.max_steps=7")
    policy = settings_of(folder)["precision"]
    assert (policy["name"], policy["quantization"]["margin"], policy["quantization"]["scaling"]) == (
        "fp8",
        1,
        "current",
    )
    assert runs.read(folder).mixed == "mixed: trainer.max_steps 6 -> 7, precision.quantization.margin 0 -> 1 at step 6"


@pytest.mark.parametrize("other", ["seed=4", "data.root=OTHER"])
def test_what_cannot_be_meant_is_refused_unless_said(finished, other):
    folder, go_on = finished
    other = other.replace("OTHER", str(CORPUS.parent / "email"))
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    text = go_on(other, "trainer.max_steps=8", code=2)
    (error,) = [line for line in text.splitlines() if line.startswith("error: ")]
    assert "resume_anyway=true" in error
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    go_on(other, "trainer.max_steps=8", "resume_anyway=true")
    assert runs.read(folder).mixed.startswith("mixed: ")


def test_a_checkpoint_of_another_folder_brings_its_settings(finished, monkeypatch, tmp_path):
    folder, _ = finished
    (checkpoint,) = (folder / "checkpoints").iterdir()
    monkeypatch.setattr("commands.TINY", ())
    train(monkeypatch, tmp_path, f"resume={checkpoint}", f"run_dir={tmp_path / 'b'}", "trainer.max_steps=7")
    settings = settings_of(tmp_path / "b")
    assert (settings["precision"]["name"], settings["model"]["n_embd"], settings["seed"]) == ("fp8", 32, 3)
    assert (history_of(tmp_path / "b")[0]["step"], settings_of(folder)["trainer"]["max_steps"]) == (6, 6)
    text = train(monkeypatch, tmp_path, f"resume={checkpoint}", f"run_dir={tmp_path / 'c'}", code=2)
    assert "leaves nothing to do: set trainer.max_steps=12" in text


@pytest.mark.parametrize("damage", ["torn", "missing"])
def test_a_folder_without_its_settings_is_refused(finished, damage):
    folder, go_on = finished
    path = folder / "config.json"
    path.write_text(path.read_text()[:50]) if damage == "torn" else path.unlink()
    text = go_on("trainer.max_steps=8", code=2)
    word = {"torn": "is damaged", "missing": "is missing"}[damage]
    assert f"error: {folder}/config.json {word}, so the run's settings are unknown" in text


def test_another_machine_is_noted_and_counts_for_speed_alone(finished):
    folder, go_on = finished
    about = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**about, "machine": "another", "torch": "2.11.0"}))
    text = go_on("trainer.max_steps=8", "trainer.eval_batches=3")
    assert "on another machine than before" in text
    found = runs.read(folder)
    assert found.elsewhere
    assert history_of(folder)[0]["elsewhere"] == ["machine", "torch"]
    assert "machine" not in found.mixed


# ---- words that Hydra's grammar does not read -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", ["a=b", "a b", "a,b", "(x", "a{b", "$x", "50%", "it's", 'say "x"', "a:b", "[x", "a;b", "tab\tx", "#1"]
)
def test_a_value_that_hydra_cannot_read_is_taken_as_it_is(value):
    (word,) = config.readable([f"run_dir={value}"])
    if "," in value:  # a sweep's list of values, which a single run refuses with its quoting
        assert word == f"run_dir={value}"
        return
    assert config.composed([word]).run_dir == value


def test_a_tilde_is_the_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert config.composed(config.readable(["run_dir=~/x"])).run_dir == str(tmp_path / "x")


@pytest.mark.parametrize(
    ("word", "wanted"),
    [
        ("seed=12345678901234567890123", "seed=12345678901234567890123 cannot work: it must be from 0 to"),
        ("data.train=[a,b]", "data.train=['a', 'b'] is not a text"),
        ("seed=[1,2", "'[1,2' of type 'str' could not be converted to Integer"),
        ("run_dir=a,b", "run_dir"),
    ],
)
def test_what_cannot_be_is_one_sentence(monkeypatch, tmp_path, word, wanted):
    monkeypatch.setattr("commands.TINY", ())
    given = ["data=tokens", "data.validation=v.bin"] if word.startswith("data") else []
    text = train(monkeypatch, tmp_path, *given, word, code=2)
    assert "Traceback" not in text
    (error,) = [line for line in text.splitlines() if line.startswith("error: ")]
    assert wanted in error

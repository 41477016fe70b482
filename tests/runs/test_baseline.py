"""Finding, refusing and comparing FP32 baselines on folders written by hand; the lock between real processes."""

import dataclasses
import json
import math
import multiprocessing

import pytest

from mptrain.config import RunConfig
from mptrain.optim import OptimConfig
from mptrain.precision.policy import PrecisionPolicy
from mptrain.report.run_summary import comparison_rows, footnotes
from mptrain.runs import baseline, identity
from mptrain.runs.baseline import Figures
from mptrain.tools.locks import locked
from mptrain.tools.settings import to_plain
from mptrain.training.config import TrainerConfig

CONFIG = RunConfig(model={"kind": "gpt", "n_layer": 2})


def mark(config=CONFIG, corpus="c", machine="m", torch="2.13", gemm="blas"):
    return identity.fingerprint(config, corpus, machine, torch, gemm)


def write_run(folder, *, precision="fp32", fingerprint=None, losses=(3.0, 2.0), config=CONFIG, **more):
    folder.mkdir(parents=True)
    rows = [{"step": step, "train/loss_step": loss} for step, loss in enumerate(losses, start=1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.json").write_text(json.dumps(to_plain(config)))
    summary = {"precision": precision, "fingerprint": fingerprint or mark(), "steps": len(losses)}
    summary |= {"tokens_per_s": 100.0, "peak_memory_gib": 2.0, "val_loss": 2.5, **more}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_the_fingerprint_changes_with_what_makes_losses_differ_and_with_nothing_else():
    change = dataclasses.replace
    same = [
        change(CONFIG, precision=PrecisionPolicy.named("fp8")),
        change(CONFIG, run_dir="x", runs_dir="y", resume="auto", baseline="none"),
        change(CONFIG, data={"cache_dir": "elsewhere"}),
        change(CONFIG, optim=OptimConfig(weights="bf16", moments="int8")),
    ]
    assert {mark(config) for config in same} == {mark()}
    other = [
        mark(change(CONFIG, seed=1)),
        mark(change(CONFIG, optim=OptimConfig(lr=0.5))),
        mark(change(CONFIG, trainer=TrainerConfig(batch_size=8))),
        mark(change(CONFIG, model={"kind": "gpt", "n_layer": 3})),
        mark(corpus="d"),
        mark(machine="n"),
        mark(torch="2.12"),
        mark(gemm="onednn"),
    ]
    assert len({mark(), *other}) == 1 + len(other)


def test_find_takes_the_longest_fp32_run_of_the_fingerprint(tmp_path):
    write_run(tmp_path / "a" / "short")
    write_run(tmp_path / "b" / "long", losses=(3.0, 2.0, 1.0))
    write_run(tmp_path / "a" / "bf16", precision="bf16", losses=(1.0,) * 9)
    write_run(tmp_path / "a" / "other", fingerprint="0", losses=(1.0,) * 9)
    (tmp_path / "a" / "torn").mkdir()
    (tmp_path / "a" / "torn" / "summary.json").write_text('{"precision": "fp')
    found = baseline.find([tmp_path / "a", tmp_path / "b", tmp_path / "missing"], mark())
    assert found.source == f"run {tmp_path / 'b' / 'long'}"
    assert found.losses == {1: 3.0, 2: 2.0, 3: 1.0}
    assert baseline.find([tmp_path / "a"], "nothing") is None


def test_a_named_baseline_says_why_it_cannot_be_compared(tmp_path):
    other = dataclasses.replace(CONFIG, seed=3, optim=OptimConfig(lr=0.5))
    with pytest.raises(ValueError, match=r"holds no finished run .* FP32 run"):
        baseline.named(tmp_path, CONFIG, mark())
    folder = write_run(tmp_path / "bf16", precision="bf16")
    with pytest.raises(ValueError, match=r"is a bf16 run: give one with precision=fp32"):
        baseline.named(folder, CONFIG, mark())
    folder = write_run(tmp_path / "other", config=other, fingerprint=mark(other))
    with pytest.raises(ValueError, match=r"optim.lr is 0.5 there and 0.001 here; seed is 3 there and 0 here"):
        baseline.named(folder, CONFIG, mark())
    folder = write_run(tmp_path / "elsewhere", fingerprint=mark(machine="n"))
    with pytest.raises(ValueError, match=r"another machine"):
        baseline.named(folder, CONFIG, mark())
    assert baseline.named(write_run(tmp_path / "good"), CONFIG, mark()).tokens_per_s == 100.0


def test_losses_of_a_step_done_twice_and_of_a_torn_file(tmp_path):
    lines = [{"step": 1, "train/loss_step": 3.0}, {"step": 2, "train/loss_step": 9.0}, {"step": 2, "val/loss": 1.0}]
    lines += [{"step": 2, "train/loss_step": 2.0}, {"step": 3, "train/loss_step": None}]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "train/lo'
    (tmp_path / "metrics.jsonl").write_text(text)
    assert baseline.read_losses(tmp_path) == {1: 3.0, 2: 2.0}
    with (tmp_path / "metrics.jsonl").open("a") as file:  # the run goes on behind the half line that a kill left
        file.write("".join(json.dumps({"step": step, "train/loss_step": 1.0}) + "\n" for step in (4, 5)))
    assert baseline.read_losses(tmp_path) == {1: 3.0, 2: 2.0, 5: 1.0}


RUN = Figures("this run", {step: 2.0 + 1 / step for step in range(1, 201)}, 300.0, 1.0, 2.25)


def test_sides_are_compared_at_the_last_common_step():
    fp32 = Figures("probe of 8 steps", dict.fromkeys(range(1, 9), 2.0), 100.0, 4.0)
    result = baseline.compare(RUN, fp32)
    assert (result["speedup"], result["memory_ratio"], result["step"]) == (3.0, 0.25, 8)
    assert result["loss_delta"] == pytest.approx(1 / 8)
    assert math.isnan(result["val_loss_delta"])
    whole = baseline.compare(RUN, Figures("run x", dict.fromkeys(range(1, 201), 2.0), 100.0, 4.0, 2.0))
    assert (whole["step"], whole["val_loss_delta"]) == (200, 0.25)
    nothing = baseline.compare(RUN, Figures(note="baseline=none"))
    assert nothing["source"] == "none"
    assert math.isnan(nothing["speedup"])
    assert math.isnan(nothing["loss_delta"])


def summary_with(fp32, *, emulated=False, overflow=0, scaling="current"):
    figures = {"precision": "fp8", "emulated": emulated, "scaling": scaling, "steps": 200, "skipped_steps": 1}
    figures |= {"train_loss": 2.005, "val_loss": 2.25, "peak_memory_gib": 1.0}
    return figures | {"overflow_events": overflow, "underflow_frac": 0.25, "baseline": baseline.compare(RUN, fp32)}


def test_the_table_is_undecided_after_few_steps_and_a_ratio_after_many():
    few = comparison_rows(summary_with(Figures("probe of 8 steps", {8: 2.0}, 100.0, 4.0), emulated=True))
    assert few[0] == ("training loss at step 8 (nats)", "2.1250", "2.0000", "undecided: 8 steps")
    assert few[1] == ("training loss at step 200 (nats)", "2.0050", "-", "-")
    assert few[3] == ("tokens/s (emulation)", "300", "100", "3.00")
    assert few[4] == ("peak memory (GiB)", "1.000", "4.000", "0.25")
    many = comparison_rows(summary_with(Figures("run x", {200: 2.0}, 100.0, 4.0, 2.0)))
    assert many[0] == ("training loss at step 200 (nats)", "2.0050", "2.0000", "1.0025")
    assert many[1] == ("validation loss (nats)", "2.2500", "2.0000", "1.1250")
    assert many[2][0] == "tokens/s"


def test_accuracy_is_beside_the_loss_where_there_is_one():
    def side(source, top1):
        return Figures(source, dict(RUN.losses), 300.0, 1.0, 2.25, top1)

    compared = baseline.compare(side("this run", 0.96), side("run x", 0.98))
    assert compared["fp32_val_top1_frac"] == 0.98
    assert compared["val_top1_delta"] == pytest.approx(-0.02)
    summary = summary_with(RUN) | {"baseline": compared, "val_top1_frac": 0.96, "unit": "images"}
    rows = comparison_rows(summary)
    assert rows[2] == ("validation top-1 (%)", "96.00", "98.00", "0.9796")
    assert rows[3][0] == "images/s"
    shorter = baseline.compare(side("this run", 0.96), Figures("run x", {8: 2.0}, val_top1_frac=0.98))
    assert math.isnan(shorter["fp32_val_top1_frac"])
    assert math.isnan(shorter["val_top1_delta"])
    tokens = comparison_rows(summary_with(RUN) | {"val_top1_frac": math.nan, "unit": "tokens"})
    assert not [row for row in tokens if "top-1" in row[0]]


def test_an_fp32_run_supplies_its_accuracy(tmp_path):
    folder = write_run(tmp_path / "a", val_top1_frac=0.98)
    assert baseline.read_run(folder).val_top1_frac == 0.98
    assert math.isnan(baseline.read_run(write_run(tmp_path / "b", val_top1_frac=None)).val_top1_frac)


def test_the_notes_explain_what_could_be_misread():
    fp32 = Figures("run x", {200: 2.0}, 100.0, 4.0, 2.0)
    notes = dict(footnotes(summary_with(fp32, emulated=True)))
    assert notes["underflow"].startswith("25.000%")
    assert notes["skipped steps"] == "1"
    assert "current scaling fits" in notes["no overflow"]
    assert notes["speed"] == "emulated: no FP8 unit here; numerics are exact, speed is not"
    assert "no overflow" not in dict(footnotes(summary_with(fp32, scaling="delayed")))
    assert "no overflow" not in dict(footnotes(summary_with(fp32, overflow=3)))


def hold(path, ready, asked, left):
    with locked(path, lambda: None):
        ready.set()
        assert asked.wait(60)
        left.set()


def test_the_lock_keeps_processes_apart_and_says_that_it_waits(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, asked, left = (context.Event() for _ in range(3))
    process = context.Process(target=hold, args=(tmp_path / "lock", ready, asked, left))
    process.start()
    assert ready.wait(60)
    said = []
    with locked(tmp_path / "lock", lambda: (said.append("waiting"), asked.set())):
        assert left.is_set(), "both are inside"
    process.join()
    assert process.exitcode == 0
    assert said == ["waiting"]


def test_a_probe_that_fails_is_a_note_and_not_a_failed_run(tmp_path):
    broken = dataclasses.replace(CONFIG, model={"kind": "gpt", "n_embd": 30, "n_head": 4})
    figures = baseline.probe(broken, "f", tmp_path, lambda text: None)
    assert figures.source == "none"
    assert "the FP32 probe failed" in figures.note
    assert "n_embd" in figures.note
    assert not (tmp_path / baseline.PROBES / "f.json").exists()

"""Numerics that go wrong in real training: what the ledger, the guard and the meter say of it."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from weakref import WeakSet

import pytest
import torch
from commands import events_of, rows_of, summary_of, train
from small_training import SIZES, Data, Kept, weights
from torch.utils._python_dispatch import TorchDispatchMode

import mptrain
from mptrain import Precision
from mptrain.models import gpt
from mptrain.optim import Average, OptimConfig, Schedule, build_optimizer
from mptrain.precision import regions
from mptrain.telemetry import record
from mptrain.telemetry.drill import Drill
from mptrain.telemetry.meters import Throughput
from mptrain.telemetry.monitor import Monitor, TelemetryConfig
from mptrain.training.config import TrainerConfig
from mptrain.training.extras import Extras
from mptrain.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("command_line")
TELEMETRY = Path(mptrain.__file__).parent / "telemetry"


def trainer(name="bf16", *, sink=None, every=0, steps=20, accumulate=1, drill=None, precision=None, **optim):
    torch.manual_seed(0)
    model = gpt.build(SIZES)
    precision = (precision or Precision(name)).prepare(model)
    config = OptimConfig(warmup_frac=0.0, min_lr_frac=1.0, **optim)
    telemetry = TelemetryConfig(every=10**9, record_every=every)
    return Trainer(
        TrainerConfig(max_steps=steps, batch_size=8 // accumulate, accumulate=accumulate, eval_every=0, eval_batches=2),
        model=model,
        precision=precision,
        optimizer=build_optimizer(config, model),
        schedule=Schedule.of(config, steps),
        data=Data(),
        sink=sink or Kept(),
        extras=Extras(
            monitor=Monitor(model, precision, telemetry, steps) if every else None,
            throughput=Throughput(64),
            every=2,
            drill=drill,
        ),
    )


@pytest.mark.parametrize("every", [0, 7], ids=["off", "recorded"])
def test_inf_in_every_step_of_bf16(every):
    """DeepSpeed once trained a whole run like that without a word. Here: all skipped, nothing moved, an alarm."""
    sink = Kept()
    run = trainer("bf16", sink=sink, every=every)
    before = weights(run).clone()
    run.model.blocks[0].mlp.up.register_forward_hook(lambda layer, args, out: out * math.inf)
    run.fit(until=20)
    assert torch.equal(weights(run), before)
    assert run.optimizer.state == {}
    assert (run.ledger.applied, run.ledger.skipped) == (0, 20)
    assert {row["train/lr"] for _, row in sink.rows if "train/lr" in row} == {run.schedule.at(0)}
    skips = [event for event in sink.events if event["event"] == "skipped"]
    assert [event["step"] for event in skips] == list(range(1, 21))
    assert all(event["phase"] == "forward" and event["micro_batch"] == 0 for event in skips)
    alarms = [event for event in sink.events if event["event"] == "alarm" and "in a row" in event["reason"]]
    assert [event["step"] for event in alarms] == [8, 16]
    if every:  # sampled steps see where it begins: here every other one, for what nobody saw makes the next suspicious
        named = {event["step"] for event in skips if (event["layer"], event["role"]) == ("blocks.0.mlp.up", "output")}
        assert named >= {1, 3, 5, 7}


def test_fp16_finds_its_level_from_an_absurd_scale(monkeypatch, tmp_path):
    """2^60 overflows: every step down is named, and then it trains."""
    given = ["precision=fp16", "precision.loss_scale.init=1152921504606846976", "precision.loss_scale.hysteresis=1"]
    text = train(monkeypatch, tmp_path, *given, "trainer.max_steps=60", "baseline=none", f"run_dir={tmp_path / 'run'}")
    events, summary = events_of(tmp_path / "run"), summary_of(tmp_path / "run")
    backoffs = [event["scale"] for event in events if event["event"] == "scale_backed_off"]
    skips = [event for event in events if event["event"] == "skipped"]
    assert backoffs == [2.0 ** (59 - n) for n in range(len(backoffs))]
    assert len(backoffs) == len(skips) == summary["skipped_steps"] >= 20
    assert all(event["reason"] and event["kind"] in ("Inf", "NaN") and event["phase"] == "backward" for event in skips)
    assert all(event["layer"] for event in skips)
    assert summary["steps"] - len(skips) >= 10, "it came to train"
    assert math.isfinite(summary["val_loss"])
    lines = [line for line in text.splitlines() if "loss scale fell" in line]
    assert 3 <= len(lines) <= 8, "told at its 1st, 2nd, 4th ... time"


PLACES = [("input", "forward"), ("weight", "forward"), ("output", "forward"), ("grad_output", "backward")]


@pytest.mark.parametrize("value", ["inf", "nan"])
@pytest.mark.parametrize(("role", "phase"), PLACES)
@pytest.mark.parametrize("name", ["bf16", "fp16", "fp8", "fp8-delayed"])
def test_a_planted_value_is_named_and_its_step_skipped(name, role, phase, value):
    """One element of one tensor of one layer, in the second micro-batch's step, of a sampled step."""
    sink = Kept()
    run = trainer(name, sink=sink, every=3, accumulate=2, drill=Drill.parse(f"3:blocks.0.mlp.down:{role}:{value}"))
    run.fit(until=5)
    (skip,) = [event for event in sink.events if event["event"] == "skipped"]
    kind = "Inf" if value == "inf" else "NaN"
    assert (skip["step"], skip["layer"], skip["phase"], skip["micro_batch"]) == (3, "blocks.0.mlp.down", phase, 0)
    assert (skip["role"], skip["kind"], skip["rank"]) == (role, kind, 0)
    assert (run.ledger.applied, run.ledger.skipped) == (4, 1)
    assert weights(run).isfinite().all()


@pytest.mark.parametrize("role", ["input", "weight", "grad_output"])
@pytest.mark.parametrize("name", ["fp8", "fp8-delayed", "fp8-rowwise"])
def test_fp8_hides_no_inf_on_a_step_that_nobody_samples(name, role):
    """E4M3 has no Inf: the cast makes 448 of it, the loss stays finite, and still the step is skipped and named."""
    sink = Kept()
    run = trainer(name, sink=sink, every=0, drill=Drill.parse(f"3:blocks.0.mlp.down:{role}:inf"))
    run.fit(until=5)
    (skip,) = [event for event in sink.events if event["event"] == "skipped"]
    assert (skip["step"], skip["layer"], skip["role"], skip["kind"]) == (3, "blocks.0.mlp.down", role, "Inf")
    assert math.isfinite(run.losses[3]), "the cast hid it from the loss"


def test_a_huge_value_is_counted_and_is_no_inf():
    sink = Kept()
    policy = mptrain.PrecisionPolicy.named("fp8-delayed")
    run = trainer(sink=sink, every=3, drill=Drill.parse("3:blocks.0.mlp.down:input:1e30"), precision=Precision(policy))
    run.fit(until=4)
    assert [event for event in sink.events if event["event"] == "skipped"] == []
    row = dict(sink.rows)[3]
    elements = 8 * SIZES.block_size * 4 * SIZES.n_embd
    assert row["saturated_frac/blocks.0.mlp.down/input"] == 1 / elements
    assert row["numerics/nonfinite_elements"] == 0


def test_a_fire_drill_by_command(monkeypatch, tmp_path):
    folder = tmp_path / "run"
    given = ["precision=fp8", "debug.inject=2:blocks.1.mlp.up:input:inf", "baseline=none", f"run_dir={folder}"]
    text = train(monkeypatch, tmp_path, *given)
    skips = [event for event in events_of(folder) if event["event"] == "skipped"]
    assert [(event["step"], event["layer"], event["role"]) for event in skips] == [(2, "blocks.1.mlp.up", "input")]
    assert "step 2: skipped: Inf in input (forward of micro-batch 0) in blocks.1.mlp.up" in text
    assert summary_of(folder)["skipped_steps"] == 1
    assert summary_of(folder)["peak_memory_gib"] > 0, "memory is measured in another step then"


BAD_DRILLS = {
    "3:head:input": "4",
    "x:head:input:inf": "whole number",
    "0:head:input:inf": "count from 1",
    "3:head:inputt:inf": "did you mean 'input'",
    "3:haed:input:inf": "did you mean 'head'",
    "3:head:input:much": "inf, nan or 1e30",
}


@pytest.mark.parametrize("text", BAD_DRILLS)
def test_a_drill_that_cannot_be_is_refused(monkeypatch, tmp_path, text):
    said = train(monkeypatch, tmp_path, f"debug.inject={text}", "baseline=none", code=2)
    assert "debug.inject" in said
    assert BAD_DRILLS[text] in said
    assert "Traceback" not in said


def test_the_meter_predicts_where_pure_bf16_stalls():
    """A rate at which FP32 masters learn and BF16 weights do not: said by the FP32 run, then seen in the others."""
    rate = {"lr": 3e-6, "weight_decay": 0.0}
    sink = Kept()
    masters = trainer("bf16", sink=sink, every=1, steps=60, **rate)
    start, before = weights(masters).clone(), masters.evaluate()["val/loss"]
    masters.fit(until=1)
    predicted = dict(sink.rows)[1]
    assert predicted["numerics/lost_bf16_frac"] > 0.8
    assert predicted["numerics/lost_fp32_frac"] == 0
    masters.fit(until=60)
    fell = before - masters.evaluate()["val/loss"]
    assert fell > 0
    for stored, progress in (("bf16", (-0.1, 0.5)), ("bf16_stochastic", (0.8, 1.2)), ("bf16_remainder", (0.9, 1.1))):
        run = trainer("bf16", steps=60, weights=stored, **rate)
        run.fit(until=1)
        stayed = float((weights(run).float() == start.bfloat16().float()).double().mean())
        if stored != "bf16_remainder":
            assert stayed == pytest.approx(predicted[f"numerics/lost_{stored}_frac"], abs=0.02), stored
        run.fit(until=60)
        share = (before - run.evaluate()["val/loss"]) / fell
        assert progress[0] < share < progress[1], (stored, share)


def test_no_weight_changes_and_somebody_says_so():
    sink = Kept()
    run = trainer("bf16", sink=sink, every=10, steps=60, lr=1e-30, weight_decay=0.0)
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.clamp_(min=0.5)
    run.fit(until=60)
    alarms = [event["reason"] for event in sink.events if event["event"] == "alarm"]
    assert len(alarms) == 1
    assert alarms[0].startswith("no weight has changed for 50 steps: updates are lost in rounding")


class Calls:
    """Calls of Python functions in the telemetry's files, by file, and reads of a device value by the host."""

    def __init__(self):
        self.files, self.reads = [], 0

    def __enter__(self):
        outer = self

        class Reads(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                outer.reads += func is torch.ops.aten._local_scalar_dense.default
                return func(*args, **(kwargs or {}))

        def watch(frame, event, arg):
            path = Path(frame.f_code.co_filename)
            if event == "call" and path.parent == TELEMETRY:
                self.files.append(path.stem)

        self._mode = Reads()
        self._mode.__enter__()
        sys.setprofile(watch)
        return self

    def __exit__(self, *error):
        sys.setprofile(None)
        self._mode.__exit__(*error)


def hooks(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    leaves = sum(bool(parameter._backward_hooks) for parameter in model.parameters())
    return leaves + sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


@pytest.mark.parametrize("name", ["bf16", "fp8"])
def test_switched_off_nothing_is_installed_and_nothing_is_called(monkeypatch, name):
    """By counting calls, not by a timer. On, a step that is not sampled makes one call more and reads nothing more."""
    counted = {}
    for every in (0, 10**9):
        monkeypatch.setattr(regions, "_FENCES", WeakSet())  # alone in its process: no second model to keep apart
        run = trainer(name, every=every, steps=10**9)
        run.fit(until=4)
        with Calls() as calls:
            run.step()
            run.step()
        assert hooks(run.model) == 0
        numerics = [file for file in calls.files if file not in ("ledger", "meters")]
        counted[every] = numerics, calls.reads
    assert counted[0][0] == []
    assert counted[10**9][0] == ["monitor"] * 4, "due() and suspect(), each once a step"
    assert counted[10**9][1] == counted[0][1]


def test_compiled_models_are_watched_uncompiled():
    sink = Kept()
    run = trainer("bf16", sink=sink, every=2)
    calls = []

    class Compiled(torch.nn.Module):
        def forward(self, **batch):
            calls.append(run.step_number + 1)
            return run.model(**batch)

    run.run_model = Compiled()
    run.fit(until=5)
    assert calls == [3, 5], "steps 1, 2 and 4 are sampled"
    assert [made.step for made in sink.records] == [1, 2, 4]


def test_a_resumed_run_goes_on_in_the_same_files(monkeypatch, tmp_path):
    folder = tmp_path / "run"
    given = ["precision=fp8", "baseline=none", f"run_dir={folder}", "telemetry.record_every=2"]
    train(monkeypatch, tmp_path, *given, "trainer.max_steps=4", "debug.inject=2:head:grad_weight:nan")
    assert [event["step"] for event in events_of(folder)] == [2]
    again = ["resume=auto", "trainer.max_steps=8", "debug.inject=6:head:grad_weight:inf"]
    train(monkeypatch, tmp_path, *given, *again)
    assert [event["step"] for event in events_of(folder) if event["event"] == "skipped"] == [2, 6]
    assert record.steps(folder / record.FILE) == [1, 2, 4, 6, 8]
    assert summary_of(folder)["skipped_steps"] == 2
    with (folder / record.FILE).open("r+b") as file:
        file.truncate((folder / record.FILE).stat().st_size // 2)
    assert record.steps(folder / record.FILE)[0] == 1


def test_off_leaves_no_record(monkeypatch, tmp_path):
    folder = tmp_path / "run"
    given = ["precision=fp8", "baseline=none", f"run_dir={folder}", "telemetry.record_every=0"]
    assert "not counted (telemetry.record_every=0)" in train(monkeypatch, tmp_path, *given)
    assert not (folder / record.FILE).exists()
    assert summary_of(folder)["overflow_events"] is None
    assert not any(key.startswith("numerics") for row in rows_of(folder) for key in row)
    assert json.loads((folder / "config.json").read_text())["telemetry"]["record_every"] == 0


def test_fp8_counts_between_the_records(monkeypatch, tmp_path):
    """What the casts lose is counted every `telemetry.every` steps, in the pass they make anyway; nothing else is."""
    folder = tmp_path / "run"
    train(monkeypatch, tmp_path, "precision=fp8", "baseline=none", f"run_dir={folder}", "trainer.max_steps=8")
    counted = [row["step"] for row in rows_of(folder) if "numerics/underflow_frac" in row]
    assert counted == [1, 2, 4, 6, 8]
    assert [row["step"] for row in rows_of(folder) if "amax/head/input" in row] == [1, 8]
    assert record.steps(folder / record.FILE) == [1, 8]


def test_the_running_average_moves_with_applied_steps_only(monkeypatch, tmp_path):
    """Five steps, one of them skipped: four moves, each towards the weights that the step left."""
    run = trainer("bf16", every=0, drill=Drill.parse("3:head:grad_weight:nan"))
    average = Average(run.model, 0.5)
    run.extras = replace(run.extras, average=average)
    expected, seen = average.shadow[0].clone(), []
    for _ in range(5):
        run.step()
        seen.append(run.model.embed.weight.detach().clone())
    run._settle()
    assert torch.equal(seen[1], seen[2]), "step 3 is skipped"
    for after in (seen[0], seen[1], seen[3], seen[4]):
        expected.lerp_(after, 0.5)
    assert torch.equal(average.shadow[0], expected)
    assert run.ledger.applied == 4
    folder = tmp_path / "run"
    train(monkeypatch, tmp_path, "optim.ema_decay=0.5", "baseline=none", f"run_dir={folder}")
    last = [row for row in rows_of(folder) if "val/loss_average" in row][-1]
    assert 0 < abs(last["val/loss_average"] - last["val/loss"]) < 0.1

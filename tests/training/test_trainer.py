"""The loop: accumulation, schedules that wait for applied steps, evaluation that disturbs nothing, compiled models."""

import math
from dataclasses import replace

import pytest
import torch
from small_training import SIZES, Data, Kept, weights

from mptrain import Precision
from mptrain.loggers import NullSink
from mptrain.models import gpt
from mptrain.optim import OptimConfig, Schedule, build_optimizer
from mptrain.telemetry.audit import StepAudit
from mptrain.telemetry.meters import Throughput
from mptrain.telemetry.monitor import Monitor, TelemetryConfig
from mptrain.training.config import TrainerConfig
from mptrain.training.extras import Extras
from mptrain.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")


def trainer(name="fp32", *, compiled=None, sink=None, record=2, **settings):
    torch.manual_seed(0)
    model = gpt.build(SIZES)
    precision = Precision(name).prepare(model)
    config = TrainerConfig(**{"max_steps": 8, "batch_size": 8, "eval_every": 0, "eval_batches": 2, **settings})
    return Trainer(
        config,
        model=model,
        precision=precision,
        optimizer=build_optimizer(OptimConfig(), model),
        schedule=Schedule.of(OptimConfig(warmup_frac=0.5), config.max_steps),
        data=Data(),
        sink=sink or NullSink(),
        extras=Extras(
            monitor=Monitor(model, precision, TelemetryConfig(record_every=record), config.max_steps),
            throughput=Throughput(64),
            every=2,
            run_model=None if compiled is None else torch.compile(model, backend=compiled),
        ),
    )


def test_micro_batches_add_up_to_the_batch():
    whole, parts = trainer(), trainer(batch_size=2, accumulate=4)
    whole.fit()
    parts.fit()
    assert list(parts.losses) == list(range(1, 9))
    for step, loss in whole.losses.items():
        assert parts.losses[step] == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(weights(parts), weights(whole), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp8"])
def test_a_skipped_step_moves_neither_weights_nor_schedule(name):
    sink = Kept()
    run = trainer(name, sink=sink)
    run.fit(until=2)
    before, state = weights(run).clone(), [dict(s) for s in run.optimizer.state.values()]
    moments = [s["exp_avg"].clone() for s in state]
    handle = run.model.head.weight.register_hook(lambda grad: grad * math.inf)
    run.fit(until=4)
    handle.remove()
    assert torch.equal(weights(run), before)
    for moment, now in zip(moments, run.optimizer.state.values(), strict=True):
        assert torch.equal(moment, now["exp_avg"])
    assert (run.ledger.applied, run.ledger.skipped) == (2, 2)
    assert [event["step"] for event in sink.events] == [3, 4]
    for event in sink.events:  # the second is a sampled step: what was inferred of the first is seen there
        assert event["event"] == "skipped"
        assert (event["layer"], event["role"], event["kind"]) == ("head", "grad_weight", "Inf")
    run.fit(until=6)
    rates = {step: row["train/lr"] for step, row in sink.rows if "train/lr" in row}
    schedule = run.schedule
    assert rates == {step: schedule.at(applied) for step, applied in enumerate([0, 1, 2, 2, 2, 3], start=1)}
    assert run.ledger.applied == 4


@pytest.mark.parametrize("name", ["bf16", "fp16", "fp8", "fp8-delayed"])
def test_evaluation_disturbs_nothing(name):
    seldom, often = trainer(name), trainer(name, eval_every=1)
    seldom.fit()
    often.fit()
    assert seldom.losses == often.losses
    assert torch.equal(weights(seldom), weights(often))
    assert torch.equal(seldom.monitor.totals, often.monitor.totals)
    assert seldom.final["val/loss"] != seldom.final["val/loss_masters"]


# Dynamo itself looks at the .grad of tensors that are no leaves, and makes instances of autograd functions.
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("name", ["fp32", "bf16", "fp8"])
def test_a_compiled_model_trains_the_same(name):
    plain, compiled = trainer(name), trainer(name, compiled="aot_eager", record=100)
    plain.fit(until=4)
    compiled.fit(until=4)
    for step, loss in plain.losses.items():
        assert compiled.losses[step] == pytest.approx(loss, rel=2e-3 if name != "fp32" else 1e-5)


class Refusing(torch.nn.Module):
    """Stands for a compiled model, whose products an audit cannot see."""

    def forward(self, **batch):
        raise KeyError("compiled")


def test_the_first_step_is_audited_uncompiled_and_no_other():
    plain, run = (trainer("fp8", accumulate=2, batch_size=4, record=100) for _ in range(2))
    run.extras = replace(run.extras, audit=StepAudit(run.model, run.precision))
    run.run_model = Refusing()
    run.fit(until=1)
    found = run.extras.audit.result
    assert found.problems() == []
    assert {row.count for row in found.rows} == {2}
    with pytest.raises(KeyError, match="compiled"):
        run.step()
    run.run_model = run.model
    run.fit()
    plain.fit()
    assert run.extras.audit.result is found
    assert run.losses == plain.losses
    assert torch.equal(weights(run), weights(plain))


def test_a_run_whose_products_ran_otherwise_stops_in_its_first_step():
    run = trainer("fp8")
    before = weights(run).clone()
    run.extras = replace(run.extras, audit=StepAudit(run.model, run.precision, min_coverage=0.99))
    with pytest.raises(ValueError, match=r"audit.min_coverage=0.99 is not reached: .* as precision=fp8 asks"):
        run.fit()
    assert run.step_number == 0
    assert torch.equal(weights(run), before)


def test_a_row_for_every_step_and_meters_on_sampled_ones():
    sink = Kept()
    trainer("fp8", sink=sink).fit()
    steps = [step for step, row in sink.rows if "train/loss_step" in row]
    assert steps == list(range(1, 9))
    sampled = [step for step, row in sink.rows if "numerics/overflow_events" in row]
    assert sampled == [1, 2, 4, 6, 8]
    assert all(row["speed/tokens_per_s"] > 0 for step, row in sink.rows if "train/loss" in row and step > 1)


def test_schedule_warms_up_then_follows_the_cosine():
    schedule = Schedule.of(OptimConfig(lr=1.0, warmup_frac=0.25, min_lr_frac=0.1), 8)
    assert [schedule.at(applied) for applied in (0, 1)] == [0.5, 1.0]
    assert schedule.at(2) == 1.0
    assert schedule.at(5) == pytest.approx(0.55)  # halfway of the cosine: the mean of both ends
    assert schedule.at(8) == pytest.approx(0.1)
    assert schedule.at(100) == pytest.approx(0.1)


def test_only_matrices_decay_and_a_tied_weight_counts_once():
    model = gpt.build(SIZES)
    groups = build_optimizer(OptimConfig(weight_decay=0.3), model).param_groups
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert all(p.ndim >= 2 for p in groups[0]["params"])
    assert all(p.ndim < 2 for p in groups[1]["params"])
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))

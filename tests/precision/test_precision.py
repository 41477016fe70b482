"""The verbs of Precision on a toy model: what a bad step leaves behind, and what a good one does to the weights."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from small_loops import NAMES, OPTIMIZERS, Loop, assert_equal
from torch import Tensor

from mptrain import LossScale, PrecisionPolicy, ScaleEvent
from mptrain.precision.outcome import Blame
from mptrain.precision.policy import LossScaleKind

pytestmark = pytest.mark.usefixtures("one_thread")

QUANTIZED = [name for name in NAMES if PrecisionPolicy.named(name).quantized]
BAD = {"Inf": math.inf, "-Inf": -math.inf, "NaN": math.nan}


# ---- found_inf ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("name", NAMES)
def test_a_bad_gradient_skips_the_step_and_leaves_no_trace(name, optimizer, fused):
    """One element of one gradient, clipping on (which would turn Inf into NaN and 0): nothing moves, and the steps
    after it are bit for bit those of a twin that only threw the gradients away.
    """
    run, twin = Loop(name, optimizer, fused=fused), Loop(name, optimizer, fused=fused)
    assert run.step(0, clip=1.0) == twin.step(0, clip=1.0)
    for index, (kind, value) in enumerate(BAD.items(), start=1):
        before = run.everything()
        run.gradients(index)
        run.model[2].weight.grad[3, 5] = value
        outcome = run.precision.step(run.optimizer, clip=1.0)
        run.optimizer.zero_grad()
        assert_equal(run.everything(), before)
        assert not outcome.applied
        record = outcome.read()
        assert record.reason == f"{kind.strip('-')} in the gradient of weight"
        assert (record.blame.layer, record.blame.role) == ("2", "grad_weight")
        assert not math.isfinite(record.grad_norm)
        twin.gradients(index)
        twin.optimizer.zero_grad()
    for loop in (run, twin):  # the scale of FP16 did move; everything else must not have
        loop.precision.scaler.load_state_dict(Loop(name).precision.scaler.state_dict())
    for index in range(4, 7):
        ours, theirs = run.step(index, clip=1.0), twin.step(index, clip=1.0)
        assert ours.applied
        assert ours == theirs
    assert_equal(run.everything(), twin.everything())


@pytest.mark.parametrize(
    ("optimizer", "fused"),
    [
        ("adamw", True),
        ("adamw", False),
        ("sgd", False),
        ("sgd", True),
    ],
)
def test_a_first_step_that_is_skipped_leaves_no_trace(optimizer, fused):
    """FP16's first steps often are. A fused kernel told to skip must not leave state behind that it never wrote."""
    run, fresh = Loop("fp32", optimizer, fused=fused), Loop("fp32", optimizer, fused=fused)
    run.gradients(0)
    run.model[0].weight.grad[0, 0] = math.inf
    trash = [torch.full_like(p, 1e30) for p in run.model.parameters()]  # what uninitialized memory may hold
    del trash
    assert not run.precision.step(run.optimizer).applied
    run.optimizer.zero_grad()
    for index in (1, 2):
        assert run.step(index) == fresh.step(index)
    assert_equal(run.everything(), fresh.everything())


def test_the_first_bad_layer_is_named_and_the_others_are_counted():
    loop = Loop("bf16")
    loop.gradients(0)
    loop.model[2].weight.grad[0, 0] = math.inf
    loop.model[3].weight.grad.fill_(math.nan)
    record = loop.precision.step(loop.optimizer).read()
    assert (record.reason, record.blame.layer) == ("NaN in the gradient of weight and 1 more", "3")


@pytest.mark.parametrize(
    "size",
    [3e38, 1.5e19],
    ids=["one-tensor", "all-together"],
)
@pytest.mark.parametrize("name", ["fp32", "fp8"])
def test_finite_gradients_whose_norm_leaves_fp32_are_skipped(name, size):
    loop = Loop(name)
    loop.step(0)
    loop.gradients(1)
    for parameter in loop.model.parameters():
        parameter.grad[0, 0] = size
    before = loop.everything()
    record = loop.precision.step(loop.optimizer, clip=1.0).read()
    assert not record.applied
    assert "the norm of all gradients overflows FP32" in record.reason
    assert_equal(loop.everything(), before)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("value", BAD.values(), ids=BAD)
@pytest.mark.parametrize("name", QUANTIZED)
def test_a_bad_operand_that_the_cast_would_hide(name, value, fused):
    """E4M3 has no Inf and saturates: every gradient is finite (asserted), and still the step is skipped."""
    loop = Loop(name, fused=fused)
    loop.step(0)
    before = loop.everything()
    x = torch.randn(16, loop.width, generator=torch.Generator().manual_seed(1))
    x[4, 7] = value
    loop.gradients(1, x=x)
    if not math.isnan(value):
        assert all(bool(p.grad.isfinite().all()) for p in loop.model.parameters()), "the cast did not hide it"
    record = loop.precision.step(loop.optimizer, clip=1.0).read()
    kind = "NaN" if math.isnan(value) else "Inf"
    assert not record.applied
    assert record.blame == Blame(f"{kind} in input (forward of micro-batch 0)", "0", "input", kind, "forward", 0)
    assert_equal(loop.everything(), before)
    loop.optimizer.zero_grad()
    assert loop.step(2).applied, "the flag of one step must not skip the next"


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_bad_grad_output_and_a_bad_weight(name):
    def plant(grad: Tensor) -> Tensor:
        grad = grad.clone()
        grad[2, 3] = math.inf
        return grad

    loop = Loop(name)
    loop.gradients(0, hook=plant)
    assert all(bool(p.grad.isfinite().all()) for p in loop.model.parameters()), "the cast did not hide it"
    record = loop.precision.step(loop.optimizer).read()
    assert (record.applied, record.blame.layer, record.blame.role) == (False, "3", "grad_output")
    loop.optimizer.zero_grad()
    with torch.no_grad():
        loop.model[2].weight[1, 1] = math.inf
    loop.gradients(1)
    record = loop.precision.step(loop.optimizer).read()
    assert (record.applied, record.blame.layer, record.blame.role) == (False, "2", "weight")


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("bad", [0, 1, 2])
def test_a_bad_micro_batch_among_good_ones_skips_the_step(name, bad):
    loop = Loop(name)
    for micro in range(3):
        x = torch.randn(16, loop.width, generator=torch.Generator().manual_seed(micro))
        x[0, 0] = math.inf if micro == bad else 1.0
        loop.gradients(micro, x=x)
    assert not loop.precision.step(loop.optimizer).applied


def test_overflows_lower_the_scale_and_training_goes_on():
    """A scale far too large: FP16 skips, backs off, and applies once the scaled gradients fit."""
    scale = LossScale(kind=LossScaleKind.dynamic, init=2.0**40, hysteresis=1)
    loop = Loop(replace(PrecisionPolicy.named("fp16"), loss_scale=scale))
    records = [loop.step(0) for _ in range(60)]
    skips = [record.applied for record in records].index(True)
    assert 5 < skips < 40
    assert [record.event for record in records[:skips]] == [ScaleEvent.backed_off] * skips
    assert [record.scale for record in records[: skips + 1]] == [2.0 ** (40 - n) for n in range(skips + 1)]
    later = [record.applied for record in records[skips:]]
    assert sum(later) > 30
    assert loop.precision.scaler.scale.item() == 2.0 ** (40 - skips - later.count(False)), "each skip, and no more"

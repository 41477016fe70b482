"""What a user's loop is refused, each in one sentence with what to do instead; and that going on after it works."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from field_loops import NAMES, batch, loss_of, mlp, two, width
from torch.optim import SGD

from mptrain import Precision

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("clip", [None, -1.0, math.nan, "1", [1.0]])
def test_a_clip_that_is_no_norm_is_refused(clip):
    model, _, precision, ours, _ = two("fp16")
    precision.backward(loss_of(model, batch()))
    if clip == "1":
        assert precision.step(ours[0], clip=clip).applied
        return
    with pytest.raises(ValueError, match=r"clip is .*: give the largest gradient norm"):
        precision.step(ours[0], clip=clip)


def test_lbfgs_a_number_and_nothing_are_refused_in_a_sentence():
    model, _, precision, ours, _ = two("fp16")
    precision.backward(loss_of(model, batch()))
    with pytest.raises(TypeError, match=r"LBFGS evaluates the model several times .* use an optimizer"):
        precision.step(torch.optim.LBFGS(model.parameters()))
    with pytest.raises(TypeError, match=r"not float: precision.step\(optimizer, clip=1.0\)"):
        precision.step(ours[0], 1.0)
    with pytest.raises(TypeError, match="step takes an optimizer"):
        precision.step()
    with pytest.raises(ValueError, match="in two of these optimizers"):
        precision.step(ours[0], SGD(model.parameters(), lr=1.0))


def test_verbs_before_prepare_say_so():
    precision, model = Precision("fp16"), mlp()
    loss = loss_of(model, batch())
    verbs = {
        "forward": precision.forward,
        "backward": lambda: precision.backward(loss),
        "step": lambda: precision.step(SGD(model.parameters(), lr=0.1)),
        "evaluating": lambda: precision.evaluating().__enter__(),
        "recompute": lambda: precision.recompute(model, batch().requires_grad_()),
        "state_dict": precision.state_dict,
        "load_state_dict": lambda: precision.load_state_dict({}),
    }
    for verb in verbs.values():
        with pytest.raises(RuntimeError, match=r"call precision\.prepare\(model\) first"):
            verb()


@pytest.mark.parametrize("name", NAMES)
def test_a_backward_that_is_not_ours_is_noticed(name):
    """Alone, and added to one of ours: FP16's would be divided by 65,536 and called applied."""
    needs_ours = name not in ("fp32", "bf16")
    for alone in (True, False):
        model = mlp(width(name))
        precision = Precision(name).prepare(model)
        optimizer = SGD(model.parameters(), lr=0.1)
        for ours in (False,) if alone else (True, False):
            with precision.forward():
                loss = loss_of(model, batch(width(name)))
            precision.backward(loss) if ours else loss.backward()
        if not needs_ours:
            assert precision.step(optimizer).applied
            continue
        with pytest.raises(ValueError, match=rf"precision={name} needs precision\.backward\(loss\)"):
            precision.step(optimizer)
        optimizer.zero_grad()
        with precision.forward():
            loss = loss_of(model, batch(width(name)))
        precision.backward(loss)
        assert precision.step(optimizer).applied, "and goes on when it is done right"


def test_a_batch_thrown_away_leaves_nothing_behind():
    """Its gradients were zeroed before any step: its Inf must not skip the next one."""
    model = mlp()
    precision = Precision("fp8").prepare(model)
    optimizer = SGD(model.parameters(), lr=0.1)
    x = batch()
    x[0, 0] = math.inf
    for data in (x, batch()):
        optimizer.zero_grad()
        with precision.forward():
            loss = model(data).float().nan_to_num(posinf=1.0, neginf=1.0).square().mean()
        precision.backward(loss)
    assert precision.step(optimizer).applied


def test_many_backwards_without_a_step_keep_no_losses():
    model = mlp()
    precision = Precision("bf16").prepare(model)
    for _ in range(1100):
        precision.backward(model[0].bias.sum() * 0.0)
    assert len(precision._losses) == 1024


def test_a_precision_has_one_model():
    precision, model = Precision("bf16").prepare(mlp()), mlp()
    with pytest.raises(ValueError, match="bound to a model already"):
        precision.prepare(model)
    assert copy.deepcopy(precision) is precision


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16", "fp8"])
def test_weights_that_are_no_masters_any_more_are_refused(name):
    model = mlp()
    precision = Precision(name).prepare(model)
    model.bfloat16()
    optimizer = SGD(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with pytest.raises(ValueError, match=r"is torch\.bfloat16 now: parameters are the FP32 master weights"):
        precision.step(optimizer)

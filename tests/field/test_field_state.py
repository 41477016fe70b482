"""State reaches exactly as far as its model: copies, contexts inside contexts, forwards outside of any.

The oracle of "FP32" is the plain model; that of "the policy" is the prepared model in its own forward.
"""

from __future__ import annotations

import copy
import io
import math
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

from mptrain import Precision

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ("fp32", "tf32", "bf16", "fp16", "fp8", "fp8-delayed", "fp8-rowwise", "fp8-block")
LOW = NAMES[1:]
QUANTIZED = NAMES[4:]


def width(name: str) -> int:
    return 128 if name == "fp8-block" else 32


def mlp(name: str = "", seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    n = width(name)
    return nn.Sequential(nn.Linear(n, n), nn.Tanh(), nn.Linear(n, n))


def batch(name: str = "", seed: int = 1) -> torch.Tensor:
    return torch.randn(16, width(name), generator=torch.Generator().manual_seed(seed))


def prepared(name: str, seed: int = 0) -> tuple[Precision, nn.Sequential]:
    model = mlp(name, seed)
    return Precision(name).prepare(model), model


def evaluated(precision: Precision, model: nn.Module, x: torch.Tensor, *, policy_on: bool = True) -> torch.Tensor:
    with precision.evaluating(policy_on=policy_on):
        return model(x)


def step(precision: Precision, model: nn.Module, optimizer, x: torch.Tensor):
    with precision.forward():
        loss = model(x).float().square().mean()
    precision.backward(loss)
    outcome = precision.step(optimizer)
    optimizer.zero_grad()
    return outcome


# ---- copies ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_deep_copy_runs_as_the_original_does(name):
    precision, model = prepared(name)
    plain, x = mlp(name), batch(name)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), plain(x)), "outside every context FP32"
    for policy_on in (True, False):
        ours = evaluated(precision, model, x, policy_on=policy_on)
        assert torch.equal(evaluated(precision, twin, x, policy_on=policy_on), ours)
        assert policy_on or torch.equal(ours, plain(x))
        assert torch.equal(ours, plain(x)) is (not policy_on or name == "fp32")


@pytest.mark.parametrize("name", ["bf16", *QUANTIZED])
def test_a_copy_at_work_leaves_the_original_training_alone(name):
    """An EMA or a key encoder, evaluated between steps and inside them: bit for bit the run without it."""
    finals = []
    for with_copy in (False, True):
        precision, model = prepared(name)
        twin = copy.deepcopy(model)
        optimizer = SGD(model.parameters(), lr=0.1)
        for seed in range(4):
            with precision.forward():
                if with_copy:
                    with torch.no_grad():
                        twin(batch(name, seed) * 100)
                loss = model(batch(name, seed)).float().square().mean()
            precision.backward(loss)
            assert precision.step(optimizer).applied
            optimizer.zero_grad()
            if with_copy:
                evaluated(precision, twin, batch(name, seed) * 1e6)
        finals.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*finals)


@pytest.mark.parametrize("second", ["fp32", "bf16", "fp8"])
@pytest.mark.parametrize("name", NAMES)
def test_a_copy_is_prepared_again_only_where_nothing_was_converted(name, second):
    precision, model = prepared(name)
    with pytest.raises(ValueError, match=r"the model is prepared already, .* build a new one"):
        Precision(second).prepare(model)
    twin, inner = copy.deepcopy(model), nn.Sequential(copy.deepcopy(model), nn.Linear(width(name), 16))
    if name in QUANTIZED:
        with pytest.raises(ValueError, match=r"the model is prepared already, or a copy whose layers are converted"):
            Precision(second).prepare(twin)
        with pytest.raises(ValueError, match=r"0 is prepared already"):
            Precision(second).prepare(inner)
        return
    fresh, x = mlp(name), batch(name)
    right = Precision(second).prepare(fresh)
    own = Precision(second).prepare(twin)
    Precision(second).prepare(inner)
    assert torch.equal(evaluated(own, twin, x), evaluated(right, fresh, x))
    exact = mlp(name)(x)
    with precision.evaluating():
        assert torch.equal(twin(x), exact), "no longer the original's: FP32 inside its context"


@pytest.mark.parametrize("name", NAMES)
def test_a_pickle_is_plain_or_refused(name):
    precision, model = prepared(name)
    if name in QUANTIZED:
        with pytest.raises(TypeError, match=r"cannot be pickled: save model\.state_dict\(\)"):
            pickle.dumps(model)
    else:
        again = pickle.loads(pickle.dumps(model))
        buffer = io.BytesIO()
        torch.save(model, buffer)
        assert torch.equal(again(batch(name)), mlp(name)(batch(name)))
        other = Precision("fp8").prepare(again)
        assert not torch.equal(evaluated(other, again, batch(name)), again(batch(name)))
    with pytest.raises(TypeError, match=r"cannot be pickled: save its state_dict\(\)"):
        pickle.dumps(precision)


# ---- contexts inside contexts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("outer", ["autocast", *LOW])
@pytest.mark.parametrize("name", NAMES)
def test_a_model_keeps_its_own_precision_inside_anothers(name, outer):
    """A teacher in a student's forward: in its own forward, in its evaluation, FP32 outside of both."""
    precision, teacher = prepared(name)
    x = batch(name)
    right = evaluated(precision, teacher, x)
    if outer == "autocast":
        around = torch.autocast("cpu", dtype=torch.bfloat16)
    else:
        around = prepared(outer, seed=3)[0].forward()
    with around:
        with precision.forward():
            assert torch.equal(teacher(x), right)
        with precision.evaluating():
            assert torch.equal(teacher(x), right)
        with precision.evaluating(policy_on=False):
            assert torch.equal(teacher(x), mlp(name)(x.float())) or outer == "skip"
        if outer != "autocast":  # the user's own autocast is the user's
            assert torch.equal(teacher(x), fp32(mlp(name), x))


def fp32(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The plain model, whatever surrounds it."""
    found: list[torch.Tensor] = []
    other = threading.Thread(target=lambda: found.append(model(x).detach()))  # modes and autocast are the thread's own
    other.start()
    other.join()
    return found[0]


@pytest.mark.parametrize("name", NAMES)
def test_a_student_trains_the_same_with_a_teacher_inside(name):
    teacher_precision, teacher = prepared("fp8", seed=7)
    teacher_x = batch()
    target = evaluated(teacher_precision, teacher, teacher_x).float().sum()
    finals = []
    for inside in (False, True):
        precision, student = prepared(name)
        optimizer = SGD(student.parameters(), lr=0.1)
        for seed in range(3):
            with precision.forward():
                if inside:
                    with teacher_precision.evaluating():
                        assert torch.equal(teacher(teacher_x).float().sum(), target)
                loss = (student(batch(name, seed)).float() - 0.01 * target).square().mean()
            precision.backward(loss)
            assert precision.step(optimizer).applied
            optimizer.zero_grad()
        finals.append(torch.cat([p.detach().flatten() for p in student.parameters()]))
    assert torch.equal(*finals)


@pytest.mark.parametrize("name", NAMES)
def test_two_contexts_entered_together_serve_each_its_model(name):
    (one, first), (other, second) = prepared(name), prepared("bf16", seed=3)
    x, y = batch(name), batch()
    alone = evaluated(one, first, x), evaluated(other, second, y)
    with torch.no_grad(), one.forward(), other.forward():
        assert torch.equal(first(x), alone[0])
        assert torch.equal(second(y), alone[1])
    with torch.no_grad(), other.forward(), one.forward():
        assert torch.equal(first(x), alone[0])
        assert torch.equal(second(y), alone[1])


@pytest.mark.parametrize("name", NAMES)
def test_an_evaluation_inside_a_forward_changes_nothing(name):
    finals = []
    for inside in (False, True):
        precision, model = prepared(name)
        optimizer = SGD(model.parameters(), lr=0.1)
        for seed in range(3):
            with precision.forward():
                hidden = model[1](model[0](batch(name, seed)))
                if inside:
                    evaluated(precision, model, batch(name, 9) * 50)
                    masters = evaluated(precision, model, batch(name, 9), policy_on=False)
                    assert masters.dtype == torch.float32
                    with pytest.raises(ZeroDivisionError), precision.evaluating():
                        raise ZeroDivisionError
                loss = model[2](hidden).float().square().mean()
            precision.backward(loss)
            assert precision.step(optimizer).applied
            optimizer.zero_grad()
        finals.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*finals)


# ---- outside of any context --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_forward_outside_is_fp32_and_leaves_no_trace(name):
    """Inf and a thousandfold input in it: neither moves a scale nor skips the next step."""
    finals = []
    for outside in (False, True):
        precision, model = prepared(name)
        optimizer = SGD(model.parameters(), lr=0.1)
        for seed in range(3):
            assert step(precision, model, optimizer, batch(name, seed)).applied
            if outside:
                plain = mlp(name)
                plain.load_state_dict(model.state_dict())
                assert torch.equal(model(batch(name)), plain(batch(name)))
                with torch.no_grad():
                    model(batch(name) * 1000)
                    model(torch.full_like(batch(name), math.inf))
        finals.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*finals)


@pytest.mark.parametrize("name", QUANTIZED)
def test_inside_a_forward_no_grad_counts_too(name):
    precision, model = prepared(name)
    optimizer = SGD(model.parameters(), lr=0.1)
    x = batch(name)
    x[0, 0] = math.inf
    with precision.forward():
        with torch.no_grad():
            model(x)
        loss = model(batch(name)).float().square().mean()
    precision.backward(loss)
    assert not precision.step(optimizer).applied


# ---- several steps, and backwards, inside one context ------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_steps_inside_one_context_are_those_of_a_context_each(name):
    finals = []
    for inside in (False, True):
        precision, model = prepared(name)
        optimizer = SGD(model.parameters(), lr=0.5)
        if inside:
            with precision.forward():
                for seed in range(4):
                    precision.backward(model(batch(name, seed)).float().square().mean())
                    assert precision.step(optimizer).applied
                    optimizer.zero_grad()
        else:
            for seed in range(4):
                assert step(precision, model, optimizer, batch(name, seed)).applied
        finals.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*finals)


@pytest.mark.parametrize("name", NAMES)
def test_a_backward_inside_the_forward_gives_the_same_gradients(name):
    found = []
    for inside in (False, True):
        precision, model = prepared(name)
        with precision.forward():
            loss = model(batch(name)).float().square().mean()
            if inside:
                precision.backward(loss)
        if not inside:
            precision.backward(loss)
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.equal(*found)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_users_checkpointing_gives_the_same_gradients_and_books_once(name, reentrant):
    found = []
    for recomputed in (False, True):
        precision, model = prepared(name)
        optimizer = SGD(model.parameters(), lr=0.1)
        precision.counters.sample(["counts"])
        x = batch(name).requires_grad_()
        with precision.forward():
            hidden = checkpoint(model[:2], x, use_reentrant=reentrant) if recomputed else model[:2](x)
            loss = model[2](hidden).float().square().mean()
        precision.backward(loss)
        counts = precision.counters.take()["counts"]
        gradients = [p.grad.clone() for p in model.parameters()]
        assert precision.step(optimizer).applied
        found.append((counts, torch.cat([g.flatten() for g in gradients])))
    (counts, plain), (again, replayed) = found
    assert torch.equal(counts, again)
    assert torch.equal(plain, replayed)


def test_two_threads_keep_their_precisions():
    (one, first), (other, second) = prepared("bf16"), prepared("fp8", seed=3)
    right = [evaluated(one, first, batch()), evaluated(other, second, batch())]
    wrong: list[str] = []

    def run(precision, model, expected):
        for _ in range(50):
            with torch.no_grad(), precision.forward():
                if not torch.equal(model(batch()), expected):
                    wrong.append(precision.policy.name)

    threads = [threading.Thread(target=run, args=job) for job in ((one, first, right[0]), (other, second, right[1]))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong

"""What a trainer's step costs beside the model's, counted: calls into mptrain, torch operators, Python objects.

Times of microseconds depend on the machine and on what else it does; these numbers do not. One that falls is written
down here; one that rises is a cost that every step of every run pays: a call is 0.2 to 1 us, an operator on a CPU 2 us.
`mptrain bench cpu` has the times.
"""

import collections
import gc
import sys
from pathlib import Path
from weakref import WeakSet

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mptrain
from mptrain.bench import cpu
from mptrain.precision import regions
from mptrain.precision.policy import LossScaleKind

FOLDER = str(Path(mptrain.__file__).parent)
STEPS = 10  # of which one reads back what has gathered
INLINED = ("<listcomp>", "<dictcomp>", "<setcomp>")  # no calls since Python 3.12
# (calls into mptrain's files, operators) of ten steps; the bare loop's are 630 operators.
MOST = {LossScaleKind.none: (418, 611), LossScaleKind.static: (468, 651), LossScaleKind.dynamic: (478, 651)}
pytestmark = pytest.mark.usefixtures("one_thread")


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is not torch.ops.aten._local_scalar_dense.default  # a read: 0.15 us on a CPU
        return function(*args, **(kwargs or {}))


def calls_of(work):
    """How often each function of mptrain is called."""
    counts = collections.Counter()

    def note(frame, event, _):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(FOLDER) and code.co_name not in INLINED:
            counts[f"{code.co_filename.removeprefix(FOLDER)}:{code.co_name}"] += 1

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(before)
    return counts


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No other model of this process is prepared: beside a second one calls cost 15 us more."""
    monkeypatch.setattr(regions, "_FENCES", WeakSet())


@pytest.mark.parametrize("kind", LossScaleKind)
def test_ten_steps_cost_what_is_written_down(kind):
    steps = cpu.trainer_steps(kind, cpu.Sizes(steps=STEPS))
    for _ in range(12):  # the meter of memory, and as many losses as a spike is judged by
        steps()
    calls = calls_of(steps)
    with Operators() as operators:
        steps()
    most_calls, most_operators = MOST[kind]
    assert calls.total() <= most_calls, calls.most_common(60)
    assert operators.count <= most_operators


def test_a_step_leaves_nothing_behind():
    steps = cpu.trainer_steps(LossScaleKind.dynamic, cpu.Sizes(steps=STEPS))
    for _ in range(12):
        steps()

    def objects():
        gc.collect()
        return len(gc.get_objects())

    before = objects()
    for _ in range(3):
        steps()
    assert objects() <= before + 10

"""The loss scale: its rule as traces, torch's GradScaler as an oracle, and a state that continues it."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mptrain import LossScale, LossScaler, ScaleEvent
from mptrain.precision.policy import LossScaleKind

CPU = torch.device("cpu")
LETTERS = {
    ".": ScaleEvent.steady, "g": ScaleEvent.grew, "b": ScaleEvent.backed_off, "F": ScaleEvent.at_floor,
    "t": ScaleEvent.tolerated,
}  # fmt: skip


def scaler(kind="dynamic", **settings):
    return LossScaler(LossScale(kind=LossScaleKind[kind], **settings), CPU)


def trace(made, overflows):
    """(scale, event) after each step; ``overflows``: an ``x`` for a step that found Inf, anything else for a good one.

    The flag is what :class:`mptrain.Precision` hands over: a bool tensor without dimensions.
    """
    steps = []
    for letter in overflows:
        event = made.update(torch.tensor(letter == "x"))
        assert event.shape == made.scale.shape == ()
        assert made.scale.dtype == torch.float32
        steps.append((made.scale.item(), ScaleEvent(int(event))))
    return steps


SMALL = {"init": 16.0, "growth": 2.0, "backoff": 0.5, "interval": 3, "hysteresis": 1, "floor": 1.0}
TRACES = {
    # name: (settings, overflows, events, scales)
    "grows at the interval and not before": ({}, "------", "..g..g", (16, 16, 32, 32, 32, 64)),
    "an interval of one grows at each step": ({"interval": 1}, "---", "ggg", (32, 64, 128)),
    "an overflow backs off and restarts the interval": ({}, "--x---", "..b..g", (16, 16, 8, 8, 8, 16)),
    "another factor": ({"growth": 4.0, "backoff": 0.25}, "x---", "b..g", (4, 4, 4, 16)),
    "hysteresis absorbs the first overflow": ({"hysteresis": 2}, "xx", "tb", (16, 8)),
    "not only of consecutive ones": ({"hysteresis": 2}, "x--x", "t..b", (16, 16, 16, 8)),
    "spent, it stays spent": ({"hysteresis": 2}, "xx-x-x", "tb.b.b", (16, 8, 8, 4, 4, 2)),
    "until the scale grows": ({"hysteresis": 2}, "xx---xx", "tb..gtb", (16, 8, 8, 8, 16, 16, 8)),
    "three are absorbed by four": ({"hysteresis": 4}, "xxxxx", "tttbb", (16, 16, 16, 8, 4)),
    "a tolerated overflow restarts the interval": ({"hysteresis": 9}, "--x--", "..t..", (16,) * 5),
    "the floor holds, with an alarm": ({"init": 4.0}, "xxxxx", "bbFFF", (2, 1, 1, 1, 1)),
    "the last fall stops at the floor": ({"init": 10.0, "floor": 4.0}, "xxx", "bbF", (5, 4, 4)),
    "from the floor it grows again": ({"init": 1.0}, "x---x", "F..gb", (1, 1, 1, 2, 1)),
    "a floor at init alarms at once": ({"floor": 16.0}, "x", "F", (16,)),
    "a floor that FP32 rounds": ({"init": 0.15, "floor": 0.1}, "xxx", "bFF", (0.1, 0.1, 0.1)),
    "hysteresis comes before the floor": ({"init": 1.0, "hysteresis": 2}, "xx", "tF", (1, 1)),
    "growth stops below Inf": ({"init": 2.0**126}, "---------", "..g......", (2.0**126,) * 2 + (2.0**127,) * 7),
}


@pytest.mark.parametrize("name", TRACES)
def test_trace(name):
    changed, overflows, events, scales = TRACES[name]
    steps = trace(scaler(**SMALL | changed), overflows)
    assert [event for _, event in steps] == [LETTERS[letter] for letter in events]
    assert [scale for scale, _ in steps] == [torch.tensor(float(scale)).item() for scale in scales]


@pytest.mark.parametrize(("kind", "wanted"), [("none", 1.0), ("static", 1024.0)])
def test_without_dynamics_nothing_moves(kind, wanted):
    made = scaler(kind, init=1024.0)
    assert trace(made, "x-xx" + "-" * 4000) == [(wanted, ScaleEvent.steady)] * 4004


@pytest.mark.parametrize(("kind", "wanted"), [("none", 0.25), ("static", 256.0), ("dynamic", 256.0)])
def test_scaled_loss(kind, wanted):
    """In FP32, whatever the loss came in: an FP16 loss times 2^16 would be Inf."""
    made, loss = scaler(kind, init=1024.0), torch.tensor(0.25, dtype=torch.bfloat16)
    scaled = made.scaled(loss)
    assert scaled.item() == wanted
    assert (scaled is loss) == (not made.active) == (kind == "none")
    assert scaled.dtype == (torch.float32 if made.active else torch.bfloat16)


def test_the_floor_is_where_gradscaler_falls_to_zero():
    """200 overflows: torch's scale underflows to 0 and never comes back, ours waits at the floor and recovers."""
    theirs = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)
    ours = scaler(init=4.0, interval=2, hysteresis=1)
    assert gradscaler_trace(theirs, "x" * 200 + "--")[-1] == 0.0
    steps = trace(ours, "x" * 200 + "--")
    assert [scale for scale, _ in steps[1:200]] == [1.0] * 199
    assert {event for _, event in steps[2:200]} == {ScaleEvent.at_floor}
    assert steps[-1] == (2.0, ScaleEvent.grew)


def gradscaler_trace(theirs, overflows):
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    scales = []
    for letter in overflows:
        theirs.scale(torch.ones(()))
        weight.grad = torch.tensor([1.0, math.inf if letter == "x" else 1.0])
        theirs.step(optimizer)
        theirs.update()
        scales.append(theirs.get_scale())
    return scales


RUNS = st.text(alphabet="x---", max_size=40)


@settings(max_examples=60, deadline=None)
@given(
    overflows=RUNS,
    interval=st.integers(1, 5),
    exponent=st.sampled_from([0, 16, 120, 126, 127]),
    growth=st.sampled_from([1.5, 2.0, 4.0]),
    backoff=st.sampled_from([0.25, 0.5, 0.75]),
)
def test_without_hysteresis_it_is_gradscaler(overflows, interval, exponent, growth, backoff):
    """Bit for bit, overflow of the scale itself included; factors exact in FP32, for torch multiplies in FP64."""
    init = 2.0**exponent
    theirs = torch.amp.GradScaler("cpu", init, growth, backoff, growth_interval=interval)
    ours = scaler(init=init, growth=growth, backoff=backoff, interval=interval, hysteresis=1, floor=2.0**-100)
    assert [scale for scale, _ in trace(ours, overflows)] == gradscaler_trace(theirs, overflows)


CONFIGS = st.builds(
    dict,
    interval=st.integers(1, 4),
    hysteresis=st.integers(1, 4),
    init=st.sampled_from([4.0, 65536.0, 2.0**127]),
    floor=st.sampled_from([0.5, 1.0, 3.0]),
)


@settings(max_examples=60, deadline=None)
@given(config=CONFIGS, before=RUNS, after=RUNS)
def test_a_loaded_state_continues_the_trace(config, before, after):
    ran, loaded = scaler(**config), scaler(**config)
    trace(ran, before)
    loaded.load_state_dict(copy.deepcopy(ran.state_dict()))
    assert loaded.scale.item() == ran.scale.item()
    assert trace(loaded, after) == trace(ran, after)


@settings(max_examples=60, deadline=None)
@given(config=CONFIGS, overflows=RUNS)
def test_laws(config, overflows):
    """Whatever happens: within [floor, FP32], falling only with a reason, and each event what the scale did."""
    made = scaler(**config)
    before = made.scale.item()
    for letter, (scale, event) in zip(overflows, trace(made, overflows), strict=True):
        assert config["floor"] <= scale < math.inf
        if event is ScaleEvent.grew:
            assert scale > before
        elif event is ScaleEvent.backed_off:
            assert scale < before
        else:
            assert scale == before
        bad = {ScaleEvent.backed_off, ScaleEvent.at_floor, ScaleEvent.tolerated}
        assert (event in bad) == (letter == "x")
        assert (event is ScaleEvent.at_floor) <= (scale == config["floor"])
        before = scale


def test_states_that_cross_kinds():
    """What continues: dynamic only. A run without scaling leaves no 1 behind, a static scale is what was set."""
    dynamic = scaler(init=64.0, interval=1)
    trace(dynamic, "--")
    state = dynamic.state_dict()
    static, none = scaler("static", init=1024.0), scaler("none")
    for made, kept in ((static, 1024.0), (none, 1.0)):
        made.load_state_dict(copy.deepcopy(state))
        assert made.scale.item() == kept
    fresh = scaler(init=64.0)
    fresh.load_state_dict(copy.deepcopy(none.state_dict()))
    assert fresh.scale.item() == 64.0, "FP16 after BF16 starts from init"
    fresh.load_state_dict(copy.deepcopy(static.state_dict()))
    assert fresh.scale.item() == 1024.0


@given(
    kind=st.builds(
        LossScale,
        kind=st.just(LossScaleKind.dynamic),
        init=st.sampled_from([1.0, 3.0, 65536.0, 3e38]),
        growth=st.sampled_from([2.0, 1.7]),
        backoff=st.sampled_from([0.5, 0.3]),
        interval=st.integers(1, 4),
        hysteresis=st.integers(1, 3),
        floor=st.sampled_from([0.5, 1.0]),
    ),
    found=st.lists(st.booleans(), max_size=40),
)
def test_the_rule_on_the_host_is_the_rule_on_the_device(kind, found):
    host, device = LossScaler(kind, CPU), LossScaler(kind, CPU)
    for value in found:
        events = host._update_on_host(value), device._update_on_device(torch.tensor(value))
        assert events[0].item() == events[1].item()
        assert events[0].dtype == events[1].dtype
        ours, theirs = host.state_dict(), device.state_dict()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)

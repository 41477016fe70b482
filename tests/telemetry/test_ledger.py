"""The step ledger: what a run of steps counts and what it tells."""

from dataclasses import asdict

import pytest

from mptrain import ScaleEvent, StepRecord
from mptrain.precision.outcome import Blame
from mptrain.telemetry.ledger import SKIPS_ALARM, UNCHANGED_ALARM, Ledger

GROWN = StepRecord(True, 1.0, 32.0, ScaleEvent.grew, next_scale=64.0)
APPLIED = StepRecord(True, 1.0, 32.0, ScaleEvent.steady)


def skipped(event=ScaleEvent.tolerated, scale=32.0, reason="Inf in the gradient of weight", layer="up"):
    return StepRecord(False, float("inf"), scale, event, blame(layer, reason), next_scale=scale / 2)


def blame(layer="up", reason="Inf in the gradient of weight"):
    return Blame(reason, layer, "grad_weight", "Inf", "backward", micro_batch=1, rank=2)


def skip_event(step, layer="up", reason="Inf in the gradient of weight"):
    return {"event": "skipped", "step": step, **asdict(blame(layer, reason))}


def record(ledger, steps, first=1):
    return [event for step, outcome in enumerate(steps, first) for event in ledger.record(step, outcome)]


TABLE = {
    # name: (steps, events, applied, skipped, in a row)
    "nothing to tell": ([APPLIED] * 3, [], 3, 0, 0),
    "the scale grew": (
        [APPLIED, GROWN],
        [{"event": "scale_grew", "step": 2, "scale": 64.0}],
        2, 0, 0,
    ),
    "a skip that hysteresis absorbed": ([APPLIED, skipped()], [skip_event(2)], 1, 1, 1),
    "a skip without loss scaling": ([skipped(ScaleEvent.steady, 1.0, "NaN", "head")], [skip_event(1, "head", "NaN")],
                                    0, 1, 1),
    "a skip and a smaller scale": (
        [skipped(ScaleEvent.backed_off), APPLIED],
        [skip_event(1), {"event": "scale_backed_off", "step": 1, "scale": 16.0}],
        1, 1, 0,
    ),
    "a skip at the floor": (
        [skipped(ScaleEvent.at_floor, 0.5)],
        [
            skip_event(1),
            {"event": "alarm", "step": 1,
             "reason": "overflow with the loss scale at its floor of 0.5: the gradients themselves overflow"},
        ],
        0, 1, 1,
    ),
    "skips apart are no alarm": (
        [skipped(), APPLIED] * 10, [skip_event(step) for step in range(1, 21, 2)], 10, 10, 0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_events_and_counts(name):
    steps, events, applied, skips, in_a_row = TABLE[name]
    ledger = Ledger()
    assert record(ledger, steps) == events
    assert (ledger.applied, ledger.skipped, ledger.skipped_in_a_row) == (applied, skips, in_a_row)


def test_alarm_at_each_eighth_skip_in_a_row():
    ledger = Ledger()
    events = record(ledger, [APPLIED] + [skipped()] * 17 + [APPLIED] + [skipped()] * 8)
    alarms = [(event["step"], event["reason"]) for event in events if event["event"] == "alarm"]
    advice = "steps skipped in a row: lower optim.lr, or use precision=bf16"
    assert SKIPS_ALARM == 8
    assert alarms == [(9, f"8 {advice}"), (17, f"16 {advice}"), (27, f"8 {advice}")]
    assert sum(event["event"] == "skipped" for event in events) == ledger.skipped == 25


def test_a_loaded_ledger_alarms_when_the_saved_one_would():
    """Seven skips, saved; the eighth comes after loading."""
    ran, loaded = Ledger(), Ledger()
    record(ran, [APPLIED] * 5 + [skipped()] * 7)
    state = ran.state_dict()
    loaded.load_state_dict(state)
    counted = {"applied": 5, "skipped": 7, "skipped_in_a_row": 7, "unchanged": 7, "moving": 1}
    assert state == counted | {"skipped_batches": 0, "rollbacks": 0}
    after = [skipped(), APPLIED, GROWN, skipped()]
    assert record(loaded, after, first=13) == (told := record(ran, after, first=13))
    assert [event["event"] for event in told] == ["skipped", "alarm", "scale_grew", "skipped"]
    assert loaded.state_dict() == ran.state_dict()
    assert (loaded.applied, loaded.skipped, loaded.skipped_in_a_row) == (7, 9, 1)
    assert state["skipped"] == 7, "a state is of its time"


def test_alarm_when_no_weight_changes():
    """Skipped steps change none; applied ones are as the last sampled one was."""
    ledger = Ledger()
    record(ledger, [APPLIED] * 200)
    assert ledger.unchanged == 0, "nothing was observed to stand still"
    ledger.observe(False)
    events = record(ledger, [APPLIED] * (UNCHANGED_ALARM - 1))
    assert events == []
    events = record(ledger, [APPLIED], first=UNCHANGED_ALARM)
    lost = "no weight has changed for 50 steps: updates are lost in rounding, use optim=adamw (FP32 masters)"
    assert events == [{"event": "alarm", "step": UNCHANGED_ALARM, "reason": lost}]
    ledger.observe(True)
    assert record(ledger, [APPLIED] * 60) == []
    alarms = [e["reason"] for e in record(ledger, [skipped()] * UNCHANGED_ALARM) if e["event"] == "alarm"]
    assert alarms[-1] == "no weight has changed for 50 steps"

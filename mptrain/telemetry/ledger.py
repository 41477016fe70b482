"""The step ledger: every optimizer step is applied or skipped with its reason, alike in all precisions.

Scheduler, EMA and the optimizer's own step count move with ``applied`` and nothing else. The ledger returns what is
worth telling; the trainer decides where it goes.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mptrain.precision.outcome import StepRecord

SKIPS_ALARM = 8  # in a row: dynamic scaling has then fallen by 2^7 without finding a scale that works
UNCHANGED_ALARM = 50  # steps without a weight that moved: half the length at which two runs can be compared
Event = dict[str, Any]


class Ledger:
    """Counts steps. ``applied`` is what the scheduler goes by; ``skipped_in_a_row`` feeds the alarm.

    ``unchanged``: steps since a weight moved. Skipped steps move none; of applied ones only those that
    :meth:`observe` was told of are known, and between two of them nothing is assumed to have changed.
    ``skipped_batches``: steps' worth of data left out by ``rollbacks`` so far; the data goes by step + skipped_batches.
    """

    def __init__(self) -> None:
        self.applied = 0
        self.skipped = 0
        self.skipped_in_a_row = 0
        self.unchanged = 0
        self.skipped_batches = self.rollbacks = 0
        self._moving = True

    def record(self, step: int, outcome: StepRecord) -> list[Event]:
        """Enter one resolved step; returns what is worth telling (skips, scale changes, alarms)."""
        events: list[Event] = []
        if outcome.applied:
            self.applied += 1
            self.skipped_in_a_row = 0
            self.unchanged = 0 if self._moving else self.unchanged + 1
        else:
            self.skipped += 1
            self.skipped_in_a_row += 1
            self.unchanged += 1
            blame = {} if outcome.blame is None else asdict(outcome.blame)
            events.append({"event": "skipped", "step": step, **blame})
            if self.skipped_in_a_row % SKIPS_ALARM == 0:
                text = f"{self.skipped_in_a_row} steps skipped in a row: lower optim.lr, or use precision=bf16"
                events.append(alarm(step, text))
        if outcome.event.name in ("grew", "backed_off"):
            events.append({"event": f"scale_{outcome.event.name}", "step": step, "scale": outcome.next_scale})
        if outcome.event.name == "at_floor":
            text = f"overflow with the loss scale at its floor of {outcome.scale:g}: the gradients themselves overflow"
            events.append(alarm(step, text))
        if self.unchanged and self.unchanged % UNCHANGED_ALARM == 0:
            text = f"no weight has changed for {self.unchanged} steps"
            advice = "" if self.skipped_in_a_row else ": updates are lost in rounding, use optim=adamw (FP32 masters)"
            events.append(alarm(step, text + advice))
        return events

    def observe(self, moved: bool) -> None:
        """Note of a sampled applied step, before it is recorded, whether any weight changed."""
        self._moving = moved

    def roll_back(self, step: int, to: int, skipped_batches: int, rollbacks: int) -> Event:
        """Enter a return from ``step`` to ``to``; the last two are the counts before it, which outlive it."""
        self.skipped_batches, self.rollbacks = skipped_batches + step - to, rollbacks + 1
        text = f"went back to step {to} and left out the batches of {step - to} steps"
        return {"event": "rollback", "step": step, "to": to, "skipped_batches": step - to, "reason": text}

    def state_dict(self) -> dict[str, int]:
        return {
            "applied": self.applied,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "unchanged": self.unchanged,
            "moving": int(self._moving),
            "skipped_batches": self.skipped_batches,
            "rollbacks": self.rollbacks,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.applied, self.skipped = state["applied"], state["skipped"]
        self.skipped_in_a_row = state["skipped_in_a_row"]
        self.skipped_batches, self.rollbacks = state.get("skipped_batches", 0), state.get("rollbacks", 0)
        self.unchanged, self._moving = state.get("unchanged", 0), bool(state.get("moving", 1))


def alarm(step: int, text: str, **where: Any) -> Event:
    """An event that a person should act on."""
    return {"event": "alarm", "step": step, "reason": text, **where}

"""The step ledger: every optimizer step is applied or skipped with its reason, alike in all precisions."""

from __future__ import annotations

from typing import Any

from mptrain.outcome import StepRecord
from mptrain.scaling import ScaleEvent

SKIPS_ALARM = 8  # in a row: dynamic scaling has then fallen by 2^7 without finding a scale that works
Event = dict[str, Any]


class Ledger:
    """Counts steps. ``applied`` is what the scheduler goes by; ``skipped_in_a_row`` feeds the alarm."""

    def __init__(self) -> None:
        self.applied = 0
        self.skipped = 0
        self.skipped_in_a_row = 0

    def record(self, step: int, outcome: StepRecord) -> list[Event]:
        """Enter one resolved step; returns what is worth telling (skips, scale changes, alarms)."""
        events: list[Event] = []
        if outcome.applied:
            self.applied += 1
            self.skipped_in_a_row = 0
        else:
            self.skipped += 1
            self.skipped_in_a_row += 1
            where = {"layer": outcome.layer, "role": outcome.role, "rank": 0}
            events.append({"event": "skipped", "step": step, "reason": outcome.reason, **where})
            if self.skipped_in_a_row % SKIPS_ALARM == 0:
                text = f"{self.skipped_in_a_row} steps skipped in a row: lower optim.lr, or use precision=bf16"
                events.append({"event": "alarm", "step": step, "reason": text})
        if outcome.event in (ScaleEvent.grew, ScaleEvent.backed_off):
            events.append({"event": f"scale_{outcome.event.name}", "step": step, "scale": outcome.next_scale})
        if outcome.event is ScaleEvent.at_floor:
            text = f"overflow with the loss scale at its floor of {outcome.scale:g}: the gradients themselves overflow"
            events.append({"event": "alarm", "step": step, "reason": text})
        return events

    def state_dict(self) -> dict[str, int]:
        return {"applied": self.applied, "skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.applied, self.skipped = state["applied"], state["skipped"]
        self.skipped_in_a_row = state["skipped_in_a_row"]

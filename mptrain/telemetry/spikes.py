"""Loss spikes: a training loss far above what it has been, by a rule that a few good steps teach it.

A loss spikes if it is not finite, or above the median of the last ``WINDOW`` losses by more than ``DEVIATIONS`` robust
standard deviations (1.4826 x the median absolute deviation, of normal noise) and by 5 % of the median. Before 20
losses are known nothing is a spike.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Any

WINDOW, LEAST = 100, 20
DEVIATIONS, LEAST_FRAC = 8.0, 0.05  # by chance alone 8 deviations come once in 10^15 steps


class Spikes:
    """Learns from the losses that are no spikes."""

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=WINDOW)

    def first(self, losses: list[float]) -> int | None:
        """The index of the first spike among these losses, in the order of their steps; None if there is none."""
        for index, loss in enumerate(losses):
            if self._is_one(loss):
                return index
            self._losses.append(loss)
        return None

    @property
    def usual(self) -> float:
        """The median of the losses it goes by."""
        return statistics.median(self._losses) if self._losses else math.nan

    def _is_one(self, loss: float) -> bool:
        if len(self._losses) < LEAST:
            return False
        median = self.usual
        spread = 1.4826 * statistics.median(abs(value - median) for value in self._losses)
        return not loss <= median + max(DEVIATIONS * spread, LEAST_FRAC * abs(median))  # a NaN is one

    def state_dict(self) -> dict[str, Any]:
        return {"losses": list(self._losses)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._losses = deque(state.get("losses", []), maxlen=WINDOW)

"""Loss spikes: a training loss far above where it was, by a rule that the good steps before it teach.

A loss spikes if it is not finite, or above the median of the last ``LEVEL`` losses by more than ``DEVIATIONS`` standard
deviations and by 5 % of that median. The deviation is that of the differences from step to step over the last
``WINDOW`` steps, over sqrt(2), estimated robustly (1.4826 x the median absolute deviation, of normal noise): a loss
that falls steadily has none. Before 20 losses are known nothing is a spike.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import deque
from typing import Any

WINDOW, LEVEL, LEAST = 100, 10, 20
DEVIATIONS, LEAST_FRAC = 8.0, 0.05  # by chance alone 8 deviations come once in 10^15 steps


class Spikes:
    """Learns from the losses that are not spikes."""

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
        """The level it goes by."""
        recent = list(self._losses)[-LEVEL:]
        return statistics.median(recent) if recent else math.nan

    def _is_one(self, loss: float) -> bool:
        if len(self._losses) < LEAST:
            return False
        recent = sorted(itertools.islice(reversed(self._losses), LEVEL))
        level = (recent[(LEVEL - 1) // 2] + recent[LEVEL // 2]) / 2  # statistics.median takes 3 times as long
        if loss <= level + LEAST_FRAC * abs(level):  # as most are: the deviation, 15 us, is for those above
            return False
        changes = [after - before for before, after in itertools.pairwise(self._losses)]
        middle = statistics.median(changes)
        deviation = 1.4826 * statistics.median([abs(change - middle) for change in changes]) / math.sqrt(2)
        return not loss <= level + DEVIATIONS * deviation  # a NaN is one

    def state_dict(self) -> dict[str, Any]:
        return {"losses": list(self._losses)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._losses = deque(state.get("losses", []), maxlen=WINDOW)

"""Overflow and underflow per layer and role, counted on sampled steps and read back once each.

*Overflow events* are elements that would round past the format's maximum, plus Inf and NaN seen before the cast;
*underflow* is the share of elements that were not zero and became zero.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mptrain.kernels import COUNTS
from mptrain.kernels.counters import N_COUNTS, Counters

ELEMENTS, SATURATED, FLUSHED, INF, NAN = range(N_COUNTS)
assert len(COUNTS) == N_COUNTS
WORST = 5  # layers named in the summary


class Monitor:
    """Decides which steps are sampled and adds up what they counted (``totals``: int64 [slots, 5] on the host)."""

    def __init__(self, counters: Counters, every: int) -> None:
        self._counters, self._every = counters, every
        self.totals = torch.zeros(len(counters.slots), N_COUNTS, dtype=torch.int64)

    @property
    def sampling(self) -> bool:
        """Is the step under way a sampled one?"""
        return self._counters.counting

    def begin_step(self, step: int) -> None:
        """``step`` counts from 1. The first is sampled too, so that the shortest run has counts."""
        self._counters.counting = step == 1 or step % self._every == 0

    def end_step(self) -> dict[str, float]:
        """The counts of a sampled step as flat metrics; nothing on other steps."""
        if not self._counters.counting:
            return {}
        self._counters.counting = False
        counts = self._counters.take().cpu()
        self.totals += counts
        return summarize(counts)

    def worst(self) -> list[dict[str, Any]]:
        """The slots with the largest share of saturated or flushed elements so far."""
        rows = []
        for (layer, role), row in zip(self._counters.slots, self.totals.tolist(), strict=True):
            elements = max(1, row[ELEMENTS])
            overflow = row[SATURATED] + row[INF] + row[NAN]
            rows.append(
                {
                    "layer": layer,
                    "role": role,
                    "overflow_events": overflow,
                    "underflow_frac": row[FLUSHED] / elements,
                }
            )
        rows.sort(key=lambda r: (r["overflow_events"], r["underflow_frac"]), reverse=True)
        return rows[:WORST]

    def state_dict(self) -> dict[str, Tensor]:
        return {f"{layer}/{role}": self.totals[i] for i, (layer, role) in enumerate(self._counters.slots)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue the totals; slots of another precision than this run's have no place here."""
        for index, (layer, role) in enumerate(self._counters.slots):
            if f"{layer}/{role}" in state:
                self.totals[index] = state[f"{layer}/{role}"].cpu()


def summarize(counts: Tensor) -> dict[str, float]:
    """``numerics/*`` metrics of an int64 [slots, 5] table, over all slots."""
    row = counts.sum(0).tolist()
    return {
        "numerics/overflow_events": float(row[SATURATED] + row[INF] + row[NAN]),
        "numerics/nonfinite_elements": float(row[INF] + row[NAN]),
        "numerics/underflow_frac": row[FLUSHED] / max(1, row[ELEMENTS]),
    }

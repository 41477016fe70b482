"""The flight recorder's timer and reader: which steps are sampled, and what is made of them, read back once each.

*Overflow events* are elements that would round past the format's maximum, plus Inf and NaN seen before the cast;
*underflow* is the share of elements that were not zero and became zero. Two kinds of steps are sampled. *Recorded* are
the first, every ``record_every``-th and the last, and the step after a skipped one whose first bad tensor nobody saw:
every tensor, through hooks. *Counted* is every ``every``-th step of a quantized model: its casts count what they lose,
which costs them next to nothing. On all other steps no hook is installed and nothing is read back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mptrain.kernels import COUNTS
from mptrain.kernels.bins import INF as BIN_INF
from mptrain.kernels.bins import NAN as BIN_NAN
from mptrain.precision import Precision
from mptrain.precision.counters import N_COUNTS, OPERANDS
from mptrain.precision.outcome import StepOutcome, StepRecord
from mptrain.telemetry.ledger import Event, alarm
from mptrain.telemetry.observer import LOST, Observer
from mptrain.telemetry.record import Record
from mptrain.telemetry.stats import STATISTICS
from mptrain.tools.settings import require

ELEMENTS, SATURATED, FLUSHED, INF, NAN = range(N_COUNTS)
assert len(COUNTS) == N_COUNTS
WORST = 5  # layers named in the summary


@dataclass(frozen=True)
class TelemetryConfig:
    """``every``: steps between rows of metrics and progress; ``record_every``: between records of every tensor
    (histograms, errors, lost updates), 0 for no telemetry of the numerics at all. Alarms are raised for a layer above
    ``alarm_saturated_frac`` or ``alarm_flushed_frac`` of an operand's elements."""

    every: int = 10
    record_every: int = 300
    alarm_saturated_frac: float = 0.001
    alarm_flushed_frac: float = 0.1

    def __post_init__(self) -> None:
        require(self.every >= 1, "telemetry.every", self.every, "at least 1")
        require(self.record_every >= 0, "telemetry.record_every", self.record_every, "0 (off) or more")
        for name in ("alarm_saturated_frac", "alarm_flushed_frac"):
            require(0 <= getattr(self, name) <= 1, f"telemetry.{name}", getattr(self, name), "in [0, 1]")


@dataclass
class Sample:
    """The result of a sampled step.

    ``record`` None: its casts were counted, and no more. ``moved``: did a weight change (None: it was skipped, or
    nobody can tell)?
    """

    record: Record | None
    metrics: dict[str, float]
    events: list[Event]
    moved: bool | None


class Monitor:
    """``totals``: counts (int64 [rows, 5], on the host) of all sampled steps so far. ``recording``: are the tensors of
    the step under way recorded?"""

    def __init__(self, model: nn.Module, precision: Precision, config: TelemetryConfig, last_step: int) -> None:
        self._counters, self._config, self._last = precision.counters, config, last_step
        self._ranks = precision.ranks
        self._observer = Observer(model, precision.counters, precision.policy, self._ranks)
        self._suspicious, self._watched = False, 0
        self.recording = False
        self._loud: set[tuple[str, str, str]] = set()
        formats = zip(self._counters.slots, self._observer.formats, strict=True)
        self._rows = [(layer, role, str(fmt or "")) for (layer, role), fmt in formats]
        self._cast = torch.tensor([role in OPERANDS and fmt != "" for _, role, fmt in self._rows], dtype=torch.bool)
        self.totals = torch.zeros(len(self._counters.slots), N_COUNTS, dtype=torch.int64)

    def due(self, step: int) -> bool:
        """Tell whether ``step`` (from 1) is sampled. First and last are, so that the shortest run has a record."""
        self.recording = step in (1, self._last) or step % self._config.record_every == 0 or self._suspicious
        return self.recording or (self._counters.decisive > 0 and step % self._config.every == 0)

    def suspect(self, step: int, record: StepRecord) -> None:
        """``step`` came to ``record``. If it was skipped and nobody saw its first bad tensor, the next is watched."""
        seen = step == self._watched or (record.blame is not None and record.blame.role in OPERANDS)
        self._suspicious |= not record.applied and not seen

    def begin_step(self, step: int) -> None:
        if self.recording:
            self._suspicious, self._watched = False, step
            self._counters.turn = step // self._config.record_every
            self._observer.attach()
        else:
            self._counters.sample(["counts"])

    def see_gradients(self) -> None:
        """After the micro-batches, before ``precision.step``."""
        if self.recording:
            self._observer.detach()
            self._observer.see_gradients()

    def end_step(self, step: int, optimizer: Optimizer, outcome: StepOutcome) -> Sample:
        """After ``precision.step``: see the updates, read everything back."""
        counters, observer = self._counters, self._observer
        if not self.recording:
            counted = self._ranks.sum(counters.take()["counts"]).cpu()
            self.totals += counted
            return Sample(None, summarize(counted), self._alarms(step, counted), None)
        amax, result = self._ranks.max(counters.last_amax).cpu(), outcome.read()
        if result.applied:
            observer.see_updates(optimizer)
        tables = {name: self._ranks.sum(table).cpu() for name, table in counters.take().items()}
        self._count_the_uncast(tables)
        self.totals += tables["counts"]
        for name, states in observer.extra.items():
            shape = next(iter(states.values())).shape
            held = torch.stack([states.get(row, torch.zeros(shape)) for row in range(len(amax))])
            tables[name] = self._ranks.sum(held).cpu()
        scale = 1 / self._ranks.max(1 / counters.scale)  # of the largest amax
        tables |= {"amax": amax, "scale": scale.cpu(), "lost": self._ranks.sum(observer.lost).cpu()}
        record = Record(step, {"loss_scale": result.scale, "applied": result.applied}, self._rows, tables)
        moved = self._moved(optimizer, tables["lost"]) if result.applied else None
        return Sample(record, self._metrics(record), self._alarms(step, tables["counts"]), moved)

    def _count_the_uncast(self, tables: dict[str, Tensor]) -> None:
        """Operands that came in the format asked for lost nothing here; their elements, Inf and NaN are in the bins."""
        uncast = (tables["counts"][:, ELEMENTS] == 0) & self._cast
        bins = tables["histogram"][uncast]
        tables["counts"][uncast, ELEMENTS] = bins.sum(1)
        tables["counts"][uncast, INF], tables["counts"][uncast, NAN] = bins[:, BIN_INF], bins[:, BIN_NAN]

    def _moved(self, optimizer: Optimizer, lost: Tensor) -> bool | None:
        """Tell whether any coordinate changed, given how this optimizer stores weights; None without an update to look
        at.
        """
        total = dict(zip(LOST, lost.sum(0).tolist(), strict=True))
        stored = getattr(optimizer, "weights", "fp32")
        return bool(total["asked"] > total[stored]) if total["asked"] else None

    def _metrics(self, record: Record) -> dict[str, float]:
        """``numerics/*`` over all operands, then figures of each row: ``<figure>/<layer>/<role>``."""
        values = summarize(record.tables["counts"])
        asked = record.tables["lost"].sum(0).tolist()
        if asked[0]:
            values |= {f"numerics/lost_{name}_frac": n / asked[0] for name, n in zip(LOST[1:], asked[1:], strict=True)}
        names = [f"{layer}/{role}" for layer, role, _ in record.rows]
        figures = {"amax": record.tables["amax"].double(), "scale": record.tables["scale"].double()}
        chosen = {"amax": self._cast, "scale": self._cast & (record.tables["scale"] != 1)}
        for statistic in STATISTICS.values():
            figures |= statistic.finish(record.tables[statistic.name])
        lost = record.tables["lost"]
        figures["lost_bf16_frac"] = lost[:, LOST.index("bf16")] / lost[:, 0]
        for figure, column in figures.items():
            shown = (chosen.get(figure, column.isfinite()) & column.isfinite()).nonzero().flatten()
            for row, value in zip(shown.tolist(), column[shown].tolist(), strict=True):
                values[f"{figure}/{names[row]}"] = value
        return values

    def _alarms(self, step: int, counts: Tensor) -> list[Event]:
        """Layers past a threshold, each told once until it has recovered."""
        limits = {"saturated": self._config.alarm_saturated_frac, "flushed to zero": self._config.alarm_flushed_frac}
        events = []
        loud: set[tuple[str, str, str]] = set()
        for column, (what, limit) in enumerate(limits.items(), start=SATURATED):
            shares = (counts[:, column] / counts[:, ELEMENTS]).nan_to_num()
            for row in (shares > limit).nonzero().flatten().tolist():
                layer, role, fmt = self._rows[row]
                loud.add((layer, role, what))
                if (layer, role, what) not in self._loud:
                    text = f"{shares[row]:.2%} of {role} {what} in {fmt}"
                    events.append(alarm(step, text, layer=layer, role=role))
        self._loud = loud
        return events

    def worst(self, most: int | None = WORST) -> list[dict[str, Any]]:
        """The ``most`` operands with the largest share of saturated or flushed elements so far; None: all counted."""
        rows = []
        for (layer, role), row in zip(self._counters.slots, self.totals.tolist(), strict=True):
            if row[ELEMENTS]:
                overflow = row[SATURATED] + row[INF] + row[NAN]
                share = row[FLUSHED] / row[ELEMENTS]
                rows.append({"layer": layer, "role": role, "overflow_events": overflow, "underflow_frac": share})
        rows.sort(key=lambda r: (r["overflow_events"], r["underflow_frac"]), reverse=True)
        return rows[:most]

    def state_dict(self) -> dict[str, Tensor]:
        rows = enumerate(self._counters.slots)
        return {f"{layer}/{role}": self.totals[i] for i, (layer, role) in rows if self.totals[i, ELEMENTS]}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue the totals; rows of another precision than this run's have no place here."""
        for index, (layer, role) in enumerate(self._counters.slots):
            if f"{layer}/{role}" in state:
                self.totals[index] = state[f"{layer}/{role}"].cpu()


def summarize(counts: Tensor) -> dict[str, float]:
    """``numerics/*`` metrics of an int64 [rows, 5] table, over all rows."""
    row = counts.sum(0).tolist()
    return {
        "numerics/overflow_events": float(row[SATURATED] + row[INF] + row[NAN]),
        "numerics/nonfinite_elements": float(row[INF] + row[NAN]),
        "numerics/underflow_frac": row[FLUSHED] / max(1, row[ELEMENTS]),
    }

"""The contract of a sink, and what one is opened with. Metrics are one flat dict with ``/`` names and units."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console

from mptrain.telemetry.record import Record

Metrics = dict[str, float]
Event = dict[str, Any]


@dataclass(frozen=True)
class Start:
    """The parts of a run that a sink is opened with.

    ``config``: all settings as plain values; ``since``: the step that the run is resumed from; ``unit``: of
    throughput; ``rank`` of ``ranks``.
    """

    folder: Path
    config: dict[str, Any]
    console: Console
    device: torch.device
    rank: int = 0
    ranks: int = 1
    since: int = 0
    unit: str = "tokens"

    @property
    def first(self) -> bool:
        """Tell whether this rank writes what a run has once."""
        return self.rank == 0


class Sink(Protocol):
    """Receives what a run has to tell. ``tick`` comes every step and carries nothing."""

    def tick(self, step: int) -> None: ...
    def metrics(self, step: int, values: Metrics) -> None: ...
    def event(self, event: Event) -> None: ...
    def record(self, record: Record) -> None: ...
    def summary(self, values: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


class NullSink:
    """Receives and forgets."""

    def tick(self, step: int) -> None:
        pass

    def metrics(self, step: int, values: Metrics) -> None:
        pass

    def event(self, event: Event) -> None:
        pass

    def record(self, record: Record) -> None:
        pass

    def summary(self, values: dict[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass


class Sinks(NullSink):
    """Several sinks as one."""

    def __init__(self, sinks: list[Sink]) -> None:
        self.sinks = sinks

    def tick(self, step: int) -> None:
        for sink in self.sinks:
            sink.tick(step)

    def metrics(self, step: int, values: Metrics) -> None:
        for sink in self.sinks:
            sink.metrics(step, values)

    def event(self, event: Event) -> None:
        for sink in self.sinks:
            sink.event(event)

    def record(self, record: Record) -> None:
        for sink in self.sinks:
            sink.record(record)

    def summary(self, values: dict[str, Any]) -> None:
        for sink in self.sinks:
            sink.summary(values)

    def close(self) -> None:
        for sink in self.sinks:
            sink.close()

"""Protocols of the parts that a trainer is handed; the parts themselves are made in :mod:`mptrain.build`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor

from mptrain.checkpoint.checkpoints import Stateful
from mptrain.telemetry.record import Record


class Data(Protocol):
    """The samples of a step are a function of (seed, step); a rank takes its slice of them."""

    def batch(
        self, step: int, *, micro: int, microbatches: int, batch_size: int, seed: int, rank: int, world_size: int
    ) -> dict[str, Tensor]: ...
    def validation(self, batch_size: int, batches: int) -> Iterator[dict[str, Tensor]]: ...


class Rates(Protocol):
    """The learning rate of the step that follows ``applied`` applied ones."""

    def at(self, applied: int) -> float: ...


class Averaged(Stateful, Protocol):
    """A running average of the weights."""

    def update(self) -> None: ...
    def in_place(self) -> AbstractContextManager[None]: ...


class Audits(Protocol):
    """A context around the forward and backward of one step; ``result`` is None until then."""

    @property
    def result(self) -> Any: ...
    def __enter__(self) -> Any: ...
    def __exit__(self, kind: Any, error: Any, trace: Any) -> None: ...


class Sink(Protocol):
    """Where a run tells what it comes to."""

    def tick(self, step: int) -> None: ...
    def metrics(self, step: int, values: dict[str, float]) -> None: ...
    def event(self, event: dict[str, Any]) -> None: ...
    def record(self, record: Record) -> None: ...


class Compresses(Stateful, Protocol):
    """Gradients made smaller between ranks. ``sampling``: measure this step's error; ``bill``: metrics since then."""

    sampling: bool

    def bill(self) -> dict[str, float]: ...


class Watches(Protocol):
    """Tells others how far this rank has come, so that one that hangs can be named."""

    def at(self, step: int, doing: str) -> None: ...

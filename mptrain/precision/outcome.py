"""The outcome of one optimizer step. On the device until somebody looks; the copy to the host is started at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mptrain.precision.scaling import ScaleEvent


@dataclass(frozen=True)
class Blame:
    """Why a step was skipped, and where the first Inf or NaN was.

    ``kind``: Inf or NaN; ``phase``: forward or backward; ``micro_batch``: from 0. What is not known is empty or -1.
    """

    reason: str
    layer: str = ""
    role: str = ""
    kind: str = ""
    phase: str = ""
    micro_batch: int = -1
    rank: int = 0


@dataclass(frozen=True)
class StepRecord:
    """A resolved step. ``blame`` is None if it was applied; ``grad_norm`` is unscaled.

    ``scale`` is the loss scale it ran with, ``next_scale`` that of the step after it. ``stop``: was any rank asked to
    end the run?
    """

    applied: bool
    grad_norm: float
    scale: float
    event: ScaleEvent
    blame: Blame | None = None
    next_scale: float = 1.0
    stop: bool = False

    @property
    def reason(self) -> str:
        return "" if self.blame is None else self.blame.reason


class StepOutcome:
    """Tensors that a step left on the device, read back once and only when asked.

    ``read()`` gives the :class:`StepRecord`; ``applied``, ``reason`` and the rest are shortcuts to it. On a GPU the
    copy runs beside the next step's kernels, so reading it a step later costs no stall.
    """

    def __init__(self, values: Sequence[Tensor], blame: Callable[[], Blame]) -> None:
        """``values``: found_inf, grad_norm, scale, event and next_scale, all 0-dim; with several ranks a sixth, how
        many were asked to stop. ``blame()``: of a skip; on several ranks a collective, so all read the outcome."""
        self._blame = blame
        self._record: StepRecord | None = None
        self._ready: torch.cuda.Event | None = None
        self._values = values
        if values[0].is_cuda:
            self._values = torch.stack([value.float() for value in values]).to("cpu", non_blocking=True).unbind()
            self._ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._ready.record()

    def read(self) -> StepRecord:
        if self._record is None:
            if self._ready is not None:
                self._ready.synchronize()
            found_inf, grad_norm, scale, event, after, *stop = [value.item() for value in self._values]
            blame = self._blame() if found_inf else None
            self._record = StepRecord(not found_inf, grad_norm, scale, ScaleEvent(int(event)), blame, after, any(stop))
        return self._record

    @property
    def applied(self) -> bool:
        return self.read().applied

    @property
    def reason(self) -> str:
        return self.read().reason

    @property
    def grad_norm(self) -> float:
        return self.read().grad_norm

    @property
    def scale(self) -> float:
        return self.read().scale

    @property
    def event(self) -> ScaleEvent:
        return self.read().event

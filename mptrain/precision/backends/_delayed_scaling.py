"""Scales of delayed scaling: one table for all (layer, role) slots, rotated when a forward begins.

Slot t's scale comes from the amaxes of its last ``history`` micro-batches (their maximum). The amax seen in
micro-batch t is staged and enters the history when the forward of t+1 begins, so that
recomputation in t's backward still sees t's scales; a slot that did not run does not rotate. Amaxes of 0, Inf or NaN
leave the scale as it is. Rule: Transformer Engine, ``common/recipe/delayed_scaling.cu`` and ``DelayedScaling``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mptrain.distributed import Agree
from mptrain.kernels import current_scale
from mptrain.precision.counters import Counters
from mptrain.precision.policy import Quantization


class DelayedScaling:
    """``scale``: FP32 [slots]; ``staged``: the amaxes of this micro-batch; ``history``: [history, slots], newest first.

    ``cold`` (host) marks slots whose history is empty: with ``warm_start`` they use the current amax once.
    """

    def __init__(self, config: Quantization, counters: Counters, device: torch.device, agree: Agree) -> None:
        n = len(counters.slots)
        self._config, self._slots, self._agree, self._books = config, list(counters.slots), agree, counters
        self.scale = torch.ones(n, dtype=torch.float32, device=device)
        self.staged = torch.zeros(n, dtype=torch.float32, device=device)
        self.history = torch.zeros(config.history, n, dtype=torch.float32, device=device)
        self.cold = [config.warm_start] * n
        self.ran = [False] * n
        formats = [config.format_of(role) for _, role in counters.slots]
        self._max = torch.tensor([fmt.value.max for fmt in formats], dtype=torch.float32, device=device)

    def __deepcopy__(self, memo: Any) -> DelayedScaling:
        """Itself: a copy of a layer runs at the scales of the original."""
        return self

    def stage(self, slot: int, amax: Tensor | None = None) -> None:
        """This slot ran, with this amax (None: the kernel raised ``staged[slot]`` itself). The largest counts."""
        self.ran[slot] = True
        if amax is not None:
            torch.maximum(self.staged[slot], amax, out=self.staged[slot])

    def rotate(self) -> None:
        """Enter the staged amaxes into the histories of the slots that ran and renew their scales."""
        self._books.closed = False
        if not any(self.ran):
            return
        ran = torch.tensor(self.ran, device=self.scale.device)
        staged = self._agree(self.staged)
        rolled = self.history.roll(1, dims=0)
        rolled[0] = staged.where(staged.isfinite(), 0.0)  # one Inf in the history would hold the scale for N steps
        self.history = torch.where(ran, rolled, self.history)
        largest = self.history.amax(dim=0)
        fresh = (self._max / largest * 2.0**-self._config.margin).clamp(max=torch.finfo(torch.float32).max)
        self.scale = torch.where(ran & (largest > 0) & staged.isfinite(), fresh, self.scale)
        self.cold = [cold and not did for cold, did in zip(self.cold, self.ran, strict=True)]
        self.ran = [False] * len(self.ran)
        self.staged = torch.zeros_like(self.staged)

    def warm(self, slot: int, amax: Tensor) -> Tensor:
        """First use of an empty history: the scale of the current amax (FP32 0-dim), kept for this micro-batch."""
        fmt = self._config.format_of(self._slots[slot][1])
        self.scale[slot] = current_scale(self._agree(amax), fmt, self._config.margin)
        return self.scale[slot]

    def state_dict(self) -> dict[str, Tensor]:
        """``layer/role/scale`` and ``layer/role/history`` after entering what is staged."""
        self.rotate()
        state = {}
        for index, (layer, role) in enumerate(self._slots):
            if not self.cold[index]:
                state[f"{layer}/{role}/scale"] = self.scale[index].clone()
                state[f"{layer}/{role}/history"] = self.history[:, index].clone()
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue the slots that the state holds (a shorter or longer history is cut or padded); others stay cold."""
        for index, (layer, role) in enumerate(self._slots):
            history = state.get(f"{layer}/{role}/history")
            if history is None:
                continue
            kept = min(len(history), len(self.history))
            self.history[:, index] = 0.0
            self.history[:kept, index] = history[:kept]
            self.scale[index] = state[f"{layer}/{role}/scale"]
            self.cold[index] = False

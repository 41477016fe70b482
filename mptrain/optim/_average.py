"""A running average of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mptrain.distributed import like, local


class Average:
    """Exponential running average of the weights, in FP32; moved once for every *applied* step."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._names = [name for name, p in model.named_parameters() if p.requires_grad]
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self.shadow = [local(p.detach()).float().clone() for p in self._parameters]

    @torch.no_grad()
    def update(self) -> None:
        torch._foreach_lerp_(self.shadow, [local(p.detach()).float() for p in self._parameters], 1.0 - self.decay)

    @contextmanager
    @torch.no_grad()
    def in_place(self) -> Iterator[None]:
        """The model computes with the average."""
        held = [local(p.detach()) for p in self._parameters]
        kept = [p.clone() for p in held]
        for parameter, average in zip(held, self.shadow, strict=True):
            parameter.copy_(average)
        try:
            yield
        finally:
            for parameter, weight in zip(held, kept, strict=True):
                parameter.copy_(weight)

    def state_dict(self) -> dict[str, Tensor]:
        parts = zip(self._names, self.shadow, self._parameters, strict=True)
        return {name: like(average, parameter) for name, average, parameter in parts}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue the average of a run that kept one; a run without starts from the weights it continues."""
        for name, average, parameter in zip(self._names, self.shadow, self._parameters, strict=True):
            average.copy_(local(state.get(name, parameter.detach())))

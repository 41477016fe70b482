"""The debt of compression to the other ranks: its errors so far, added to the gradients of the next step."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch._C._distributed_c10d import GradBucket  # torch.distributed does not export it to checkers


class Residuals:
    """This rank's errors, FP32: one flat tensor a bucket, written in place; saved and found again by parameter.

    DDP rebuilds its buckets after a process's first backward, in the order in which gradients came: a bucket's number
    and size say little about what is in it. Nothing is lost by that, for each parameter takes its errors along.
    """

    def __init__(self, names: Mapping[nn.Parameter, str]) -> None:
        self._names = names
        self._held: dict[int, tuple[tuple[str, ...], list[Tensor], Tensor]] = {}  # bucket -> names, views of it, it
        self._apart: dict[str, Tensor] = {}  # of parameters whose bucket did not come yet

    def of(self, bucket: GradBucket) -> Tensor:
        """The errors that go with ``bucket``, in its order; zeros at first. Write the new ones into it."""
        layout = self._layout(bucket)
        held = self._held.get(bucket.index())
        if held is None or held[0] != layout:
            self._apart = self.state_dict()
            self._held.clear()
            flat = torch.zeros_like(bucket.buffer(), dtype=torch.float32)
            views = list(torch.split(flat, [gradient.numel() for gradient in bucket.gradients()]))
            for name, view in zip(layout, views, strict=True):
                before = self._apart.pop(name, None)
                if before is not None and before.numel() == view.numel():
                    view.copy_(before)
            held = self._held[bucket.index()] = layout, views, flat
        return held[2]

    def layout(self, bucket: GradBucket) -> str:
        """A short name of what is in the bucket, in which order."""
        return hashlib.sha256("\n".join(self._layout(bucket)).encode()).hexdigest()[:16]

    def _layout(self, bucket: GradBucket) -> tuple[str, ...]:
        return tuple(self._names[cast(nn.Parameter, parameter)] for parameter in bucket.parameters())

    def state_dict(self) -> dict[str, Tensor]:
        """Name of the parameter -> its errors, flat. Of this rank: the others hold others."""
        held = {name: view for names, views, _ in self._held.values() for name, view in zip(names, views, strict=True)}
        return self._apart | held

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._held.clear()
        self._apart = dict(state)


def used_here(*tensors: Tensor) -> None:
    """Tensors of another CUDA stream are used on this one: their memory must not be given away before that is done."""
    for tensor in tensors:
        if tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))

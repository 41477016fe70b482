"""A fire drill: plant an Inf, a NaN or a huge value in one tensor of one step, and see whether the run notices.

    python train.py precision=fp8 debug.inject=30:blocks.1.mlp.up:input:inf

The value goes into the first element of the tensor, in the first micro-batch (of several ranks' one each; with a rank
behind it, of that one alone); a weight gets its own back before the
optimizer sees it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mptrain.distributed import local
from mptrain.tools.settings import did_you_mean

ROLES = ("input", "weight", "output", "grad_output", "grad_weight")
FORM = "debug.inject=STEP:LAYER:ROLE:VALUE, e.g. 30:blocks.1.mlp.up:input:inf"


@dataclass(frozen=True)
class DebugConfig:
    """``inject``: empty, or step:layer:role:value, see :mod:`mptrain.telemetry.drill`."""

    inject: str = ""

    def __post_init__(self) -> None:
        if self.inject:
            Drill.parse(self.inject)


@dataclass(frozen=True)
class Drill:
    """``value`` goes into ``role`` of ``layer`` at ``step`` (from 1); ``rank``: on that one alone."""

    step: int
    layer: str
    role: str
    value: float
    rank: int | None = None

    @classmethod
    def parse(cls, text: str) -> Drill:
        """ValueError if it is not step:layer:role:value or step:layer:role:value:rank."""
        parts = text.split(":")
        if len(parts) not in (4, 5):
            raise ValueError(f"debug.inject={text} has {len(parts)} parts, not 4: {FORM}")
        step, layer, role, value, *rank = parts
        if role not in ROLES:
            raise ValueError(f"debug.inject: no role {role!r}{did_you_mean(role, list(ROLES))}")
        try:
            drill = cls(int(step), layer, role, float(value), int(rank[0]) if rank else None)
        except ValueError:
            raise ValueError(
                f"debug.inject={text}: step (and rank) must be a whole number and value inf, nan or 1e30"
            ) from None
        if drill.step < 1:
            raise ValueError(f"debug.inject={text}: steps count from 1")
        return drill

    def check(self, model: nn.Module) -> None:
        """ValueError if the model has no such layer with a weight."""
        known = [name for name, module in model.named_modules() if isinstance(getattr(module, "weight", None), Tensor)]
        if self.layer not in known:
            raise ValueError(f"debug.inject: no layer {self.layer!r}{did_you_mean(self.layer, known)}")

    @contextmanager
    def planted(self, model: nn.Module) -> Iterator[None]:
        """Hooks for the forward and backward of the step."""
        layer = model.get_submodule(self.layer)
        weight: Tensor = layer.weight  # type: ignore[assignment]
        if self.role == "grad_weight" and local(weight) is not weight:
            raise ValueError("debug.inject: the gradient of a sharded weight is out of reach; use grad_output")
        first = local(weight.detach()).view(-1)[:1]  # none, if this rank's shard is empty
        kept = first.clone()
        if self.role == "weight":
            first.fill_(self.value)
        handle = None if self.role == "weight" else self._hook(layer, weight)
        try:
            yield
        finally:
            if handle is not None:
                handle.remove()
            first.copy_(kept)

    def _hook(self, layer: nn.Module, weight: Tensor) -> Any:
        fresh = [True]

        def spoil(x: Tensor) -> Tensor:
            """``x`` with the value in its first element, the first time."""
            if not fresh:
                return x
            fresh.clear()
            value = math.copysign(torch.finfo(x.dtype).max, self.value) if self._too_large(x) else self.value
            return x.index_put((torch.zeros(1, dtype=torch.long, device=x.device),) * x.ndim, x.new_tensor(value))

        def into_input(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (spoil(args[0]), *args[1:])

        def into_output(_: nn.Module, args: Any, out: Tensor) -> Tensor:
            return spoil(out)

        def into_grad_output(_: nn.Module, args: Any, out: Tensor) -> None:
            if out.requires_grad:
                out.register_hook(spoil)  # type: ignore[no-untyped-call]

        if self.role == "grad_weight":
            return weight.register_hook(spoil)  # type: ignore[no-untyped-call]
        if self.role == "input":
            return layer.register_forward_pre_hook(into_input)
        hook = into_output if self.role == "output" else into_grad_output
        return layer.register_forward_hook(hook, prepend=True)  # before the eyes of those who watch this step

    def _too_large(self, x: Tensor) -> bool:
        """A finite value stays finite in a narrower type."""
        return math.isfinite(self.value) and abs(self.value) > torch.finfo(x.dtype).max

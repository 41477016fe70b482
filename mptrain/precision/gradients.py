"""The gradients that an optimizer steps on: which they are, their norms, and what the loss scale has left in them.

As in torch.amp they belong to the optimizer's parameters, of whatever model these are and whenever they were added. A
gradient is divided by the loss scale once, by whichever optimizer steps on it first; one that stays until the next
backward (``zero_grad`` was for the other optimizer, or was left out) is brought to that backward's scale, so that what
adds up is of one scale.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mptrain.distributed import local


def admit(optimizer: Optimizer) -> None:
    """Check that ``optimizer`` can be stepped here. TypeError: it is none, or one that needs a closure; ValueError: it
    trains parameters in 16 bits."""
    if not hasattr(optimizer, "param_groups"):
        raise TypeError(
            f"step takes optimizers, not {type(optimizer).__name__}: precision.step(optimizer, clip=1.0), "
            "with clip by its name"
        )
    kind: Any = type(optimizer)
    if _needs_closure(kind):
        raise TypeError(
            f"{type(optimizer).__name__} evaluates the model several times in a step, through a closure, and "
            "precision.step has one gradient: use an optimizer that takes one (AdamW, SGD, Muon, ...), or call "
            "this one's own step on a model that is not prepared"
        )
    stored = getattr(optimizer, "weights", "fp32")  # of our own, BF16 weights may be meant
    narrow = [p for p in parameters_of(optimizer) if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)]
    if narrow and stored == "fp32":
        raise ValueError(
            f"a trained parameter of shape {list(narrow[0].shape)} is {narrow[0].dtype} now: parameters are the FP32 "
            "master weights, so call .float() on what was added or converted after prepare"
        )


@functools.cache
def _needs_closure(kind: Any) -> bool:
    closure = inspect.signature(kind.step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def valid_clip(clip: Any) -> float:
    """Return ``clip`` as a float: a gradient norm, 0 for no clipping. ValueError for what is not such a number."""
    try:
        norm = float(clip)
    except (TypeError, ValueError):
        norm = math.nan
    if not norm >= 0:
        raise ValueError(f"clip is {clip!r}: give the largest gradient norm, e.g. clip=1.0, or 0 for no clipping")
    return norm


def parameters_of(optimizer: Any) -> list[nn.Parameter]:
    """List the parameters of the optimizer's groups; of a sharded one, the sharded parameters."""
    shards = getattr(optimizer, "shards", None)
    return list(shards) if shards is not None else [p for group in optimizer.param_groups for p in group["params"]]


def with_gradient(optimizers: Iterable[Any]) -> list[list[nn.Parameter]]:
    """List the :func:`parameters_of` each optimizer that have a gradient now."""
    each = []
    for optimizer in optimizers:
        shards = getattr(optimizer, "shards", None)
        groups = [group["params"] for group in optimizer.param_groups] if shards is None else [shards]
        each.append([p for parameters in groups for p in parameters if p.grad is not None])
    return each


def held(parameters: Sequence[nn.Parameter], *, sharded: bool) -> list[Tensor]:
    """List what this rank holds of each gradient."""
    if sharded:
        return [local(p.grad) for p in parameters if p.grad is not None]
    return [p.grad for p in parameters if p.grad is not None]


def measured(parameters: Sequence[nn.Parameter], *, sharded: bool) -> tuple[list[Tensor], Tensor]:
    """Return what this rank holds of each gradient, to be read, and its 2-norm: FP32 [parameters]."""
    gradients = held(parameters, sharded=True) if sharded else [p.grad for p in parameters if p.grad is not None]
    try:
        return gradients, torch.stack(torch._foreach_norm(gradients, dtype=torch.float32))
    except (NotImplementedError, RuntimeError):  # one is sparse, complex or FP64
        for parameter in parameters:
            if parameter.grad is not None and parameter.grad.is_sparse:
                parameter.grad = parameter.grad.coalesce()  # the norm is that of the sums, row by row
        gradients = [_real(gradient) for gradient in held(parameters, sharded=sharded)]
        return gradients, torch.stack([torch.linalg.vector_norm(g).float() for g in gradients])


def excess(norm: Tensor, clip: float) -> Tensor | None:
    """Return ``norm`` over ``clip``: FP32 0-dim, 1 if it does not; on a CPU, which reads for nothing, None."""
    factor = norm / clip
    if norm.is_cpu:
        return factor if factor.item() > 1 else None
    return factor.clamp_(min=1.0)


def divide(gradients: list[Tensor], divisor: Tensor) -> None:
    """Divide each in place."""
    if not gradients:
        return
    try:
        torch._foreach_div_(gradients, divisor)
    except (NotImplementedError, RuntimeError):  # one is sparse
        for gradient in gradients:
            _values(gradient).div_(divisor)


def _values(gradient: Tensor) -> Tensor:
    """The stored elements themselves, not a copy."""
    return gradient._values() if gradient.is_sparse else gradient


def _real(gradient: Tensor) -> Tensor:
    values = _values(gradient)
    return torch.view_as_real(values) if values.is_complex() else values


class Carried:
    """Know by how much each gradient is still too large: the loss scale of the last backward, 1 once it was divided."""

    def __init__(self) -> None:
        self.scale: Tensor | None = None  # of the backward that made the gradients
        # What is left to divide each by (None: nothing). By steps, not in one dict: hashing a parameter takes 0.2 us.
        self._noted: list[tuple[Sequence[nn.Parameter], Tensor | None]] = []

    def knows(self, parameters: Iterable[nn.Parameter]) -> bool:
        """Tell whether one of them was divided since the last backward."""
        if not self._noted:
            return False
        divided = self._divided()
        return any(p in divided for p in parameters)

    def _divided(self) -> dict[nn.Parameter, Tensor | None]:
        return {p: left for parameters, left in self._noted for p in parameters}

    def unscale(self, parameters: Sequence[nn.Parameter], *, sharded: bool) -> None:
        """Divide each by what is left, now and here: some were divided, others not."""
        assert self.scale is not None
        divided = self._divided()
        fresh = [p for p in parameters if p not in divided]
        divide(held(fresh, sharded=sharded), self.scale)
        for parameter in parameters:
            left = divided.get(parameter)
            if left is not None:
                divide(held([parameter], sharded=sharded), left)
        self._noted.append((parameters, None))

    def note(self, parameters: Sequence[nn.Parameter], found_inf: Tensor, skips: bool | None) -> None:
        """Note that an optimizer divided and stepped on them, or ``skips`` (None: the device alone knows)."""
        if skips:
            return
        left = None
        if skips is None and self.scale is not None:
            left = torch.where(found_inf, self.scale, 1.0)
        self._noted.append((parameters, left))

    def begin(self, scale: Tensor, parameters: Callable[[], Iterable[nn.Parameter]], *, sharded: bool) -> None:
        """Prepare a backward with this ``scale``: bring what is left of earlier ones to it."""
        changed = self.scale is not None and self.scale is not scale
        stayed = [p for stepped, _ in self._noted for p in stepped if p.grad is not None]
        if changed or stayed:
            divided = self._divided()
            for parameter in dict.fromkeys([*parameters(), *divided]) if changed else divided:
                if parameter.grad is None:
                    continue
                carries = divided.get(parameter, self.scale)
                divide(held([parameter], sharded=sharded), (1.0 if carries is None else carries) / scale)
        self.scale = scale
        self._noted.clear()

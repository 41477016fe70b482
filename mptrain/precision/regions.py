"""Where a prepared model is being run: in its own forward, evaluation or backward, or nowhere.

A region is open while its ``with`` block runs. Regions nest, those of several models too: a student's forward may hold
a teacher's. What a model's layers do goes by the innermost region of their own :class:`~mptrain.Precision`, outside all
of them a prepared model runs in FP32; what is entered is left again, whatever was there before.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, ContextDecorator
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C import _get_obj_in_tls, _is_key_in_tls
from torch.utils._pytree import tree_map

from mptrain.precision.counters import Counters
from mptrain.precision.suspension import KEY, Suspended

Casts = AbstractContextManager[object]
MAY_JOIN = dist.is_available()
_MARK = "_mptrain_fence"  # where a prepared model has its fence
_FENCES: WeakSet[Fence] = WeakSet()
_OPEN: list[Counters] = []  # of the regions that are open, the innermost last; their counters tell precisions apart


class Plain:
    """Casts of no kind: an autocast around it, the user's own or another model's, does not reach inside."""

    def __init__(self, device_type: str) -> None:
        self.device_type = device_type
        self._entered: list[torch.autocast | None] = []

    def __enter__(self) -> None:
        casts = None
        if torch.is_autocast_enabled(self.device_type):
            casts = torch.autocast(self.device_type, enabled=False)
            casts.__enter__()  # type: ignore[no-untyped-call]
        self._entered.append(casts)

    def __exit__(self, *raised: Any) -> None:
        casts = self._entered.pop()
        if casts is not None:
            casts.__exit__(*raised)


class Region(ContextDecorator):
    """A stretch of one model's forward or backward, with its casts. FP16 and TF32 emulated around it end at its edge.

    ``quantized``: do converted layers quantize here, or run as plain FP32 layers? ``replaying``: is a forward met here
    the recomputation of an earlier one, booked already? ``opening`` is called when the region is the outermost of its
    model and not part of an evaluation.
    """

    def __init__(
        self,
        counters: Counters,
        casts: Casts,
        *,
        quantized: bool,
        replaying: bool = False,
        opening: Callable[[], None] | None = None,
    ) -> None:
        self._counters, self._casts, self._opening = counters, casts, opening
        self._plain_on = casts.device_type if isinstance(casts, Plain) else None
        self._state = not quantized, replaying
        self._before: list[tuple[bool, bool, bool, bool]] = []
        self._suspended = Suspended()

    def __enter__(self) -> None:
        counters = self._counters
        if self._opening is not None and not counters.quiet and not is_open(counters):
            self._opening()
        rounding = _is_key_in_tls(KEY) and _get_obj_in_tls(KEY) is not None  # current(), without the call
        if rounding:
            self._suspended.__enter__()
        casting = self._plain_on is None or torch.is_autocast_enabled(self._plain_on)  # else there is nothing to do
        if casting:
            self._casts.__enter__()
        self._before.append((counters.bypassed, counters.replaying, casting, rounding))
        counters.bypassed, counters.replaying = self._state
        _OPEN.append(counters)

    def __exit__(self, *raised: Any) -> None:
        counters = self._counters
        counters.bypassed, counters.replaying, casting, rounding = self._before.pop()
        if _OPEN[-1] is counters:
            del _OPEN[-1]
        else:  # another thread has opened one since
            last = max(place for place, one in enumerate(_OPEN) if one is counters)
            del _OPEN[last]
        if casting:
            self._casts.__exit__(*raised)
        if rounding:
            self._suspended.__exit__(*raised)


def is_open(counters: Counters) -> bool:
    """Tell whether a region of these counters is open."""
    return any(one is counters for one in _OPEN)


class Fence:
    """Keep a prepared model to its own precision when it is called inside a region of another one.

    ``casts(policy_on)`` gives the casts of its backend; ``on_call`` is told of each call in a process group. Hooks on
    the model cost a step some 15 us, so they wait until there is a second fence in the process. A copy of the model
    shares its fence, and runs as the original does; one that was pickled has none that acts.
    """

    def __init__(
        self,
        counters: Counters | None = None,
        casts: Callable[[bool], Casts] | None = None,
        on_call: Callable[[nn.Module], None] | None = None,
    ) -> None:
        self._counters, self._casts, self.on_call = counters, casts, on_call
        self._models: WeakSet[nn.Module] = WeakSet()
        self._original: Callable[[], nn.Module | None] = lambda: None
        self._entered: list[Region | None] = []

    @property
    def acts(self) -> bool:
        return self._counters is not None

    def around(self, model: nn.Module) -> None:
        """Stand around the calls of ``model``, and of the copies that will be made of it."""
        model.__dict__[_MARK] = self
        self._original = weakref.ref(model)
        self._models.add(model)
        _FENCES.add(self)
        if self.on_call is not None:
            self._hook()
        if len(_FENCES) > 1:
            for fence in _FENCES:
                fence._hook()

    def leave(self, copy: nn.Module) -> bool:
        """Let a copy go, for another precision to prepare it. False for the model itself, which stays."""
        if self._original() is copy:
            return False
        for hooks in (copy._forward_pre_hooks, copy._forward_hooks):
            for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is self]:
                del hooks[key]
        del copy.__dict__[_MARK]
        self._models.discard(copy)
        return True

    def _hook(self) -> None:
        for model in self._models:
            if not any(getattr(hook, "__self__", None) is self for hook in model._forward_pre_hooks.values()):
                model.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True)
                model.register_forward_hook(self._leave, always_call=True)

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return None
        if self.on_call is not None and MAY_JOIN and dist.is_initialized():
            self.on_call(module)
        if self._counters is None or not _OPEN or _OPEN[-1] is self._counters:
            self._entered.append(None)
            return None
        assert self._casts is not None
        counters = self._counters
        quantized = is_open(counters) and not counters.bypassed
        region = Region(counters, self._casts(quantized), quantized=quantized, replaying=counters.replaying)
        region.__enter__()
        self._entered.append(region)
        return tree_map(_widened, (args, kwargs))

    def _leave(self, *_: Any) -> None:
        if self._entered:
            region = self._entered.pop()
            if region is not None:
                region.__exit__(None, None, None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Fence:
        self._models.update([memo[id(model)] for model in self._models if id(model) in memo])  # its copy is under way
        return self

    def __reduce__(self) -> tuple[type[Fence], tuple[()]]:
        return Fence, ()


def fence_of(module: nn.Module) -> Fence | None:
    """Find the fence of a prepared model, or of a copy of one; None for any other module."""
    fence = module.__dict__.get(_MARK)
    return fence if isinstance(fence, Fence) and fence.acts else None


def _widened(value: Any) -> Any:
    """Widen what another model computed in 16 bits to FP32: exact, and what a plain layer takes."""
    if isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16):
        return value.float()
    return value

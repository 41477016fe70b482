"""The rounding of this thread: one dispatch mode with the format of the innermost context, or none."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from mptrain.formats import Format
from mptrain.precision.backends.emulated import halves, products, tf32


class Mode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Computes every operator as units of ``fmt`` (fp16 or tf32) do; None while outer contexts are suspended."""

    def __init__(self, fmt: Format) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fmt: Format | None = fmt

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if types and _foreign(types):
            return NotImplemented  # what a subclass (DTensor) runs in its turn is seen again
        fmt = self.fmt
        if fmt is not None and _holds_others(func):
            with self:
                return _opened(func, args, kwargs or {})
        if fmt is Format.fp16:
            return halves.run(func, args, kwargs or {})
        if fmt is Format.tf32:
            return tf32.run(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


_HOLDS_OTHERS: dict[Any, bool] = {}


def _holds_others(func: Any) -> bool:
    """Tell whether it is a composite, whose parts are to be seen.

    In inference mode those of autograd arrive here whole.
    """
    known = _HOLDS_OTHERS.get(func)
    if known is None:
        if func.namespace == "prim":  # they ask a fake tensor for its device, and compute nothing
            return False
        implicit = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
        known = implicit or (func.namespace == "aten" and func.overloadpacket.__name__ in products.COMPOSED)
        _HOLDS_OTHERS[func] = known
    return known


def _opened(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``func`` by its own kernel, the mode staying on for what that calls."""
    if any(isinstance(x, Tensor) and x.is_nested and type(x) is Tensor for x in args):
        raise NotImplementedError(
            f"{func}: FP16 and TF32 are not emulated for nested tensors of strided layout; make them with "
            "layout=torch.jagged, or train with precision=bf16"
        )
    out = func.decompose(*args, **kwargs)
    if out is NotImplemented:
        device = next(x.device for x in args if isinstance(x, Tensor))
        key = torch._C._parse_dispatch_key(torch._C._dispatch_key_for_device(device.type))
        assert key is not None
        out = func.redispatch(torch._C.DispatchKeySet(key), *args, **kwargs)
    return out


def _foreign(types: Any) -> bool:
    """Tell whether a tensor subclass is among them. A plan's fake tensors stand for plain ones."""
    fake = getattr(sys.modules.get("torch._subclasses.fake_tensor"), "FakeTensor", Tensor)
    return any(kind is not Tensor and kind is not fake and kind is not Parameter for kind in types)

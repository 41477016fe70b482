"""FP16 without FP16 units: products of Half tensors in FP32, rounded to FP16 at the end.

Operands are exact in FP32 and so are their products; the sum is FP32, as a tensor core's is, and the result is rounded
once, 65520 and more becoming Inf. Other operators are torch's own for Half, which compute in FP32 and round; what torch
has no CPU kernel for is widened here alike.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mptrain.precision.backends.emulated.products import INSIDE, is_attention, operands_of

_PLAIN, _PRODUCT, _ATTENTION, _WHOLE = range(4)
_KINDS: dict[Any, int] = {}


def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``func`` as FP16 units compute it."""
    kind = _KINDS.get(func)
    if kind is None:
        kind = _KINDS[func] = _kind_of(func)
    if kind == _PLAIN:
        try:
            return func(*args, **kwargs)
        except RuntimeError as error:  # '"some_kernel" not implemented for 'Half''
            if "Half" not in str(error) or not _all_half(args, kwargs):
                raise
        return _widened(func, args, kwargs)
    if kind == _PRODUCT:
        return _product(func, args, kwargs)
    if kind == _WHOLE:
        return _widened(func, args, kwargs) if _all_half(args, kwargs) else func(*args, **kwargs)
    if args[0].dtype is not torch.float16:
        return func(*args, **kwargs)
    out = func(*map(_wide, args), **{name: _wide(x) for name, x in kwargs.items()})
    if func.overloadpacket.__name__.endswith("_backward"):
        return tuple(map(_narrow, out))
    return _narrow(out[0]), *out[1:]  # the others are statistics, in FP32


def _product(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    wide = []
    halves = 0
    for x in args:
        if isinstance(x, Tensor):
            if x.dtype is torch.float16:
                halves += 1
                x = x.float()
            elif x.is_floating_point():
                return func(*args, **kwargs)  # FP32, or of two types, which torch refuses
        wide.append(x)
    out = func(*wide, **kwargs)
    if not halves:
        return out
    return out.half() if isinstance(out, Tensor) else tuple(map(_narrow, out))


def _kind_of(func: Any) -> int:
    if func.overloadpacket.__name__ in INSIDE:
        return _WHOLE
    if not operands_of(func):
        return _PLAIN
    if func._schema.is_mutable:
        return _WHOLE
    return _ATTENTION if is_attention(func) else _PRODUCT


def _wide(x: Any) -> Any:
    return x.float() if isinstance(x, Tensor) and x.dtype is torch.float16 else x


def _narrow(x: Any) -> Any:
    return x.half() if isinstance(x, Tensor) and x.dtype is torch.float32 else x


def _floats(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values] if values.is_floating_point() else []
    if isinstance(values, dict):
        values = values.values()
    elif not isinstance(values, list | tuple):
        return []
    return [x for value in values for x in _floats(value)]


def _all_half(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    floats = _floats((args, kwargs))
    return bool(floats) and all(x.dtype is torch.float16 for x in floats)


def _widened(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Any operator, in-place ones and ``out=`` too: what it writes to is rounded and written back."""
    wide: dict[int, Tensor] = {}  # id of a Half tensor -> its FP32 form: one that is written to twice stays one

    def widen(value: Any) -> Any:
        if isinstance(value, Tensor):
            return wide.setdefault(id(value), value.float()) if value.dtype is torch.float16 else value
        return [widen(x) for x in value] if isinstance(value, list | tuple) else value

    out = func(*map(widen, args), **{name: widen(value) for name, value in kwargs.items()})
    schema = func._schema.arguments
    given = dict(zip((a.name for a in schema), args, strict=False)) | kwargs
    written: dict[int, Tensor] = {}
    for argument in schema:
        if argument.alias_info is not None and argument.alias_info.is_write:
            for x in _floats(given.get(argument.name)):
                if id(x) in wide:
                    x.resize_(wide[id(x)].shape).copy_(wide[id(x)])
                    written[id(wide[id(x)])] = x
    many = isinstance(out, list | tuple)
    outputs = [written.get(id(x), _narrow(x)) for x in (out if many else [out])]
    return type(out)(outputs) if many else outputs[0]

"""FP16 and TF32 where there is no unit for them, at the dispatcher: below autograd and below every composite.

FP16: torch's autocast (with CUDA's lists, :mod:`mptrain.emulation.autocast`) makes real float16 tensors; here the
products of float16 operands are computed in FP32 and rounded once, >= 65520 becoming Inf, in forward and in backward.
TF32: tensors stay FP32; the operands of each product, grad_output included, are rounded to 10 mantissa bits. What a
TF32 unit does not round is not rounded: addends, biases, masks. FP64 and complex products run as they are (cuBLAS may
use TF32 in complex ones).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from mptrain import kernels
from mptrain.emulation.autocast import unfused
from mptrain.formats import Format
from mptrain.regions import Plain, roundings

# Product (aten) -> the positions of its operands. Composites come apart into these before the dispatcher.
PRODUCTS: dict[str, tuple[int, ...]] = {
    "mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "_addmm_activation": (1, 2), "baddbmm": (1, 2), "addbmm": (1, 2),
    "mv": (0, 1), "addmv": (1, 2), "addr": (1, 2), "dot": (0, 1), "vdot": (0, 1), "linear": (0, 1),
    "linear_backward": (0, 1, 2), "linalg_vecdot": (0, 1), "convolution": (0, 1), "_convolution": (0, 1),
    "convolution_backward": (0, 1, 2), "convolution_overrideable": (0, 1), "_slow_conv2d_forward": (0, 1),
    "slow_conv3d_forward": (0, 1), "conv_tbc": (0, 1), "conv_tbc_backward": (0, 1, 2),
    "_trilinear": (0, 1, 2), "_scaled_dot_product_flash_attention_for_cpu": (0, 1, 2),
    "_scaled_dot_product_flash_attention_for_cpu_backward": (0, 1, 2, 3),
    "_grouped_mm": (0, 1), "mkldnn_rnn_layer": (0, 1, 2), "_native_multi_head_attention": (0, 1, 2),
    "_transformer_encoder_layer_fwd": (0,),
}  # fmt: skip
ONE_ROUNDED = ("_scaled_dot_product_flash_attention_for_cpu",)  # its second result is a logsumexp, FP32 on a GPU too
_RECURRENT = {torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu}


def casts(fmt: Format, device_type: str) -> AbstractContextManager[object]:
    """Fresh casts of a forward in ``fmt`` (fp16 or tf32)."""
    return _Casts(fmt, device_type, autocast=fmt is Format.fp16)


def backward_casts(fmt: Format, device_type: str) -> AbstractContextManager[object]:
    """Fresh casts around autograd's backward: products are rounded as in the forward, nothing else is cast."""
    return _Casts(fmt, device_type, autocast=False)


class _Casts:
    """Rounding to ``fmt``, with torch's ``autocast`` to FP16 or without any. Nests with any other casts."""

    def __init__(self, fmt: Format, device_type: str, *, autocast: bool) -> None:
        self._fmt, self._device_type, self._autocast = fmt, device_type, autocast
        self._entered: list[ExitStack] = []

    def __enter__(self) -> None:
        with ExitStack() as stack:
            formats = roundings()
            outer = self._fmt in formats  # the mode is there already, and acts by the innermost format
            formats.append(self._fmt)
            stack.callback(formats.pop)
            if self._autocast:
                stack.enter_context(torch.autocast(self._device_type, dtype=torch.float16))
            else:
                stack.enter_context(Plain(self._device_type))
            if not outer:
                if self._fmt is Format.tf32:
                    stack.enter_context(_Stepwise())
                stack.enter_context(_Rounded(self._fmt))
                stack.enter_context(kernels.onlooker())  # our own kernels multiply nothing
            fast_path = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)  # autocast on CUDA turns it off as well
            stack.callback(torch.backends.mha.set_fastpath_enabled, fast_path)
            self._entered.append(stack.pop_all())

    def __exit__(self, *raised: Any) -> None:
        self._entered.pop().close()


class _Stepwise(TorchFunctionMode):
    """Recurrent layers come apart into their products."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _RECURRENT:
            with unfused():
                return func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class _Rounded(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Rounds products to ``fmt`` where that is the innermost format of the thread."""

    def __init__(self, fmt: Format) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._fmt = fmt
        self._formats = roundings()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented  # a DTensor's products come back as those of its local tensors
        if self._formats[-1] is not self._fmt:
            return func(*args, **kwargs)
        positions = PRODUCTS.get(func.overloadpacket.__name__) if func.namespace == "aten" else None
        if self._fmt is Format.tf32:
            return func(*(_rounded_operands(args, positions) if positions else args), **kwargs)
        if positions is not None and _has_half(args):
            return _in_fp32(func, args, kwargs)
        try:
            return func(*args, **kwargs)
        except (RuntimeError, NotImplementedError) as error:
            if "not implemented for 'Half'" not in str(error):
                raise
            return _in_fp32(func, args, kwargs)


def _has_half(args: tuple[Any, ...]) -> bool:
    return any(isinstance(arg, Tensor) and arg.dtype is torch.float16 for arg in args)


def _in_fp32(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``func`` on the same values in FP32, its results rounded to FP16."""
    target = kwargs.get("out")
    args, kwargs = tree_map(_wide, (args, kwargs))
    result = func(*args, **kwargs)
    if isinstance(target, Tensor):
        return target.resize_(result.shape).copy_(result)
    if func.overloadpacket.__name__ in ONE_ROUNDED:
        return (_narrow(result[0]), *result[1:])
    return tree_map(_narrow, result)


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype is torch.float16 else value


def _narrow(value: Any) -> Any:
    return value.to(torch.float16) if isinstance(value, Tensor) and value.dtype is torch.float32 else value


def _rounded_operands(args: tuple[Any, ...], positions: tuple[int, ...]) -> tuple[Any, ...]:
    given = list(args)
    for place in positions:
        if isinstance(given[place], Tensor) and given[place].dtype is torch.float32:
            given[place] = _to_tf32(given[place])
    return tuple(given)


def _to_tf32(x: Tensor) -> Tensor:
    one = torch.ones((), dtype=torch.float32, device=x.device)
    return kernels.fake_quantize(x, one, Format.tf32)

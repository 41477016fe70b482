"""TF32: the FP32 operands of matrix products and convolutions with 10 mantissa bits, everything else FP32.

As a TF32 unit: grad_output is an operand too, addends, biases and masks are not, sums are FP32. Products with a vector
(mv, dot) stay FP32, as cuBLAS leaves them; so do float64, and complex64, of which a GPU would round both parts. Of
fused attention query, key, value and grad_output are rounded, not what is between its two products.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mptrain import kernels
from mptrain.formats import Format
from mptrain.precision.backends.emulated.products import VECTORS, operands_of

_OPERANDS: dict[Any, tuple[int, ...]] = {}
_ONES: dict[torch.device, Tensor] = {}


def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``func`` as a TF32 unit computes it."""
    operands = _OPERANDS.get(func)
    if operands is None:
        operands = () if func.overloadpacket.__name__ in VECTORS else operands_of(func)
        _OPERANDS[func] = operands
    if not operands:
        return func(*args, **kwargs)
    if func is torch.ops.aten.convolution_backward.default:
        return _convolution_backward(func, args, kwargs)
    if func is torch.ops.aten.conv_tbc_backward.default:
        grad_input, grad_weight, _ = func(*_rounded(args, operands), **kwargs)
        return grad_input, grad_weight, args[0].sum((0, 1))
    return func(*_rounded(args, operands), **kwargs)


def _convolution_backward(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The bias's gradient is a sum, no product: of grad_output as it is."""
    mask = list(args[-1])
    grad_bias = None
    if mask[2] and args[0].dtype is torch.float32:
        mask[2] = False
        grad_bias = args[0].sum([d for d in range(args[0].ndim) if d != 1])
    gradients = func(*_rounded(args[:-1], (0, 1, 2)), mask, **kwargs)
    return gradients if grad_bias is None else (*gradients[:2], grad_bias)


def _rounded(args: tuple[Any, ...], operands: tuple[int, ...]) -> list[Any]:
    changed = list(args)
    for place in operands:
        x: Tensor = args[place]
        if x.dtype is torch.float32 and x.layout is torch.strided:
            turned = x.ndim == 2 and not x.is_contiguous() and x.t().is_contiguous()  # a transpose stays one
            rounded = kernels.fake_quantize(x.t() if turned else x, _one(x), Format.tf32)
            changed[place] = rounded.t() if turned else rounded
    return changed


def _one(x: Tensor) -> Tensor:
    """The scale that changes nothing; made once for each device, and again where a plan makes fake tensors."""
    one = _ONES.get(x.device)
    if one is None or torch._C._len_torch_dispatch_stack():
        one = torch.ones((), dtype=torch.float32, device=x.device)
        if type(one) is Tensor:
            _ONES[x.device] = one
    return one

"""FP16 and TF32 where there is no unit for them: a torch-function mode around the forward.

FP16: tensors between operations are real float16, as under CUDA autocast; GEMMs, convolutions and attention run in
FP32 on the rounded operands and their results (and all gradients) are rounded back, >= 65520 becoming Inf.
TF32: tensors stay FP32; the operands of GEMMs and convolutions, grad_output included, are rounded to 10 mantissa bits.
Operations that autocast runs in FP32 (norms, softmax, losses) run in FP32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mptrain import kernels
from mptrain.formats import Format

GEMMS = {
    torch.matmul, torch.mm, torch.bmm, torch.mv, torch.addmm, torch.baddbmm, torch.einsum, torch.conv1d, torch.conv2d,
    torch.conv3d, F.scaled_dot_product_attention, F.bilinear, Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__,
    Tensor.__rmatmul__, Tensor.addmm, Tensor.baddbmm, Tensor.mv, F.conv1d, F.conv2d, F.conv3d,
}  # fmt: skip
# torch.amp's FP32 list, as far as a forward meets it
WIDE = {
    F.layer_norm, F.rms_norm, F.group_norm, F.softmax, F.log_softmax, F.cross_entropy, F.nll_loss, F.mse_loss,
    F.l1_loss, F.smooth_l1_loss, F.binary_cross_entropy_with_logits, F.kl_div, F.softplus, F.normalize,
    torch.layer_norm, torch.rms_norm, torch.group_norm, torch.softmax, torch.log_softmax, torch.exp, torch.log,
    torch.pow, torch.rsqrt, torch.cumsum, torch.sum, torch.prod, torch.norm, torch.logsumexp, Tensor.softmax,
    Tensor.log_softmax, Tensor.exp, Tensor.log, Tensor.pow, Tensor.__pow__, Tensor.rsqrt, Tensor.cumsum, Tensor.sum,
    Tensor.prod, Tensor.norm, Tensor.logsumexp,
}  # fmt: skip


class _RoundedLinear(torch.autograd.Function):
    """A linear layer on rounded operands: FP16 operands are kept for backward in 16 bits, TF32 ones in FP32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, fmt: Format) -> Tensor:
        rows = _rounded(x.reshape(-1, x.shape[-1]), fmt)
        weights = _rounded(weight, fmt)
        out = torch.mm(rows.float(), weights.float().t())
        if bias is not None:
            out += _rounded(bias, fmt) if fmt is Format.fp16 else bias
        ctx.save_for_backward(rows, weights)
        ctx.fmt, ctx.has_bias, ctx.input_dtype = fmt, bias is not None, x.dtype
        return _narrow(out, fmt).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        rows, weights = ctx.saved_tensors
        fmt = ctx.fmt
        grad_rows = grad_outputs[0].reshape(-1, weights.shape[0])
        operand = _rounded(grad_rows, fmt).float()
        grad_x = grad_w = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_x = _narrow(torch.mm(operand, weights.float()), fmt).to(ctx.input_dtype)
            grad_x = grad_x.view(*grad_outputs[0].shape[:-1], weights.shape[1])
        if ctx.needs_input_grad[1]:
            grad_w = _narrow(torch.mm(operand.t(), rows.float()), fmt).float()
        if ctx.has_bias and ctx.needs_input_grad[2]:
            grad_b = _narrow(grad_rows.sum(0, dtype=torch.float32), fmt).float()
        return grad_x, grad_w, grad_b, None


class _RoundOperand(torch.autograd.Function):
    """Rounds on the way forward, passes the gradient through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, fmt: Format) -> Tensor:
        return kernels.fake_quantize(x, torch.ones((), device=x.device), fmt)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0], None


class _RoundGradient(torch.autograd.Function):
    """Passes forward, rounds the gradient: the grad_output operand of the backward GEMMs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, fmt: Format) -> Tensor:
        ctx.fmt = fmt
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        grad = grad_outputs[0]
        return kernels.fake_quantize(grad, torch.ones((), device=grad.device), ctx.fmt), None


def _rounded(x: Tensor, fmt: Format) -> Tensor:
    if fmt is Format.fp16:
        return x.to(torch.float16)
    return kernels.fake_quantize(x, torch.ones((), device=x.device), fmt)


def _narrow(x: Tensor, fmt: Format) -> Tensor:
    return x.to(torch.float16) if fmt is Format.fp16 else x


class RoundedOperands(TorchFunctionMode):
    """Runs what it surrounds with GEMM operands in ``fmt`` (fp16 or tf32)."""

    def __init__(self, fmt: Format) -> None:
        super().__init__()
        self._fmt = fmt

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            return self._linear(*args, **kwargs)
        if func in GEMMS:
            return self._gemm(func, args, kwargs)
        if func in WIDE and self._fmt is Format.fp16:
            return func(*_each_half(args, torch.Tensor.float), **_each_half(kwargs, torch.Tensor.float))
        return func(*args, **kwargs)

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        out: Tensor = _RoundedLinear.apply(input, weight, bias, self._fmt)  # type: ignore[no-untyped-call]
        return out

    def _gemm(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._fmt is Format.fp16:
            args, kwargs = _each(args, _through_half), _each(kwargs, _through_half)
            return func(*args, **kwargs).to(torch.float16)
        args, kwargs = _each(args, self._round), _each(kwargs, self._round)
        return _RoundGradient.apply(func(*args, **kwargs), self._fmt)  # type: ignore[no-untyped-call]

    def _round(self, x: Tensor) -> Tensor:
        rounded: Tensor = _RoundOperand.apply(x, self._fmt)  # type: ignore[no-untyped-call]
        return rounded


def _through_half(x: Tensor) -> Tensor:
    """FP16-rounded values carried in FP32; autograd rounds the gradient to FP16 on the way back."""
    return x.to(torch.float16).float()


def _each(values: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """``change`` applied to every floating tensor in (nested) arguments."""
    if isinstance(values, Tensor):
        return change(values) if values.is_floating_point() else values
    if isinstance(values, dict):
        return {key: _each(value, change) for key, value in values.items()}
    if isinstance(values, tuple | list):
        return type(values)(_each(value, change) for value in values)
    return values


def _each_half(values: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return _each(values, lambda x: change(x) if x.dtype == torch.float16 else x)

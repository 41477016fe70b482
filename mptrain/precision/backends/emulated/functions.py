"""Common ground of the emulation's autograd functions: how they take, give and differentiate a batch of rows."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mptrain import kernels

_unsafe_view = torch.ops.aten._unsafe_view.default


def rows_of(x: Tensor) -> Tensor:
    """``x`` [..., K] as [M, K]; K may be 0."""
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def shaped(out: Tensor, like: Tensor) -> Tensor:
    """``out`` [M, N] with the leading dimensions of ``like``. No view, or nobody could change it in place."""
    return out if like.dim() == 2 else _unsafe_view(out, (*like.shape[:-1], out.shape[1]))


def bias_gradient(rows: Tensor) -> Tensor:
    """The sum over rows of grad_output [M, N] before its cast, FP32 [N], as Transformer Engine."""
    return rows.float().sum(0) if torch.is_grad_enabled() else kernels.column_sums(rows)


def without_autocast(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Run a backward as outside of any autocast: ``torch.autograd.grad`` may be called inside a forward."""

    @functools.wraps(backward)
    def guarded(ctx: Any, *grad_outputs: Tensor) -> Any:
        device = grad_outputs[0].device.type
        if not torch.is_autocast_enabled(device):
            return backward(ctx, *grad_outputs)
        with torch.autocast(device, enabled=False):
            return backward(ctx, *grad_outputs)

    return guarded

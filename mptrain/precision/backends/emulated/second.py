"""Second derivatives through a product of FP8 operands (``create_graph=True``): right, or refused.

The gradient of the input, ``grad_output x weight``, is differentiable in both: each operand is its cast value, and its
derivative that of no cast (straight through), as in the forward. The products of the second derivative run in FP32.
The gradient of the weight is made of the input, of which only the FP8 codes were kept: its derivative is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Refused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad_weight: Tensor, *sources: Tensor) -> Tensor:
        return grad_weight.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        raise RuntimeError(
            "the gradient of a weight that was multiplied in FP8 is differentiated, which would need its input as it "
            "was before the cast: use precision=bf16, or keep such layers out of FP8 with precision.keep=REGEX "
            "(penalties on the gradient of the input work)"
        )


def grad_input(grad_output: Tensor, weight: Tensor, g_cast: Tensor, w_cast: Tensor) -> Tensor:
    """``grad_output`` [M, N] x ``weight`` [N, K] from their cast values, FP32 [M, K], differentiable in both."""
    return _straight(grad_output, g_cast) @ _straight(weight, w_cast)


def refused(grad_weight: Tensor, grad_output: Tensor, weight: Tensor) -> Tensor:
    """``grad_weight``; RuntimeError, naming what works, when it is differentiated."""
    out: Tensor = _Refused.apply(grad_weight, grad_output, weight)  # type: ignore[no-untyped-call]
    return out


def _straight(x: Tensor, cast: Tensor) -> Tensor:
    """The values of ``cast`` (FP32) with the derivative of ``x``; exactly these values, for x - x is 0."""
    wide = x.float()
    return cast.detach() + (wide - wide.detach())

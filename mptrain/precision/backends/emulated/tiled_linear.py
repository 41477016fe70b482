"""A linear layer whose GEMMs take FP8 operands with a scale per row (rowwise) or per tile of 128 (block), exactly.

    output      = input / rows         x weight / rows            (summed over the features in)
    grad_input  = grad_output / rows   x weight / columns         (summed over the features out)
    grad_weight = (grad_output / columns)^T x input / columns     (summed over the tokens)

A scale must not vary along the dimension that a GEMM sums over (rowwise), or only every 128 elements of it (block), so
each operand is cast twice, both times from high precision: a transposed FP8 tensor would be rounded along the wrong
dimension. Of a weight in block scaling both casts are the same. What backward needs is kept in 8 bits a value, as FP8
hardware keeps it. Booked (amax, counts, errors) is the cast along rows, in the forward and in grad_input.

Peers. torchao 0.18's rowwise recipe has the same scales, powers of two rounded down, and E4M3 in all three roles; here
the policy's formats stay. Transformer Engine's Float8BlockScaling (and DeepSeek-V3) has the same tiles and, by default,
the same scales; its tensor cores add up 128 products before they apply them, here one FP32 sum takes all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mptrain.kernels import tiles
from mptrain.precision.backends._observed import book_tiles
from mptrain.precision.backends.emulated import second
from mptrain.precision.backends.emulated.functions import bias_gradient, rows_of, shaped, without_autocast
from mptrain.precision.backends.emulated.gemm import scaled_mm
from mptrain.precision.backends.emulated.linear import Operands

ALONG, DOWN = 1, 0  # the dimension of an operand that the GEMM sums over: along its rows or down its columns


class FineQuantizers(Operands):
    """Casts the operands of one layer at the scales of their tiles and keeps their books."""

    def __call__(self, x: Tensor, role: str, dim: int, *, carried: bool = True) -> tiles.Cast:
        """``x`` [M, N] for a GEMM that sums over ``dim``. Without ``carried`` only what backward needs is made."""
        config, books, slot = self.config, self._counters, self._slots[role]
        tile, carrier = config.tile_of(role, dim), self.carrier if carried else None
        booked = dim == ALONG and self._booked(role)
        counts = books.row(slot).get("counts") if booked else None
        fmt, margin = config.format_of(role), config.margin
        made, amax = tiles.cast(x, tile, fmt, margin=margin, carrier=carrier, counts=counts)
        if dim == ALONG:
            self._note(slot, role, amax)
        if counts is not None:
            book_tiles(books, slot, x, tile, made)
        return made

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out: Tensor = _FineLinear.apply(x, weight, bias, self, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
        return out

    def decode(self, kept: tuple[Tensor, Tensor], role: str) -> Tensor:
        """The carried values of codes and ratio that were kept for backward."""
        return tiles.decode(kept[0], self.config.tile_of(role, DOWN), kept[1], self.carrier)


class _FineLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, quantize: FineQuantizers, training: bool
    ) -> Tensor:
        rows = rows_of(x)
        a, b = quantize(rows, "input", ALONG), quantize(weight, "weight", ALONG)
        assert a.carried is not None
        assert b.carried is not None
        out = scaled_mm(a.carried, b.carried.t(), a.scale, b.scale, bias, x.dtype)
        if training:
            a = quantize(rows, "input", DOWN, carried=False)
            if quantize.config.tile_of("weight", DOWN) != quantize.config.tile_of("weight", ALONG):
                b = quantize(weight, "weight", DOWN, carried=False)
            ctx.save_for_backward(a.codes, a.ratio, a.scale, b.codes, b.ratio, b.scale)
        ctx.quantize, ctx.weight, ctx.has_bias = quantize, weight, bias is not None
        return shaped(out, x)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        (grad_output,) = grad_outputs
        x8, x_ratio, x_scale, w8, w_ratio, w_scale = ctx.saved_tensors
        quantize: FineQuantizers = ctx.quantize
        rows, dtype = rows_of(grad_output), grad_output.dtype
        grad_x = grad_w = grad_b = None
        g = quantize(rows.detach(), "grad_output", ALONG)  # to be booked if for nothing else
        if ctx.needs_input_grad[0]:
            assert g.carried is not None
            values = quantize.decode((w8, w_ratio), "weight")
            if torch.is_grad_enabled():
                grad_x = second.grad_input(rows, ctx.weight, g.carried.float() / g.scale, values.float() / w_scale)
            else:
                grad_x = scaled_mm(g.carried, values, g.scale, w_scale, None, dtype)
            grad_x = shaped(grad_x.to(dtype), grad_output)
        if ctx.needs_input_grad[1]:
            g = quantize(rows.detach(), "grad_output", DOWN)
            assert g.carried is not None
            values = quantize.decode((x8, x_ratio), "input")
            grad_w = scaled_mm(g.carried.t(), values, g.scale, x_scale, None, dtype).float()
            if torch.is_grad_enabled():
                grad_w = second.refused(grad_w, rows, ctx.weight)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            grad_b = bias_gradient(rows)
        return grad_x, grad_w, grad_b, None, None

"""A linear layer whose three GEMMs take FP8 operands, exactly, on any machine.

    output      = input (E4M3)            x weight (E4M3)
    grad_input  = grad_output (E5M2)      x weight (E4M3)
    grad_weight = grad_output (E5M2)^T    x input (E4M3)

The input and the weight are kept for backward as real 8-bit tensors with their scales, as FP8 hardware keeps them.
"""

from __future__ import annotations

import copy
import functools
from abc import ABC, abstractmethod
from typing import Any, Self

import torch
from torch import Tensor, nn

from mptrain import kernels
from mptrain.distributed.tensor import on_shards
from mptrain.precision.backends._delayed_scaling import DelayedScaling
from mptrain.precision.backends.emulated import second
from mptrain.precision.backends.emulated.functions import bias_gradient, rows_of, shaped, without_autocast
from mptrain.precision.backends.emulated.gemm import scaled_mm
from mptrain.precision.counters import Counters
from mptrain.precision.policy import Quantization


class Operands(ABC):
    """The operands of one layer: how they are cast, into what dtype (``carrier``), and the rows of their books."""

    copied = False
    ran = False  # has the layer multiplied these operands?

    def __init__(self, config: Quantization, slots: dict[str, int], counters: Counters, carrier: torch.dtype) -> None:
        self.config, self.carrier = config, carrier
        self._slots, self._counters = slots, counters

    @property
    def bypassed(self) -> bool:
        return self._counters.bypassed

    def __deepcopy__(self, memo: Any) -> Self:
        """Serve a copy of the model: it runs where the original does, at its scales, and books nothing."""
        copied = copy.copy(self)
        copied.copied = True
        return copied

    @abstractmethod
    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Multiply ``x`` [..., K] by ``weight`` [N, K] transposed and add ``bias`` [N]: [..., N], in x's dtype."""

    def _booked(self, role: str) -> bool:
        """Tell whether to book: in a recomputed forward operands were booked before; grad_output is seen once and only
        in backward.
        """
        books = self._counters
        return not (self.copied or books.quiet or (books.replaying and role != "grad_output"))

    def _note(self, slot: int, role: str, amax: Tensor) -> None:
        """Note Inf and NaN among a copy's operands: they spoil the step."""
        books = self._counters
        if self._booked(role):
            books.note(slot, amax)
        elif self.copied and not books.quiet and not books.replaying:
            books.note(slot, amax.where(~amax.isfinite(), 0.0))


class Quantizers(Operands):
    """Quantizes the operands at one scale each and keeps their books (amax, scale, on sampled steps the sums)."""

    def __init__(
        self,
        config: Quantization,
        slots: dict[str, int],
        counters: Counters,
        delayed: DelayedScaling | None,
        carrier: torch.dtype,
    ) -> None:
        super().__init__(config, slots, counters, carrier)
        self._delayed = delayed

    def __call__(self, x: Tensor, role: str) -> tuple[Tensor, Tensor, Tensor]:
        """(8-bit tensor, its values in the carrier's dtype, FP32 scale); grad_output: (values, their transpose, scale).

        Nobody keeps grad_output's codes; both of its GEMMs follow at once and one of them wants it transposed.
        """
        books = self._counters
        slot, fmt = self._slots[role], self.config.format_of(role)
        booked = self._booked(role)
        sums = books.row(slot) if booked else {}
        if self._delayed is None:
            amax = books.share(kernels.amax(x))
            scale = kernels.current_scale(amax, fmt, self.config.margin)
            first, second = self._cast(x, role, scale, None, sums)
        else:
            first, second, scale, amax = self._quantize_delayed(x, role, sums, booked)
        self._note(slot, role, amax)
        if sums:
            books.scale[slot] = scale
            books.observe_part(x, slot, fmt, scale)
        return first, second, scale

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out: Tensor = _Linear.apply(x, weight, bias, self)  # type: ignore[no-untyped-call]
        return out

    def _cast(
        self, x: Tensor, role: str, scale: Tensor, amax: Tensor | None, sums: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        fmt = self.config.format_of(role)
        statistics = kernels.Statistics(amax=amax, **sums)
        if role == "grad_output":
            return kernels.operands(x, scale, fmt, carrier=self.carrier, statistics=statistics)
        quantized, carried = kernels.quantize(x, scale, fmt, carrier=self.carrier, statistics=statistics)
        assert carried is not None
        return quantized, carried

    def _quantize_delayed(
        self, x: Tensor, role: str, sums: dict[str, Tensor], booked: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        table, slot = self._delayed, self._slots[role]
        assert table is not None
        if booked and role == "input" and self._counters.closed:
            table.rotate()  # another micro-batch in the same forward context
        scale = table.scale[slot]
        if table.cold[slot] and not table.ran[slot]:
            amax = kernels.amax(x)
            config = self.config
            scale = (
                kernels.current_scale(amax, config.format_of(role), config.margin)
                if self.copied
                else table.warm(slot, amax)
            )
        scale = scale.clone()  # backward must divide by this micro-batch's scale after the table has moved on
        amax = torch.empty((), dtype=torch.float32, device=x.device)
        first, second = self._cast(x, role, scale, amax, sums)
        if booked:
            table.stage(slot, amax)
        return first, second, scale, amax


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, quantize: Quantizers) -> Tensor:
        rows = rows_of(x)
        x8, x_values, x_scale = quantize(rows, "input")
        w8, w_values, w_scale = quantize(weight, "weight")
        out = scaled_mm(x_values, w_values.t(), x_scale, w_scale, bias, x.dtype)
        ctx.save_for_backward(x8, w8, x_scale, w_scale)
        ctx.quantize, ctx.weight, ctx.has_bias = quantize, weight, bias is not None
        return shaped(out, x)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        (grad_output,) = grad_outputs
        x8, w8, x_scale, w_scale = ctx.saved_tensors
        rows = rows_of(grad_output)
        g_values, g_turned, g_scale = ctx.quantize(rows.detach(), "grad_output")
        grad_x = grad_w = grad_b = None
        dtype = grad_output.dtype
        if ctx.needs_input_grad[0]:
            w_values = kernels.decode(w8, g_values.dtype)
            if torch.is_grad_enabled():
                grad_x = second.grad_input(rows, ctx.weight, g_values.float() / g_scale, w_values.float() / w_scale)
            else:
                grad_x = scaled_mm(g_values, w_values, g_scale, w_scale, None, dtype)
            grad_x = shaped(grad_x.to(dtype), grad_output)
        if ctx.needs_input_grad[1]:
            x_values = kernels.decode(x8, g_values.dtype)
            grad_w = scaled_mm(g_turned, x_values, g_scale, x_scale, None, dtype).float()
            if torch.is_grad_enabled():
                grad_w = second.refused(grad_w, rows, ctx.weight)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            grad_b = bias_gradient(rows)
        return grad_x, grad_w, grad_b, None


class Emulated(nn.Module):
    """A layer of one product whose operands are FP8; everything else of it stays as it was.

    It is the layer itself under another class (:func:`emulate`), so that its hooks, buffers, parameters, attributes and
    methods remain, and references to it. ``transposed``: the weight is stored [in, out], as in transformers' Conv1D.
    """

    quantizers: Operands
    weight: Tensor
    bias: Tensor | None
    transposed = False

    def forward(self, input: Tensor) -> Tensor:
        if self.quantizers.bypassed:
            out: Tensor = super().forward(input)
            return out
        self.quantizers.ran = True
        if torch.is_autocast_enabled(input.device.type):
            input = input.to(torch.get_autocast_dtype(input.device.type))
        with torch.autocast(input.device.type, enabled=False):  # an FP32 carrier must stay FP32
            if self.transposed:
                turned: Tensor = self._quantized(input, self.weight.t(), self.bias)
                return turned
            sharded: Tensor = on_shards(self, input, self._quantized)
            return sharded

    # A graph break: the books (counts, amaxes, scales) change in place, in backward too, behind a compiler's back.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _quantized(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out: Tensor = self.quantizers.product(input, weight, bias)
        return out

    def extra_repr(self) -> str:
        q = self.quantizers.config
        own = super().extra_repr()
        added = f"forward={q.forward}, backward={q.backward}, scaling={q.scaling.value}"
        return f"{own}, {added}" if own else added


def emulate(layer: nn.Module, quantizers: Operands, *, transposed: bool = False) -> None:
    """Have ``layer`` multiply in FP8 from here on, in its place."""
    layer.quantizers = quantizers  # type: ignore[assignment]
    kind: Any = type(layer)
    layer.__class__ = _emulated(kind, transposed)


@functools.cache
def _emulated(kind: Any, transposed: bool) -> Any:
    """``kind`` with the forward of :class:`Emulated`; under a name of this module, where a copy looks for it."""
    name, number = f"Emulated{kind.__name__}", 1
    while name in globals():
        number += 1
        name = f"Emulated{kind.__name__}{number}"
    emulated = type(name, (Emulated, kind), {"__module__": __name__, "transposed": transposed})
    globals()[name] = emulated
    return emulated

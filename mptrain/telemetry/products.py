"""Matrix products at the dispatcher: which operators they are, their FLOPs, and in what format an operand really is.

Evidence is of three kinds. ``dtype``: the operand has the format's own type. ``values``: it is carried in a wider type
by an emulation and every element is exactly a number of the format. ``switch``: FP32 operands of a GPU while torch's
TF32 switch is on, which cuBLAS obeys.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import flop_counter

from mptrain import kernels
from mptrain.formats import CHUNK, Format
from mptrain.kernels import tiles
from mptrain.precision.backends.emulated.products import is_attention, operands_of

BY_VALUE = (Format.fp8_e4m3, Format.fp8_e5m2, Format.fp16, Format.tf32)  # what emulations carry in a wider type
NARROWEST_FIRST = (Format.fp8_e4m3, Format.fp8_e5m2, Format.bf16, Format.fp16, Format.tf32)
NAMES = {fmt.value.dtype: fmt.name for fmt in Format if fmt.value.dtype is not None}
TF32_LOST = (1 << 13) - 1  # the bits of FP32's 23-bit mantissa that TF32 has not


@dataclass(frozen=True)
class Seen:
    """One operand: the format it is in, the type that carries it, and how we know."""

    ran: str
    carrier: str
    evidence: str = "dtype"


def flops_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """Floating-point operations by torch's own formulas, or ours for what its registry lacks (CPU attention, ...)."""
    packet = func.overloadpacket
    if packet in flop_counter.flop_registry:
        return int(flop_counter.flop_registry[packet](*args, **kwargs, out_val=out))
    operands = [args[i] for i in operands_of(func)]
    shapes = [tuple(x.shape) for x in operands]
    if is_attention(func):
        count: Any = flop_counter.sdpa_flop_count if len(shapes) == 3 else flop_counter.sdpa_backward_flop_count
        return int(count(*shapes))
    if func.overloadpacket.__name__ == "conv_tbc_backward":
        return int(4 * operands[0].numel() * shapes[2][0] * shapes[2][1])
    left, right = shapes
    if len(left) == len(right) == 1:
        return int(2 * left[0] * (right[0] if func.overloadpacket.__name__.startswith("addr") else 1))
    if len(right) == 1:
        return int(2 * operands[0].numel())
    if len(left) == 3 and len(right) == 2:  # a grouped product: the groups share out the columns of the right operand
        return int(2 * left[1] * right[0] * right[1])
    return int(2 * operands[0].numel() * right[-1])


def look(x: Tensor, asked: Format, *, emulated: bool, tile: tiles.Tile = tiles.WHOLE) -> Seen:
    """Find the format that ``x`` really is in.

    ``emulated``: a wider type may carry it, and its values are the evidence.

    The asked format is tried first (an E4M3 number with two mantissa bits is an E5M2 number as well), then the others
    from the narrowest; an operand on no grid has the format of its type. ``tile``: parts of ``x`` that have powers of
    two of their own as scales, see :meth:`mptrain.precision.policy.Quantization.tile_of`.
    """
    name = NAMES.get(x.dtype, str(x.dtype).removeprefix("torch."))
    if emulated and asked in BY_VALUE and name in ("fp32", "bf16") and name != asked.name:
        wider = [fmt for fmt in NARROWEST_FIRST if fmt.value.bits < torch.finfo(x.dtype).bits]
        for fmt in (asked, *wider):
            if fmt in wider and on_grid(x, fmt, tile):
                return Seen(fmt.name, name, "values")
    if name == "fp32" and x.is_cuda and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return Seen("tf32", name, "switch")
    return Seen(name, name)


def on_grid(x: Tensor, fmt: Format, tile: tiles.Tile = tiles.WHOLE) -> bool:
    """Tell whether every value of ``x`` (FP32 or BF16) is exactly a number of ``fmt``.

    NaN is one of any format. Reads the device.

    With a ``tile``: of ``fmt`` times the power of two that fits the tile best. In chunks, so that the check of a large
    operand does not show in the peak of memory (with tiles it does, as the emulation's own casts of them do).
    """
    if tile != tiles.WHOLE and fmt in kernels.FP8:
        x = tiles.scaled(x.detach(), tile, fmt)
    turned = x.ndim == 2 and x.stride(0) == 1
    for chunk in torch.split((x.t() if turned else x).detach().reshape(-1), CHUNK):
        if fmt is Format.tf32:
            off = (chunk.float().view(torch.int32) & TF32_LOST) != 0
        else:
            dtype = fmt.value.dtype
            assert dtype is not None
            off = chunk.to(dtype).to(chunk.dtype) != chunk
        if bool((off & ~chunk.isnan()).any()):
            return False
    return True


def unwrapped(x: Any) -> tuple[Tensor, Tensor] | None:
    """(8-bit data, scale) of a tensor subclass that holds both, as torchao's does; None for any other tensor."""
    if not hasattr(x, "__tensor_flatten__"):
        return None
    parts = [getattr(x, name) for name in x.__tensor_flatten__()[0]]
    data = [part for part in parts if part.dtype.itemsize == 1 and part.is_floating_point()]
    scale = [part for part in parts if part.dtype is torch.float32]
    return (data[0], scale[0]) if len(data) == len(scale) == 1 else None


def look_inside(x: Tensor, outer: Any, asked: Format, *, emulated: bool) -> Seen:
    """Do as :func:`look`, for an operand that a subclass ``outer`` handed down to the product that really ran.

    Carried in a wider type it must be the 8-bit data over (or times) its scale, bit for bit.
    """
    parts = unwrapped(outer)
    if parts is not None and x.dtype.itemsize > 1 and x.shape == parts[0].shape:
        data, scale = parts
        for values in (data.float() / scale, data.float() * scale):
            if torch.allclose(x.float(), values, rtol=0.0, atol=0.0, equal_nan=True):
                plain = look(data, asked, emulated=False)
                return Seen(plain.ran, NAMES.get(x.dtype, str(x.dtype)), "values")
    return look(x, asked, emulated=emulated)


def joined(parts: Iterable[str]) -> str:
    """``bf16`` for operands that agree, else ``fp8_e5m2 x fp8_e4m3``."""
    parts = list(parts)
    return parts[0] if len(set(parts)) == 1 else " x ".join(parts)

"""The kernels fused by ``torch.compile``: the arithmetic of quantize.c in integer tensor operations.

Used only when asked for (``MPTRAIN_KERNELS=compiled``): on CPU the first call costs 28 s cold and 3 s with Inductor's
cache warm (measured). One dynamic-shape compilation per combination of format, dtypes and statistics.
"""

from __future__ import annotations

import functools
import math
import os
import shutil
import struct
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from mptrain.formats import Format
from mptrain.kernels import eager
from mptrain.kernels.statistics import Statistics

INFINITE, NAN_BITS, MAGNITUDE = 0x7F800000, 0x7FC00000, 0x7FFFFFFF
SIGN = -0x80000000
CASTS_FROM = 1024  # elements


def bits_of(value: float) -> int:
    """The FP32 bit pattern of ``value`` (which FP32 must hold exactly) as a non-negative integer."""
    return int(struct.unpack("<I", struct.pack("<f", value))[0])


@dataclass(frozen=True)
class Bits:
    """A format as the bit patterns that the integer rounding needs (all of FP32 magnitudes)."""

    mantissa: int
    lowest: int
    clamp: int
    overflow: int
    nan: int
    sign_shift: int

    @staticmethod
    def of(fmt: Format) -> Bits:
        """Derived from the :class:`FormatSpec`; FP16 is cut to 2^16, whose code is Inf, FP8 to its maximum."""
        spec = fmt.value
        return Bits(
            mantissa=spec.mantissa_bits,
            lowest=bits_of(spec.min_normal),
            clamp=bits_of(spec.max if spec.bits == 8 else 65536.0),
            overflow=bits_of(spec.overflow_at) + (not spec.tie_overflows),
            nan=0x7F if spec.bits == 8 else 0x7E00,
            sign_shift=32 - spec.bits,
        )


# Not a cached function: Dynamo would trace through the cache, and warns of it.
BITS = {fmt: Bits.of(fmt) for fmt in (Format.fp8_e4m3, Format.fp8_e5m2, Format.fp16, Format.tf32, Format.bf16)}


def missing(device: torch.device) -> str:
    """Why this implementation cannot serve ``device``; empty if it can."""
    if device.type == "cuda":
        return "" if find_spec("triton") else "torch.compile for CUDA needs Triton: pip install triton"
    if torch.backends.cpu.get_cpu_capability() == "AVX2":  # torch 2.13 counts 32,768 of 65,536 BF16 elements
        return "Inductor leaves half of a 16-bit tensor out of its sums where vectors have 256 bits (AVX2)"
    compilers = (os.environ.get("CXX"), "c++", "g++", "clang++")
    found = any(shutil.which(name) for name in compilers if name)
    return "" if found else "torch.compile for CPU needs a C++ compiler (set CXX or install g++)"


def amax(x: Tensor, out: Tensor) -> None:
    """``max |x|`` (any shape) into ``out`` (FP32, 0-dim). A reduction is one pass in eager mode already."""
    eager.amax(x, out)


def observe(x: Tensor, scale: Tensor | None, fmt: Format | None, wanted: Statistics) -> None:
    """The statistics of ``x``: a histogram is no loop that Inductor fuses."""
    eager.observe(x, scale, fmt, wanted)


def quantize(
    x: Tensor,
    scale: Tensor,
    fmt: Format,
    q: Tensor,
    carried: Tensor | None,
    wanted: Statistics,
) -> None:
    """``x * scale`` rounded in ``fmt`` into ``q`` and, widened again, into ``carried``; all of ``x``'s shape."""
    wanted = _observed(x, scale, fmt, wanted)
    counts, amax = wanted.counts, wanted.amax
    plain = counts is None and fmt.value.bits == 8
    if plain and carried is not None and _castable(x, carried) and _quantized_by_casts(x, scale, fmt, q, carried):
        if amax is not None:
            eager.amax(x, amax)
        return
    codes = q.view(torch.uint8 if fmt.value.bits == 8 else torch.int16).view(-1)
    values, largest = None if carried is None else _bits(carried), None if amax is None else amax.view(())
    _quantize(x.view(-1), scale.view(()), fmt, codes, values, counts, largest)


def fake_quantize(x: Tensor, scale: Tensor, fmt: Format, out: Tensor, wanted: Statistics) -> None:
    """``x`` rounded in ``fmt`` and multiplied by FP32 ``1 / scale``, into ``out`` (``x``'s shape and dtype)."""
    wanted = _observed(x, scale, fmt, wanted)
    largest = None if wanted.amax is None else wanted.amax.view(())
    _fake_quantize(x.view(-1), scale.view(()), fmt, _bits(out), wanted.counts, largest)


def decode(q: Tensor, out: Tensor) -> None:
    """The values of ``q`` (FP8 or FP16) into ``out`` (BF16 or FP32); eager FP8 casts on a CPU are no vector code."""
    if q.dtype is torch.float16 or not _castable(q, out):
        eager.decode(q, out)
        return
    largest = torch.empty((), dtype=torch.float32)
    _widen(q.view(-1), out.view(-1), largest)
    if math.isnan(largest.item()):
        eager.decode(q, out)


def column_sums(x: Tensor, out: Tensor) -> None:
    """``x.sum(0)`` of a matrix into ``out`` (FP32): torch's own reduction."""
    eager.column_sums(x, out)


def current_scale(amax: Tensor, maximum: float, divisor: float, out: Tensor) -> None:
    """As :func:`mptrain.kernels.eager.current_scale`: one element has nothing to fuse."""
    eager.current_scale(amax, maximum, divisor, out)


def _observed(x: Tensor, scale: Tensor, fmt: Format, wanted: Statistics) -> Statistics:
    """Write what is wanted beside counts and amax, before ``x`` may be rounded in place; return those two."""
    if wanted.histogram is not None or wanted.errors is not None or wanted.blocks is not None:
        eager.observe(x, scale, fmt, wanted._replace(counts=None, amax=None))
    return Statistics(wanted.counts, wanted.amax)


def _bits(x: Tensor) -> Tensor:
    return x.view(torch.int32 if x.dtype is torch.float32 else torch.int16).view(-1)


def _narrow(value: Tensor, dtype: torch.dtype) -> Tensor:
    """FP32 bits -> bits in ``dtype``, nearest-even. Inductor's own BF16 cast makes a NaN 0xffff on AVX512."""
    nan = (value & MAGNITUDE) > INFINITE
    if dtype is torch.float32:
        return torch.where(nan, NAN_BITS, value)
    if dtype is torch.bfloat16:
        rounded = (value + 0x7FFF + ((value >> 16) & 1)) >> 16
        return torch.where(nan, NAN_BITS >> 16, rounded).to(torch.int16)
    sign = (value >> 16) & 0x8000
    return torch.where(nan, 0x7E00, _round(value & MAGNITUDE, BITS[Format.fp16])[0] | sign).to(torch.int16)


def _round(m: Tensor, b: Bits) -> tuple[Tensor, Tensor]:
    """Magnitudes as FP32 bits (int32) -> (code without sign, rounded value's bits); quantize.c says why it works."""
    cut = m.clamp(max=b.clamp)
    exponent = cut.clamp(min=b.lowest) & INFINITE
    magic = exponent + ((23 - b.mantissa) << 23)
    total = cut.view(torch.float32) + magic.view(torch.float32)
    rounded = (total - magic.view(torch.float32)).view(torch.int32)
    if b.sign_shift == 16:
        rounded = torch.where(rounded == b.clamp, INFINITE, rounded)
    code = ((exponent - b.lowest) >> (23 - b.mantissa)) + (total.view(torch.int32) - magic)
    nan = m > INFINITE
    return torch.where(nan, b.nan, code), torch.where(nan, NAN_BITS, rounded)


def _scaled(x: Tensor, scale: Tensor, fmt: Format) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(magnitude bits of ``x * scale``, its sign bit or 0 for NaN, code, rounded magnitude bits), all int32."""
    y = (x.float() * scale).view(torch.int32)
    m = y & MAGNITUDE
    sign = torch.where(m > INFINITE, 0, y & SIGN)
    if fmt is Format.tf32:
        rounded = torch.where(m >= INFINITE, m, (m + 0xFFF + ((m >> 13) & 1)) & ~0x1FFF)
        return m, sign, rounded, torch.where(m > INFINITE, NAN_BITS, rounded)
    return m, sign, *_round(m, BITS[fmt])


def _statistics(x: Tensor, m: Tensor, value: Tensor, fmt: Format, counts: Tensor | None, amax: Tensor | None) -> None:
    """As in eager.py, from bits: ``m`` of the product and ``value`` of the rounded magnitude."""
    raw = x.float().view(torch.int32) & MAGNITUDE
    if amax is not None:
        amax.copy_(raw.max().clamp(max=INFINITE + 1).view(torch.float32))
        amax.masked_fill_(amax.isnan(), math.nan)
    if counts is not None:
        finite = raw < INFINITE
        overflow = finite & (m >= BITS[fmt].overflow) & (m <= INFINITE)
        flushed = finite & (raw != 0) & (value == 0)
        masks = (torch.ones_like(finite), overflow, flushed, raw == INFINITE, raw > INFINITE)
        counts.add_(torch.stack([mask.sum() for mask in masks]))


@functools.partial(torch.compile, fullgraph=True, dynamic=True)
def _quantize(
    x: Tensor,
    scale: Tensor,
    fmt: Format,
    q: Tensor,
    carried: Tensor | None,
    counts: Tensor | None,
    amax: Tensor | None,
) -> None:
    m, sign, code, value = _scaled(x, scale, fmt)
    shift = BITS[fmt].sign_shift
    signed = code | torch.where(sign < 0, 1 << (31 - shift), 0)
    q.copy_(signed.to(q.dtype))
    if carried is not None:
        carried.copy_(_narrow(value | sign, torch.float32 if carried.dtype is torch.int32 else torch.bfloat16))
    _statistics(x, m, value, fmt, counts, amax)


def _castable(x: Tensor, out: Tensor) -> bool:
    """Where the fast casts are used: large enough to gain; few enough types for Dynamo's 8 compilations."""
    return (
        x.device.type == "cpu"
        and x.numel() >= CASTS_FROM
        and x.dtype is not torch.float16
        and out.dtype is torch.bfloat16
    )


def _quantized_by_casts(x: Tensor, scale: Tensor, fmt: Format, q: Tensor, carried: Tensor) -> bool:
    """The same bits from Inductor's own FP8 casts, on a CPU, on steps that are not sampled; False if there is a NaN.

    Inductor makes scalar code of int16, and passes a bit cast from vector to vector through a buffer in memory: 2048 x
    384 in BF16 takes 5.7 to 11 ms by ``_quantize`` and 1.5 here. But its casts keep the sign of a NaN in FP8, write
    0xffff for one in BF16, and looking for it at every element doubles the time. A CPU can look at the maximum for
    nothing.
    """
    largest = torch.empty((), dtype=torch.float32)
    _cast(x.view(-1), scale.view(()), fmt, q.view(-1), carried.view(-1), largest)
    return not math.isnan(largest.item())


@functools.partial(torch.compile, fullgraph=True, dynamic=True)
def _cast(x: Tensor, scale: Tensor, fmt: Format, q: Tensor, carried: Tensor, largest: Tensor) -> None:
    y = x.float() * scale
    codes = y.clamp(-fmt.value.max, fmt.value.max).to(q.dtype)
    q.copy_(codes)
    carried.copy_(codes.float())
    largest.copy_(y.abs().amax())


@functools.partial(torch.compile, fullgraph=True, dynamic=True)
def _widen(q: Tensor, out: Tensor, largest: Tensor) -> None:
    values = q.float()
    out.copy_(values)
    largest.copy_(values.abs().amax())


@functools.partial(torch.compile, fullgraph=True, dynamic=True)
def _fake_quantize(
    x: Tensor, scale: Tensor, fmt: Format, out: Tensor, counts: Tensor | None, amax: Tensor | None
) -> None:
    m, sign, _, value = _scaled(x, scale, fmt)
    back = (value | sign).view(torch.float32) * scale.reciprocal()
    out.copy_(_narrow(back.view(torch.int32), x.dtype))
    _statistics(x, m, value, fmt, counts, amax)

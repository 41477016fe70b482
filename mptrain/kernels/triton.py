"""The kernels in Triton, for CUDA: the arithmetic of quantize.c, one launch per call.

Statistics are reduced in each program and added with one atomic per column, in integers, so their sum does not depend
on the order in which programs finish. A histogram has some hundred columns in use: its programs are few (a grid-stride
loop), so that each adds them once for many blocks.
"""

# A kernel's arguments are pointers and tensors of the compiler's own language, which has no annotations for them.
# ruff: noqa: ANN001, ANN202
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mptrain.formats import Format
from mptrain.kernels import eager
from mptrain.kernels.bits import BITS
from mptrain.kernels.statistics import Statistics

BLOCK = 4096
PROGRAMS = 4  # of a histogram, for each multiprocessor
# A product and a sum fused into one FMA would skip a rounding.
EXACT = {"enable_fp_fusion": False}
KINDS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def missing(device: torch.device) -> str:
    """Why this implementation cannot serve ``device``; empty if it can."""
    if device.type != "cuda":
        return f"the Triton kernels run on cuda, not on {device.type}"
    return "" if torch.cuda.is_available() else "no CUDA GPU"


def amax(x: Tensor, out: Tensor) -> None:
    """``max |x|`` (contiguous, any shape) into ``out`` (FP32, one element)."""
    out.zero_()
    if x.numel():
        with torch.cuda.device_of(x):
            _amax[_grid(x)](_bits(x), out.view(torch.int32), x.numel(), KINDS[x.dtype], BLOCK, **EXACT)


def observe(x: Tensor, scale: Tensor | None, fmt: Format | None, statistics: Statistics) -> None:
    """The statistics of ``x``, those of a cast for ``fmt`` at ``scale``."""
    _run(x, scale, fmt, None, None, statistics)


def quantize(x: Tensor, scale: Tensor, fmt: Format, q: Tensor, carried: Tensor | None, statistics: Statistics) -> None:
    """``x * scale`` rounded in ``fmt`` into ``q`` and, widened again, into ``carried``; all contiguous, x's shape."""
    codes = q.view(torch.uint8 if fmt.value.bits == 8 else torch.int16)
    _run(x, scale, fmt, codes, carried, statistics)


def fake_quantize(x: Tensor, scale: Tensor, fmt: Format, out: Tensor, statistics: Statistics) -> None:
    """``x`` rounded in ``fmt`` and multiplied by FP32 ``1 / scale``, into ``out`` (``x``'s shape and dtype)."""
    _run(x, scale, fmt, None, out, statistics)


def decode(q: Tensor, out: Tensor) -> None:
    """The values of ``q`` (FP8 or FP16) into ``out`` (BF16 or FP32): torch's cast is one pass, NaNs another."""
    out.copy_(q)
    out.masked_fill_(out.isnan(), math.nan)


def column_sums(x: Tensor, out: Tensor) -> None:
    """``x.sum(0)`` of a matrix into ``out`` (FP32): torch's own reduction."""
    eager.column_sums(x, out)


def current_scale(amax: Tensor, maximum: float, divisor: float, out: Tensor) -> None:
    """``(maximum / amax) / divisor`` into ``out`` (FP32, one element); see eager.py."""
    with torch.cuda.device_of(amax):
        _scale[(1,)](amax, out, maximum, divisor, **EXACT)


def _grid(x: Tensor) -> tuple[int]:
    return (triton.cdiv(x.numel(), BLOCK),)


def _programs(x: Tensor, histogram: Tensor | None) -> tuple[int]:
    blocks = _grid(x)[0]
    if histogram is None:
        return (blocks,)
    on_cuda = x.device.type == "cuda"  # not so under Triton's interpreter
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if on_cuda else 1
    return (min(blocks, PROGRAMS * processors),)


def _run(
    x: Tensor,
    scale: Tensor | None,
    fmt: Format | None,
    codes: Tensor | None,
    values: Tensor | None,
    statistics: Statistics,
) -> None:
    """Launch on ``x``'s device. ``codes`` None means: scale the values back; ``values`` None too: observe only."""
    counts, amax, histogram = statistics.counts, statistics.amax, statistics.histogram
    if statistics.errors is not None or statistics.blocks is not None:  # first: x may be rounded in place
        eager.observe(x, scale, fmt, Statistics(errors=statistics.errors, blocks=statistics.blocks))
    if amax is not None:
        amax.zero_()
    if not x.numel() or (codes is values is counts is amax is histogram is None):
        return
    bits = BITS[fmt or Format.fp16]
    options: dict[str, Any] = {
        "FROM": KINDS[x.dtype],
        "TO": None if values is None else KINDS[values.dtype],
        "MANTISSA": bits.mantissa,
        "LOWEST": bits.lowest,
        "CLAMP": bits.clamp,
        "OVERFLOW": bits.overflow,
        "NAN": bits.nan,
        "SIGN": 1 << (31 - bits.sign_shift),
        "WIDE": fmt in (Format.tf32, Format.bf16),
        "BLOCK": BLOCK,
    }
    target = None if values is None else _bits(values)
    largest = None if amax is None else amax.view(torch.int32)
    tables = counts, largest, histogram
    with torch.cuda.device_of(x):
        grid = _programs(x, histogram)
        _quantize[grid](_bits(x), scale, codes, target, *tables, x.numel(), grid[0], **options, **EXACT)


def _bits(x: Tensor) -> Tensor:
    return x.view(torch.int32 if x.dtype is torch.float32 else torch.int16)


@triton.jit
def _widen(bits, FROM: tl.constexpr):
    """FP32 bits of FP32, BF16 or FP16 bits."""
    if FROM == "bf16":
        return bits.to(tl.int32) << 16
    elif FROM == "fp16":
        return bits.to(tl.float16, bitcast=True).to(tl.float32).to(tl.int32, bitcast=True)
    else:
        return bits


@triton.jit
def _narrow(bits, TO: tl.constexpr):
    """Bits of an FP32 value rounded to nearest-even in TO. NVIDIA's own casts make every NaN 0x7fff."""
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    if TO == "bf16":
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16)
        return tl.where(nan, tl.full(bits.shape, 0x7FC0, tl.int16), rounded)
    elif TO == "fp16":
        rounded = bits.to(tl.float32, bitcast=True).to(tl.float16).to(tl.int16, bitcast=True)
        return tl.where(nan, tl.full(bits.shape, 0x7E00, tl.int16), rounded)
    else:
        return tl.where(nan, 0x7FC00000, bits)


@triton.jit
def _amax(x_ptr, out_ptr, n, FROM: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    raw = _widen(tl.load(x_ptr + index, mask=index < n, other=0), FROM) & 0x7FFFFFFF
    tl.atomic_max(out_ptr, tl.max(tl.where(raw > 0x7F800000, 0x7FC00000, raw), 0), sem="relaxed")


@triton.jit
def _scale(amax_ptr, out_ptr, maximum, divisor):
    amax = tl.load(amax_ptr)
    scale = tl.math.div_rn(tl.math.div_rn(tl.full((), maximum, tl.float32), amax), tl.full((), divisor, tl.float32))
    scale = tl.where(scale == float("inf"), 3.4028234663852886e38, scale)
    tl.store(out_ptr, tl.where((amax > 0) & (amax < float("inf")), scale, 1.0))


@triton.jit
def _round(m, MANTISSA: tl.constexpr, LOWEST: tl.constexpr, CLAMP: tl.constexpr, NAN: tl.constexpr):
    """Magnitudes as FP32 bits -> (code without sign, rounded value's bits); quantize.c says why it works."""
    cut = tl.minimum(m, CLAMP)
    exponent = tl.maximum(cut, LOWEST) & 0x7F800000
    magic = exponent + ((23 - MANTISSA) << 23)
    total = cut.to(tl.float32, bitcast=True) + magic.to(tl.float32, bitcast=True)
    rounded = (total - magic.to(tl.float32, bitcast=True)).to(tl.int32, bitcast=True)
    if MANTISSA == 10:
        rounded = tl.where(rounded == CLAMP, 0x7F800000, rounded)
    code = ((exponent - LOWEST) >> (23 - MANTISSA)) + (total.to(tl.int32, bitcast=True) - magic)
    nan = m > 0x7F800000
    return tl.where(nan, NAN, code), tl.where(nan, 0x7FC00000, rounded)


@triton.jit
def _round_wide(m, MANTISSA: tl.constexpr):
    """Round as _round, on FP32 bits, for TF32 and BF16; they have no codes of their own, so the first is not for
    storing.
    """
    unit: tl.constexpr = 1 << (23 - MANTISSA)
    rounded = tl.where(m >= 0x7F800000, m, (m + (unit // 2 - 1) + ((m >> (23 - MANTISSA)) & 1)) & -unit)
    return rounded, tl.where(m > 0x7F800000, 0x7FC00000, rounded)


@triton.jit
def _count(counts_ptr, n, first, raw, m, value, OVERFLOW: tl.constexpr):
    """Add a block's share, from magnitude bits: ``raw`` of x, ``m`` of x * scale, ``value`` of the result."""
    finite = raw < 0x7F800000
    if first:
        tl.atomic_add(counts_ptr, tl.full((), n, tl.int64), sem="relaxed")
    saturated = tl.sum((finite & (m >= OVERFLOW) & (m <= 0x7F800000)).to(tl.int32), 0)
    flushed = tl.sum((finite & (raw != 0) & (value == 0)).to(tl.int32), 0)
    nonfinite = tl.sum((raw >= 0x7F800000).to(tl.int32), 0)
    nan = tl.sum((raw > 0x7F800000).to(tl.int32), 0)
    if saturated + flushed + nonfinite > 0:  # most blocks of a healthy tensor have nothing to add
        tl.atomic_add(counts_ptr + 1, saturated.to(tl.int64), sem="relaxed")
        tl.atomic_add(counts_ptr + 2, flushed.to(tl.int64), sem="relaxed")
        tl.atomic_add(counts_ptr + 3, (nonfinite - nan).to(tl.int64), sem="relaxed")
        tl.atomic_add(counts_ptr + 4, nan.to(tl.int64), sem="relaxed")


@triton.jit
def _bins(raw, mask):
    """A block's magnitudes by the bins of bins.py (int64 [2048]); what ``mask`` leaves out is in the last."""
    index = (raw - 1) >> 20
    index = tl.where(raw == 0, 2040, index)
    index = tl.where(raw >= 0x7F800000, tl.where(raw == 0x7F800000, 2041, 2042), index)
    return tl.histogram(tl.where(mask, index, 2047), 2048).to(tl.int64)


@triton.jit
def _add_bins(histogram_ptr, bins):
    index = tl.arange(0, 2048)
    tl.atomic_add(histogram_ptr + index, bins, mask=(bins != 0) & (index < 2043), sem="relaxed")


@triton.jit
def _quantize(
    x_ptr,
    scale_ptr,
    codes_ptr,
    values_ptr,
    counts_ptr,
    amax_ptr,
    histogram_ptr,
    n,
    programs,
    FROM: tl.constexpr,
    TO: tl.constexpr,
    MANTISSA: tl.constexpr,
    LOWEST: tl.constexpr,
    CLAMP: tl.constexpr,
    OVERFLOW: tl.constexpr,
    NAN: tl.constexpr,
    SIGN: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if histogram_ptr is not None:
        bins = tl.zeros((2048,), tl.int64)
    for block in range(tl.program_id(0), tl.cdiv(n, BLOCK), programs):
        index = tl.full((), block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = index < n
        x = _widen(tl.load(x_ptr + index, mask=mask, other=0), FROM)
        raw = x & 0x7FFFFFFF
        if scale_ptr is not None:
            scale = tl.load(scale_ptr)
            y = (x.to(tl.float32, bitcast=True) * scale).to(tl.int32, bitcast=True)
            m = y & 0x7FFFFFFF
            if WIDE:
                code, value = _round_wide(m, MANTISSA)
            else:
                code, value = _round(m, MANTISSA, LOWEST, CLAMP, NAN)
            negative = (y < 0) & (m <= 0x7F800000)
            signed = tl.where(negative, value | -0x80000000, value)
            if codes_ptr is not None:
                code = tl.where(negative, code | SIGN, code)
                tl.store(codes_ptr + index, code.to(codes_ptr.dtype.element_ty), mask=mask)
                if TO is not None:
                    tl.store(values_ptr + index, _narrow(signed, TO), mask=mask)
            elif TO is not None:
                back = signed.to(tl.float32, bitcast=True) * tl.math.div_rn(1.0, scale)
                tl.store(values_ptr + index, _narrow(back.to(tl.int32, bitcast=True), TO), mask=mask)
            if counts_ptr is not None:
                _count(counts_ptr, n, block == 0, tl.where(mask, raw, 0), m, value, OVERFLOW)
        if amax_ptr is not None:
            tl.atomic_max(amax_ptr, tl.max(tl.where(raw > 0x7F800000, 0x7FC00000, raw), 0), sem="relaxed")
        if histogram_ptr is not None:
            bins += _bins(raw, mask)
    if histogram_ptr is not None:
        _add_bins(histogram_ptr, bins)

"""The kernels in plain torch operations: about ten passes over memory, available on every device.

This is the readable definition that the other implementations match bit for bit, and what runs where no compiler is
found. It trusts torch's own casts, after clamping: torch 2.13 saturates Inf to 448 in E4M3 but makes 61440 an Inf in
E5M2, and earlier releases differ. NaNs are replaced by the one canonical positive NaN at the end.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mptrain.formats import Format
from mptrain.kernels import bins
from mptrain.kernels.statistics import BLOCK_SIZES, EXPONENTS, Statistics

FLT_MAX = Format.fp32.value.max


def missing(device: torch.device) -> str:
    """Why this implementation cannot serve ``device``; empty if it can (it always can)."""
    return ""


def amax(x: Tensor, out: Tensor) -> None:
    """``max |x|`` (any shape) into ``out`` (FP32, 0-dim)."""
    if x.numel() == 0:
        out.zero_()
        return
    low, high = torch.aminmax(x)
    out.copy_(torch.maximum(low.abs(), high.abs()))
    out.masked_fill_(out.isnan(), math.nan)


def observe(x: Tensor, scale: Tensor | None, fmt: Format | None, statistics: Statistics) -> None:
    """The statistics of ``x``, those of a cast for ``fmt`` at ``scale``."""
    rounded = None if fmt is None or scale is None else _rounded(_clamped(x, scale, fmt), fmt)
    add_statistics(x, rounded, scale, fmt, statistics)


def quantize(x: Tensor, scale: Tensor, fmt: Format, q: Tensor, carried: Tensor | None, statistics: Statistics) -> None:
    """``x * scale`` rounded in ``fmt`` into ``q`` and, widened again, into ``carried``; all of ``x``'s shape."""
    y = _clamped(x, scale, fmt)
    q.copy_(y)
    if fmt is Format.fp16:
        q.masked_fill_(y.isnan(), math.nan)  # NVIDIA's cast to FP16 makes every NaN 0x7fff
    if carried is not None:
        carried.copy_(q)
        carried.masked_fill_(y.isnan(), math.nan)
    add_statistics(x, q.float(), scale, fmt, statistics)


def fake_quantize(x: Tensor, scale: Tensor, fmt: Format, out: Tensor, statistics: Statistics) -> None:
    """``x`` rounded in ``fmt`` and multiplied by FP32 ``1 / scale``, into ``out`` (``x``'s shape and dtype)."""
    y = _clamped(x, scale, fmt)
    rounded = _rounded(y, fmt)
    back = rounded * scale.reciprocal()
    add_statistics(x, rounded, scale, fmt, statistics)
    out.copy_(back)
    out.masked_fill_(back.isnan(), math.nan)


def decode(q: Tensor, out: Tensor) -> None:
    """The values of ``q`` (FP8 or FP16) into ``out`` (BF16 or FP32), same shape."""
    out.copy_(q)
    out.masked_fill_(out.isnan(), math.nan)


def column_sums(x: Tensor, out: Tensor) -> None:
    """``x.sum(0)`` of a matrix into ``out`` (FP32)."""
    torch.sum(x, 0, dtype=torch.float32, out=out)


def current_scale(amax: Tensor, maximum: float, divisor: float, out: Tensor) -> None:
    """``(maximum / amax) / divisor`` into ``out`` (FP32, 0-dim); 1 for amax 0, Inf, NaN; FLT_MAX on overflow."""
    usable = (amax > 0) & (amax < math.inf)
    # Not `maximum / amax`: torch computes number / tensor as reciprocal * number, which rounds twice.
    scale = torch.full_like(amax, maximum).div_(amax).div_(divisor)
    out.copy_(torch.where(usable, scale.clamp_(max=FLT_MAX), 1.0).view(()))


def _storage(fmt: Format) -> torch.dtype:
    dtype = fmt.value.dtype
    assert dtype is not None, f"{fmt} has no storage type"
    return dtype


def _clamped(x: Tensor, scale: Tensor, fmt: Format) -> Tensor:
    """FP32 ``x * scale``, cut to the maximum of the FP8 formats, every NaN the canonical one."""
    y = x.float() * scale
    y.masked_fill_(y.isnan(), math.nan)
    return y.clamp_(-fmt.value.max, fmt.value.max) if fmt.value.bits == 8 else y


def _round_tf32(y: Tensor) -> Tensor:
    """Nearest-even to 10 mantissa bits: add half a last place less one, plus the last kept bit, and cut 13 bits."""
    bits = y.view(torch.int32)
    rounded = ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)
    return torch.where(y.isfinite(), rounded, y)


def _rounded(y: Tensor, fmt: Format) -> Tensor:
    """FP32 values of ``y`` (from :func:`_clamped`) in ``fmt``."""
    return _round_tf32(y) if fmt is Format.tf32 else y.to(_storage(fmt)).float()


def add_statistics(
    x: Tensor, rounded: Tensor | None, scale: Tensor | None, fmt: Format | None, statistics: Statistics
) -> None:
    """Write all statistics wanted; ``rounded``, ``scale`` and ``fmt`` for what a cast does."""
    if statistics.amax is not None:
        amax(x, statistics.amax)
    if statistics.histogram is not None:
        statistics.histogram.add_(torch.bincount(bins.indices(x), minlength=bins.N_BINS))
    if statistics.blocks is not None:
        _add_blocks(x, statistics.blocks)
    if rounded is None or scale is None or fmt is None:
        return
    if statistics.counts is not None:
        _add_counts(x, rounded, scale, fmt, statistics.counts)
    if statistics.errors is not None:
        wide, back = x.double().flatten(), (rounded * scale.reciprocal()).double().flatten()
        finite = wide.isfinite() & back.isfinite()
        squares = torch.stack([wide, wide - back]).masked_fill(~finite, 0).square()
        statistics.errors.add_(squares.sum(1))


def _add_counts(x: Tensor, rounded: Tensor, scale: Tensor, fmt: Format, counts: Tensor) -> None:
    """Saturation needs the product before it was clamped to the maximum, so it is computed again."""
    magnitude, spec = (x.float() * scale).abs(), fmt.value
    beyond = magnitude >= spec.overflow_at if spec.tie_overflows else magnitude > spec.overflow_at
    finite = x.isfinite()
    masks = (beyond & finite, finite & (x != 0) & (rounded == 0), x.isinf(), x.isnan())
    counts[0] += x.numel()
    counts[1:] += torch.stack([mask.sum() for mask in masks])


def _add_blocks(x: Tensor, blocks: Tensor) -> None:
    """Rows are filled up with zeros to whole blocks."""
    if x.numel() == 0:
        return
    bits = x.float().reshape(-1, x.shape[-1] if x.dim() else 1).view(torch.int32) & bins.MAGNITUDE
    for row, size in zip(blocks, BLOCK_SIZES, strict=True):
        whole = torch.nn.functional.pad(bits, (0, -bits.shape[1] % size))
        exponents = whole.view(-1, size).amax(1) >> 23
        row += torch.bincount(exponents, minlength=EXPONENTS)

"""The GEMM under the emulation: operands hold quantized values exactly, accumulation is FP32.

Every E4M3 and E5M2 value is exact in BF16 and a product of two is exact in FP32, so a BF16 GEMM with FP32
accumulation computes what an FP8 tensor core computes, up to the order of summation. The scale must be applied
before the result is rounded to BF16: 26 % of the outputs differ in the last bit otherwise (50.7 dB, measured).
oneDNN applies ``alpha`` to its FP32 accumulator, which is exactly that (bit-equal to FP32 GEMM, scale, round: tested).
"""

from __future__ import annotations

import functools
import os
import time

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

SMALLEST_INVERSE = 2.0**-64  # below it a bias over it may leave FP32 (NaN at scales of 1e20), see _with_bias
BIAS_COLUMNS = 3  # of a product whose bias goes through it, see _with_bias
FORCED = {"bf16": torch.bfloat16, "fp32": torch.float32}  # values of MPTRAIN_CARRIER


@functools.cache
def carrier_dtype(device_type: str) -> torch.dtype:
    """Choose BF16 where the machine multiplies it fast, else FP32 (equally exact). Measured once a process: 20 ms.

    Without AVX512-BF16 a BF16 GEMM is a disaster: 1024^3 capped to AVX2 took 2,128 ms against 12 ms in FP32.

    The environment variable ``MPTRAIN_CARRIER`` (bf16 or fp32) decides instead, on every device: to test one CPU's
    arithmetic on another. ValueError if it holds anything else.
    """
    forced = os.environ.get("MPTRAIN_CARRIER")
    if forced is not None:
        if forced not in FORCED:
            raise ValueError(
                f"MPTRAIN_CARRIER={forced} is not a carrier of FP8 values: set it to bf16 or fp32, or unset it"
            )
        return FORCED[forced]
    if device_type != "cpu":
        return torch.bfloat16
    return torch.bfloat16 if bf16_speedup() >= 1.0 else torch.float32


@functools.cache
def bf16_speedup() -> float:
    """Time of an FP32 GEMM over that of a BF16 one on this CPU (256 x 256 x 256; best of 12, it may be busy)."""

    def best_s(dtype: torch.dtype) -> float:
        a = torch.ones(256, 256, dtype=dtype)
        times = []
        for _ in range(13):  # the first pays for the choice of a kernel
            start = time.perf_counter()
            torch.mm(a, a)
            times.append(time.perf_counter() - start)
        return min(times[1:])

    return best_s(torch.float32) / best_s(torch.bfloat16)


@torch.library.custom_op("mptrain::scaled_mm", mutates_args=())
def _scaled_mm(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return _scaled_mm_now(a, b, scale_a, scale_b, bias, dtype)


@_scaled_mm.register_fake
def _(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1], dtype=dtype)


def scaled_mm(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """``(a @ b) / (scale_a * scale_b) + bias``, rounded once to ``dtype``.

    a: [M, K] and b: [K, N] in the carrier's dtype; scales: FP32 0-dim; bias: [N] or None.
    """
    if torch.compiler.is_compiling():
        out: Tensor = _scaled_mm(a, b, scale_a, scale_b, bias, dtype)
        return out
    return _scaled_mm_now(a, b, scale_a, scale_b, bias, dtype)


def _scaled_mm_now(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    if a.device.type == "cpu" and a.dtype == dtype:
        inverse = 1.0 / _number(scale_a) / _number(scale_b)  # in FP64: the product of two FP32 scales can overflow
        if bias is None:
            return torch.addmm(a.new_empty(()), a, b, beta=0, alpha=inverse)
        return _with_bias(a, b, bias, inverse)
    # No alpha on a GPU without reading the scale back; an FP32 carrier holds the sum until both scales are applied.
    wide = torch.mm(a.float(), b.float()).div_(scale_a).div_(scale_b)
    return (wide if bias is None else wide.add_(bias)).to(dtype)


def _with_bias(a: Tensor, b: Tensor, bias: Tensor, inverse: float) -> Tensor:
    """``inverse * a @ b + bias``, rounded once: an addend of ``addmm`` would be rounded to BF16 before it is added.

    The bias goes through the product, as three more columns of ``a`` that are 1 and rows of ``b`` that hold it in three
    BF16 numbers, which is all of its 24 bits (1/8 longer at 192 features, 21 % at most of the GEMMs of gpt-nano).
    """
    if a.dtype is not torch.bfloat16:
        return torch.addmm(bias.to(a.dtype), a, b, alpha=inverse)
    if inverse < SMALLEST_INVERSE:
        return torch.addmm(bias.float(), a.float(), b.float(), alpha=inverse).to(a.dtype)
    rest = bias.float() / inverse
    rows = []
    for _ in range(BIAS_COLUMNS):
        rows.append(rest.to(torch.bfloat16))
        rest = rest - rows[-1]
    left = torch.cat([a, a.new_ones(()).expand(a.shape[0], BIAS_COLUMNS)], dim=1)
    right = torch.cat([b.t(), torch.stack(rows, dim=1)], dim=1).t()
    return torch.addmm(a.new_empty(()), left, right, beta=0, alpha=inverse)


def _number(scale: Tensor) -> float:
    """The scale; 1 of a fake tensor, of which a plan of memory wants no value."""
    return 1.0 if isinstance(scale, FakeTensor) else scale.item()

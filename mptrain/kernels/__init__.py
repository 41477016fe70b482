"""Emulated FP8, FP16 and TF32 in one pass over memory: the same bits from C, Triton or plain torch.

Arithmetic, in every implementation: ``y = float32(x) * scale`` (one rounding), clamped to the maximum for the FP8
formats, rounded to nearest-even in the format. Inf therefore saturates in FP8 and NaN stays NaN (the canonical
positive one), which is why Inf and NaN are counted on ``x``, before the cast. Values scaled back are
``float32(q) * float32(1 / scale)``.

Eager calls go straight to the implementation (10 to 25 us in all); calls that torch traces, fakes or transforms go
through the custom operators ``mptrain::*``. Results are detached: call these from an autograd.Function.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from mptrain.formats import Format
from mptrain.kernels import operators
from mptrain.kernels.choice import (
    IMPLEMENTATIONS,
    Kernels,
    described,
    implementation,
    kernels_on,
    module,
    use,
    why_not,
)
from mptrain.kernels.operators import direct, onlooker
from mptrain.kernels.statistics import COUNTS, INPUTS, UNWANTED, Statistics, check_input, check_scalar

__all__ = [
    "CODES", "CODE_TYPES", "COUNTS", "FP8", "IMPLEMENTATIONS", "INPUTS", "OBSERVED", "Kernels", "Statistics", "amax",
    "column_sums", "current_scale", "decode", "described", "fake_quantize", "implementation", "observe", "onlooker",
    "operands", "quantize", "use", "why_not",
]  # fmt: skip

FP8 = {Format.fp8_e4m3, Format.fp8_e5m2}
CODES = {*FP8, Format.fp16}
CODE_TYPES = {fmt.value.dtype for fmt in CODES}
OBSERVED = CODES | {Format.tf32, Format.bf16}


def amax(x: Tensor) -> Tensor:
    """``max |x|`` as FP32, 0-dim, on ``x``'s device. NaN if any element is NaN, else Inf if any is Inf; 0 if empty."""
    check_input(x)
    out = torch.empty((), dtype=torch.float32, device=x.device)
    x = x.contiguous()
    if direct(x):
        kernels_on(x.device).amax(x, out)
    else:
        operators.amax(x, out)
    return out


def observe(x: Tensor, statistics: Statistics, *, fmt: Format | None = None, scale: Tensor | None = None) -> None:
    """Write ``statistics`` of ``x`` (FP32, BF16 or FP16, any shape), and only those, in one pass.

    ``counts`` and ``errors`` are those of a cast to ``fmt`` (FP8, FP16, TF32 or BF16) at ``scale`` (FP32, one element).
    """
    statistics.check(x, scale)
    if (statistics.counts is not None or statistics.errors is not None) and (fmt is None or scale is None):
        raise ValueError("counts and errors are those of a cast: give fmt and scale")
    if fmt is not None and fmt not in OBSERVED:
        raise ValueError(f"observe does not round to {fmt}; choose one of {_names(OBSERVED)}")
    x = x.contiguous()
    if direct(x):
        kernels_on(x.device).observe(x, scale, fmt, statistics)
    else:
        operators.observe(x, scale, None if fmt is None else fmt.name, *statistics)


def quantize(
    x: Tensor,
    scale: Tensor,
    fmt: Format,
    *,
    carrier: torch.dtype | None = None,
    statistics: Statistics = UNWANTED,
) -> tuple[Tensor, Tensor | None]:
    """``x`` (FP32, BF16 or FP16, any shape) times ``scale`` (FP32, one element), rounded in ``fmt`` (FP8 or FP16).

    Returns the codes, in ``fmt``'s own dtype, and the same values (still times ``scale``) in ``carrier`` for a GEMM,
    or None. ``statistics`` of ``x`` cost no pass of their own. FP16 values
    need an FP32 carrier: BF16 has 7 mantissa bits of the 10.
    """
    if fmt not in CODES:
        raise ValueError(f"quantize has no codes for {fmt}; choose one of {_names(CODES)}, or use fake_quantize")
    if carrier not in (None, torch.float32, torch.bfloat16) or (carrier is torch.bfloat16 and fmt is Format.fp16):
        raise ValueError(f"{carrier} cannot carry {fmt} values exactly; use carrier=torch.float32")
    statistics.check(x, scale)
    x = x.contiguous()
    q = torch.empty_like(x, dtype=fmt.value.dtype)  # half the time of torch.empty
    carried = None if carrier is None else torch.empty_like(x, dtype=carrier)
    if direct(x):
        kernels_on(x.device).quantize(x, scale, fmt, q, carried, statistics)
    else:
        operators.quantize(x, scale, fmt.name, q, carried, *statistics)
    return q, carried


def operands(
    x: Tensor,
    scale: Tensor,
    fmt: Format,
    *,
    carrier: torch.dtype,
    statistics: Statistics = UNWANTED,
) -> tuple[Tensor, Tensor]:
    """Cast a matrix for two GEMMs and return it with its transpose: the values of :func:`quantize`, without codes.

    The transpose is a view, but for the C kernels in BF16: oneDNN transposes a left operand itself, slowly (2048 x 1536
    by 384: 13.0 ms against 7.0 for one that is contiguous), where this pass has it in the cache. oneDNN may then add up
    in another order (1024 rows: last bits differ), and the training step of a GPT gains 2 %.
    """
    planned = isinstance(x, FakeTensor)  # then it is the buffers alone that count
    if (planned or direct(x)) and implementation(x.device) == "c" and carrier is torch.bfloat16 and fmt in FP8:
        statistics.check(x, scale)
        x = x.contiguous()
        out = torch.empty_like(x, dtype=carrier)
        turned = torch.empty(x.shape[1], x.shape[0], dtype=carrier)
        if not planned:
            module("c").operands(x, scale, fmt, out, turned, statistics)
        return out, turned
    carried = quantize(x, scale, fmt, carrier=carrier, statistics=statistics)[1]
    assert carried is not None
    return carried, carried.t()


def decode(q: Tensor, carrier: torch.dtype) -> Tensor:
    """The values of ``q`` (FP8 or FP16 codes) in ``carrier`` (BF16 or FP32). Exact, but for FP16 in BF16."""
    if q.dtype not in CODE_TYPES or carrier not in (torch.float32, torch.bfloat16):
        raise ValueError(f"decode turns FP8 and FP16 into bfloat16 or float32, not {q.dtype} into {carrier}")
    q = q.contiguous()
    out = torch.empty_like(q, dtype=carrier)
    if direct(q):
        kernels_on(q.device).decode(q, out)
    else:
        operators.decode(q, out)
    return out


def column_sums(x: Tensor) -> Tensor:
    """``x.sum(0)`` of a matrix (FP32, BF16 or FP16), added up in FP32: the gradient of a bias."""
    check_input(x)
    x = x.contiguous()
    out = torch.empty(x.shape[1], dtype=torch.float32, device=x.device)
    if direct(x):
        kernels_on(x.device).column_sums(x, out)
    else:
        operators.column_sums(x, out)
    return out


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    fmt: Format,
    *,
    out: Tensor | None = None,
    statistics: Statistics = UNWANTED,
) -> Tensor:
    """``x`` rounded in ``fmt`` at ``scale`` and scaled back: ``round(x * scale) * float32(1 / scale)``, in x's dtype.

    ``fmt`` may also be TF32 (10 mantissa bits, FP32's range; scale normally 1). ``out`` (contiguous, x's shape and
    dtype) may be ``x`` itself. ``statistics``: of ``x``.
    """
    if fmt not in CODES and fmt is not Format.tf32:
        raise ValueError(f"fake_quantize does not round to {fmt}; choose one of {_names(CODES | {Format.tf32})}")
    statistics.check(x, scale)
    source = x.contiguous()
    if out is None:
        out = torch.empty_like(source)
    elif out.shape != x.shape or out.dtype is not x.dtype or out.device != x.device or not out.is_contiguous():
        raise ValueError(f"out must be contiguous {x.dtype} of shape {tuple(x.shape)} on {x.device}")
    if direct(x):
        kernels_on(x.device).fake_quantize(source, scale, fmt, out, statistics)
    else:
        operators.fake_quantize(source, scale, fmt.name, out, *statistics)
    return out


def current_scale(amax: Tensor, fmt: Format, margin: int = 0) -> Tensor:
    """``(fmt.max / amax) / 2^margin`` in FP32 on amax's device, without a host read (Transformer Engine's rule).

    1 where amax (FP32, one element) is 0, Inf or NaN; FLT_MAX where FP32 overflows.
    """
    if not -126 <= margin <= 126:
        raise ValueError(f"margin is a power of two in FP32's range, -126 to 126, not {margin}")
    check_scalar(amax, "amax", amax.device)
    out = torch.empty((), dtype=torch.float32, device=amax.device)
    if direct(amax):
        kernels_on(amax.device).current_scale(amax, fmt.value.max, 2.0**margin, out)
    else:
        operators.current_scale(amax, fmt.value.max, 2.0**margin, out)
    return out


def _names(formats: set[Format]) -> str:
    return ", ".join(sorted(fmt.name for fmt in formats))

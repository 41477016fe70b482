"""Number formats: what each can hold, and the one definition of overflow and underflow used everywhere.

A value *overflows* a format when rounding it to nearest-even with an unbounded exponent gives more than the
format's maximum (E4M3: |x| > 464; E5M2: |x| >= 61440; FP16: |x| >= 65520). The naive ``|x| > max`` is wrong:
``(448 / amax) * amax`` exceeds 448 in FP32 for about 9 % of amaxes, and each of those rounds to 448 without loss.
A value *underflows* when it is not zero and rounds to zero: ``|x| <= min_subnormal / 2`` (the tie goes to even, 0).

Sources: IEEE 754 (FP32, FP16), OCP 8-bit Floating Point 1.0 (E4M3, E5M2), OCP Microscaling 1.0 (E2M1, E8M0).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CHUNK = 2**22  # elements counted at a time: 16 MiB in FP32


@dataclass(frozen=True)
class FormatSpec:
    """One number format. Magnitudes are exact Python floats. ``stored_as``: the name of torch's type, if it has one."""

    name: str
    bits: int
    mantissa_bits: int
    max: float
    min_normal: float
    min_subnormal: float
    has_inf: bool
    stored_as: str = ""
    integer: bool = False
    has_nan: bool = True

    @functools.cached_property
    def dtype(self) -> torch.dtype | None:
        """torch's storage type, if it has one. torch is imported when this is asked: that takes two seconds."""
        if not self.stored_as:
            return None
        import torch

        dtype: torch.dtype = getattr(torch, self.stored_as)
        return dtype

    @property
    def eps(self) -> float:
        """Gap between 1 and the next value; for integers, the step itself."""
        return 1.0 if self.integer else 2.0**-self.mantissa_bits

    @property
    def overflow_at(self) -> float:
        """The tie between ``max`` and the value that would follow it if the exponent had no bound."""
        ulp_at_max = 1.0 if self.integer else 2.0 ** (math.frexp(self.max)[1] - 1 - self.mantissa_bits)
        return self.max + ulp_at_max / 2

    @property
    def tie_overflows(self) -> bool:
        """True if the tie at ``overflow_at`` rounds up, away from ``max`` (``max`` has an odd last bit)."""
        ulp_at_max = (self.overflow_at - self.max) * 2
        return ulp_at_max > 0 and (self.max / ulp_at_max) % 2 == 1

    @property
    def underflow_at(self) -> float:
        """Non-zero magnitudes up to and including this one round to zero."""
        return self.min_subnormal / 2


class Format(Enum):
    """The formats mptrain knows. ``Format.fp8_e4m3.value`` is its :class:`FormatSpec`."""

    fp32 = FormatSpec("fp32", 32, 23, 2.0**128 - 2.0**104, 2.0**-126, 2.0**-149, True, "float32")
    # TF32 keeps FP32's storage and range; tensor cores read 10 mantissa bits. Subnormals have 2^-126 / 2^10 steps.
    tf32 = FormatSpec("tf32", 19, 10, 2.0**128 - 2.0**117, 2.0**-126, 2.0**-136, True)
    bf16 = FormatSpec("bf16", 16, 7, 2.0**128 - 2.0**120, 2.0**-126, 2.0**-133, True, "bfloat16")
    fp16 = FormatSpec("fp16", 16, 10, 65504.0, 2.0**-14, 2.0**-24, True, "float16")
    fp8_e4m3 = FormatSpec("fp8_e4m3", 8, 3, 448.0, 2.0**-6, 2.0**-9, False, "float8_e4m3fn")
    fp8_e5m2 = FormatSpec("fp8_e5m2", 8, 2, 57344.0, 2.0**-14, 2.0**-16, True, "float8_e5m2")
    fp4_e2m1 = FormatSpec("fp4_e2m1", 4, 1, 6.0, 1.0, 0.5, False, has_nan=False)
    e8m0 = FormatSpec("e8m0", 8, 0, 2.0**127, 2.0**-127, 2.0**-127, False, "float8_e8m0fnu")
    int8 = FormatSpec("int8", 8, 0, 127.0, 1.0, 1.0, False, "int8", integer=True, has_nan=False)
    int4 = FormatSpec("int4", 4, 0, 7.0, 1.0, 1.0, False, integer=True, has_nan=False)

    def __str__(self) -> str:
        return self.name


def overflows(x: Tensor, fmt: Format) -> Tensor:
    """Elementwise: would finite ``x`` round past ``fmt``'s maximum? Inf and NaN are non-finite, not overflow."""
    spec = fmt.value
    magnitude = x.double().abs()
    beyond = magnitude >= spec.overflow_at if spec.tie_overflows else magnitude > spec.overflow_at
    return beyond & magnitude.isfinite()


def underflows(x: Tensor, fmt: Format) -> Tensor:
    """Elementwise: is ``x`` non-zero and would it round to zero in ``fmt``?"""
    magnitude = x.double().abs()
    return (magnitude > 0) & (magnitude <= fmt.value.underflow_at)


def round_to(x: Tensor, fmt: Format) -> Tensor:
    """``x`` rounded to nearest-even in ``fmt`` and returned as FP64; finite values saturate at the maximum.

    Inf stays Inf and NaN stays NaN, so that this reference never hides a non-finite value. Written in FP64
    arithmetic (exact for every format here), it is the slow reference that the kernels are tested against,
    and it is itself tested against ``ml_dtypes``.
    """
    import torch

    spec = fmt.value
    wide = x.double()
    if spec.integer:
        rounded = wide.round()
    else:
        exponent = torch.frexp(wide).exponent - 1
        lowest = math.frexp(spec.min_normal)[1] - 1
        step = torch.ldexp(torch.ones_like(wide), exponent.clamp(min=lowest) - spec.mantissa_bits)
        rounded = (wide / step).round() * step
    saturated = rounded.clamp(-spec.max, spec.max)
    return torch.where(wide.isfinite(), saturated, wide)

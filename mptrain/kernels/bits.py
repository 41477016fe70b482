"""Formats as the bit patterns that integer rounding needs."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from mptrain.formats import Format

NAN_BITS = 0x7FC00000  # of the NaN that every kernel writes: FP32, quiet, positive


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


BITS = {fmt: Bits.of(fmt) for fmt in (Format.fp8_e4m3, Format.fp8_e5m2, Format.fp16, Format.tf32, Format.bf16)}

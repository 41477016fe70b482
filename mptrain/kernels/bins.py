"""The bins of a magnitude histogram: FP32's exponent and its top 3 mantissa bits, 8 bins to an octave.

A magnitude whose FP32 bits are ``b`` lies in bin ``(b - 1) >> 20``, and bin ``i`` holds the interval
``(value(i << 20), value((i + 1) << 20)]``. The upper end is inside because a format flushes
``|x| <= min_subnormal / 2``, a power of two: what a cast at a power-of-two scale flushes is a sum of whole bins
(above FP32's subnormals: bins 0 to 7 share those in steps of 2^-129). BF16 and FP16 count as the FP32 numbers that they
are.
"""

from __future__ import annotations

import torch
from torch import Tensor

SHIFT = 20  # of FP32's 23 mantissa bits, those that do not choose the bin
PER_OCTAVE = 8
N_MAGNITUDES = 2040  # 255 exponents of finite numbers
ZERO, INF, NAN = N_MAGNITUDES, N_MAGNITUDES + 1, N_MAGNITUDES + 2
N_BINS = N_MAGNITUDES + 3
MAGNITUDE, INFINITE = 0x7FFFFFFF, 0x7F800000


def edges() -> Tensor:
    """Ends of the finite bins (float64 [2041], ascending to 2^128): bin ``i`` is ``(edges[i], edges[i + 1]]``."""
    bits = torch.arange(N_MAGNITUDES + 1, dtype=torch.int64) << SHIFT
    values = bits.to(torch.int32).view(torch.float32).double()
    values[-1] = 2.0**128
    return values


def indices(x: Tensor) -> Tensor:
    """Each element's bin (int64, flat), for FP32, BF16 and FP16."""
    bits = x.float().view(torch.int32).flatten() & MAGNITUDE
    index = (bits - 1) >> SHIFT
    index.masked_fill_(bits == 0, ZERO).masked_fill_(bits == INFINITE, INF).masked_fill_(bits > INFINITE, NAN)
    return index.long()

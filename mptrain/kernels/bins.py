"""The bins of a magnitude histogram: FP32's exponent and top three mantissa bits, eight bins to a power of two.

A finite non-zero magnitude with FP32 bits ``b`` lies in bin ``(b - 1) >> 20``: bin i is the interval
``(value(i << 20), value((i + 1) << 20)]``. The upper end is inside because every format flushes magnitudes up to
*and including* half its smallest number, a power of two and so an edge: flushed counts are exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

SHIFT = 20  # of FP32's 23 mantissa bits, those that a bin does not tell apart
N_MAGNITUDES = 2040  # 255 finite exponents (the subnormals' included) of 8 bins
ZERO, INF, NAN = 2040, 2041, 2042
N_BINS = 2043


def edges() -> Tensor:
    """float64 [2041]: bin i holds magnitudes in ``(edges[i], edges[i + 1]]``; the last edge is 2^128."""
    starts = torch.arange(N_MAGNITUDES, dtype=torch.int32) << SHIFT
    return torch.cat([starts.view(torch.float32).double(), torch.tensor([2.0**128], dtype=torch.float64)])

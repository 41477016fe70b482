"""Statistics that one pass over a tensor can count, and checks of the tensors they are written to."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mptrain.kernels.bins import N_BINS

COUNTS = ("elements", "saturated", "flushed", "inf", "nan")
BLOCK_SIZES = (32, 128)
EXPONENTS = 256
INPUTS = (torch.float32, torch.bfloat16, torch.float16)


class Statistics(NamedTuple):
    """Tensors to write to, contiguous and on the input's device; None: not wanted. Integers agree in every
    implementation, ``errors`` to a relative 1e-5.
    """

    counts: Tensor | None = None
    """int64[5], added to: see ``COUNTS``, for a cast at a scale."""
    amax: Tensor | None = None
    """FP32, one element, overwritten with ``max |x|``."""
    histogram: Tensor | None = None
    """int64[N_BINS], added to: magnitudes, see bins.py."""
    errors: Tensor | None = None
    """float64[2], added to: sums of ``x^2`` and of ``(x - dequantized)^2`` where both are finite, in units of ``x``."""
    blocks: Tensor | None = None
    """int64[2, 256], added to: FP32 exponent fields of the maxima of every 32 and every 128 consecutive elements of the
    last dimension, whose last block may be shorter. 255: Inf or NaN among them; 0: zeros (or FP32 subnormals)."""

    def check(self, x: Tensor, scale: Tensor | None) -> None:
        """The C kernel reads and writes bare pointers: what is behind them must be right."""
        check_input(x)
        if scale is not None:
            check_scalar(scale, "scale", x.device)
        if self.amax is not None:
            check_scalar(self.amax, "amax", x.device)
        if self.counts is not None:
            _check_table(self.counts, "counts", torch.int64, (len(COUNTS),), x.device)
        if self.histogram is not None:
            _check_table(self.histogram, "histogram", torch.int64, (N_BINS,), x.device)
        if self.errors is not None:
            _check_table(self.errors, "errors", torch.float64, (2,), x.device)
        if self.blocks is not None:
            _check_table(self.blocks, "blocks", torch.int64, (len(BLOCK_SIZES), EXPONENTS), x.device)


UNWANTED = Statistics()


def check_input(x: Tensor) -> None:
    """Raise ValueError unless the kernels can read ``x``."""
    if x.dtype not in INPUTS:
        raise ValueError(f"the kernels read float32, bfloat16 and float16, not {x.dtype}")


def check_scalar(value: Tensor, name: str, device: torch.device) -> None:
    """Raise ValueError unless ``value`` is one FP32 element on ``device``."""
    if value.dtype is not torch.float32 or value.numel() != 1 or value.device != device:
        raise ValueError(f"{name} must be one float32 element on {device}")


def _check_table(table: Tensor, name: str, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> None:
    if table.dtype is not dtype or table.shape != shape or table.device != device or not table.is_contiguous():
        sizes = ", ".join(map(str, shape))
        raise ValueError(f"{name} must be contiguous {str(dtype).removeprefix('torch.')}[{sizes}] on {device}")

"""FP8 casts with a scale for each tile of a matrix, in plain torch around the kernels of one scale.

The scale of a tile is the largest power of two at which its amax does not pass the format's maximum (the mantissa of
Transformer Engine's ``(max / amax) / 2^margin`` cut off), so that scaling rounds nothing. It is 1 where the amax is 0,
Inf or NaN. A tile is (height, width), 0 for all of that dimension; at the edges tiles are cut.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mptrain import kernels
from mptrain.formats import Format

Tile = tuple[int, int]
WHOLE: Tile = (0, 0)
BITS = {2: (torch.int16, 2**15 - 1), 4: (torch.int32, 2**31 - 1)}  # bytes -> an integer type, all bits but the sign
MANTISSA = 2**23 - 1


class Cast(NamedTuple):
    """The result of :func:`cast` for a matrix [M, N]; only the codes and their ratios need be kept."""

    codes: Tensor
    carried: Tensor | None
    ratio: Tensor
    scale: Tensor


def split(x: Tensor, tile: Tile) -> Tensor:
    """``x`` [M, N] as tiles [down, height, across, width], filled up with zeros to whole ones."""
    (m, n), (height, width) = x.shape, tile
    height, width = height or max(1, m), width or max(1, n)
    if m % height or n % width:
        x = F.pad(x, (0, -n % width, 0, -m % height))
    return x.contiguous().view(x.shape[0] // height, height, x.shape[1] // width, width)


def join(tiles: Tensor, shape: torch.Size) -> Tensor:
    """The matrix of that shape from its tiles."""
    down, height, across, width = tiles.shape
    return tiles.reshape(down * height, across * width)[: shape[0], : shape[1]]


def amaxes(tiles: Tensor) -> Tensor:
    """FP32 [down, 1, across, 1]: ``max |x|`` of each tile, NaN or Inf as :func:`mptrain.kernels.amax`.

    On the bits, where magnitudes are ordered like integers (NaNs last): 3 times faster than abs and amax in BF16.
    """
    kind, magnitude = BITS[tiles.element_size()]
    bits = (tiles.view(kind) & magnitude).amax(dim=(1, 3), keepdim=True)
    return bits.view(tiles.dtype).float()


def powers(amax: Tensor, fmt: Format, margin: int = 0) -> Tensor:
    """The scale of each amax (FP32, any shape): a power of two, see above; within FP32's normal ones."""
    exact = torch.full_like(amax, fmt.value.max).div_(amax).clamp_(max=Format.fp32.value.max)
    power = (exact.view(torch.int32) & ~MANTISSA).view(torch.float32).mul_(2.0**-margin)
    return torch.where((amax > 0) & (amax < math.inf), power.clamp_(2.0**-126, 2.0**127), 1.0)


def scaled(x: Tensor, tile: Tile, fmt: Format) -> Tensor:
    """``x`` (FP32 or BF16, [M, N]) times its tiles' scales: exact but for what ``fmt`` makes 0."""
    parts = split(x, tile)
    return join(parts * powers(amaxes(parts), fmt).to(x.dtype), x.shape)


def cast(
    x: Tensor,
    tile: Tile,
    fmt: Format,
    *,
    margin: int = 0,
    carrier: torch.dtype | None = None,
    counts: Tensor | None = None,
) -> tuple[Cast, Tensor]:
    """``x`` (FP32, BF16 or FP16, [M, N]) cast to ``fmt`` (FP8) tile by tile, and its amax (FP32 0-dim).

    A GEMM takes one scale for all: ``scale`` (FP32 0-dim) is the one that the whole of ``x`` would have, the smallest
    of the tiles', and ``ratio`` [down, 1, across, 1] is ``scale`` over the tile's, a power of two of at most 1 (unless
    an Inf or NaN is about). ``carried`` (None without ``carrier``) holds ``codes * ratio``: exact, but for values below
    the carrier's normal numbers, 2^-126, in tiles that are 2^110 (E5M2) to 2^117 (E4M3) times smaller than the largest.
    ``counts``: as of :class:`mptrain.kernels.Statistics`.
    """
    narrow = x.dtype is torch.bfloat16 and counts is None  # what a product loses below 2^-133 is 0 in FP8, but counts
    wide = x if narrow else x.float()
    tiles = split(wide, tile)
    peaks = amaxes(tiles)
    amax = kernels.amax(peaks)
    scales = powers(torch.cat([peaks.flatten(), amax.view(1)]), fmt, margin)
    scales, scale = scales[:-1].view_as(peaks), scales[-1]
    ratio = scale / scales
    product = tiles * scales.to(wide.dtype)
    one, statistics = torch.ones_like(scale), kernels.Statistics(counts=counts)
    codes, carried = kernels.quantize(product, one, fmt, carrier=carrier, statistics=statistics)
    if counts is not None:
        counts[0] += x.numel() - tiles.numel()  # the zeros that tiles were filled up with
    if carried is not None:
        carried = join(carried.mul_(ratio.to(carried.dtype)), x.shape)
    return Cast(join(codes, x.shape), carried, ratio, scale), amax


def decode(codes: Tensor, tile: Tile, ratio: Tensor, carrier: torch.dtype) -> Tensor:
    """``Cast.carried`` of codes that were kept without it."""
    values = split(kernels.decode(codes, carrier), tile)
    return join(values.mul_(ratio.to(carrier)), codes.shape)

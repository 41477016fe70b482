"""The updates that AdamW asks for, and those that rounding loses: one pass over a weight and its two moments.

    update = -(decay * w) - step_size * m / (sqrt(v) * correction + eps)       each operation rounded to FP32

``w`` is the weight the step left. A coordinate is *asked* to move where ``update != 0`` and *lost* where storing
``w + update`` gives ``w`` again:

- with BF16 weights: ``bf16(b + update) == b`` for ``b = bf16(w)``, both roundings to nearest-even;
- with FP32 weights, the masters: ``float32(w + update) == w``; BF16 with a 16-bit remainder holds the same 32 bits and
  loses the same;
- with stochastic rounding to BF16: the probability that one step leaves ``b``, from the 16 bits that are cut off; over
  many steps nothing is lost on average.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mptrain.kernels import Statistics, c, implementation, observe
from mptrain.kernels.bins import N_BINS

N_LOST = 5  # asked; lost in BF16, in FP32, expected with stochastic rounding, with BF16 + 16-bit remainder
CHUNK = 1 << 20  # elements at a time: the temporaries below stay under 100 MB


@torch.no_grad()
def updates(
    weight: Tensor,
    first: Tensor,
    second: Tensor,
    *,
    step_size: float,
    correction: float,
    eps: float,
    decay: float,
    histograms: tuple[Tensor, Tensor, Tensor],
    lost: Tensor,
) -> None:
    """Add ``first``, ``second`` (FP32 moments, the weight's shape) and the update to ``histograms`` and ``lost``.

    ``weight``: FP32 or BF16. ``step_size``: lr / (1 - beta1^t); ``correction``: 1 / sqrt(1 - beta2^t); ``decay``: lr *
    weight_decay. ``histograms``: int64 [N_BINS] each; ``lost``: float64 [5], see :data:`N_LOST`.
    """
    if weight.dtype not in (torch.float32, torch.bfloat16) or first.dtype != torch.float32 != second.dtype:
        raise ValueError(f"updates reads FP32 or BF16 weights and FP32 moments, not {weight.dtype} and {first.dtype}")
    if any(table.shape != (N_BINS,) for table in histograms) or lost.shape != (N_LOST,):
        raise ValueError(f"updates adds to int64 [{N_BINS}] three times and float64 [{N_LOST}]")
    numbers = step_size, correction, eps, decay
    flat = tuple(x.contiguous().view(-1) for x in (weight, first, second))
    if implementation(weight.device) == "c":
        c.updates(flat[0], flat[1], flat[2], numbers, histograms, lost)
        return
    for start in range(0, weight.numel(), CHUNK):
        w, m, v = (x[start : start + CHUNK] for x in flat)
        u = update(w.float(), m, v, *numbers)
        for x, table in zip((m, v, u), histograms, strict=True):
            observe(x, Statistics(histogram=table))
        lost += lost_in(w.float(), u)


def update(w: Tensor, m: Tensor, v: Tensor, step_size: float, correction: float, eps: float, decay: float) -> Tensor:
    """The update of FP32 tensors, FP32."""
    wide = w.new_tensor([step_size, correction, eps, decay])
    return -(w * wide[3]) - wide[0] * m / (v.sqrt() * wide[1] + wide[2])


def lost_in(w: Tensor, u: Tensor) -> Tensor:
    """float64 [5] for FP32 weights ``w`` and updates ``u``, see :data:`N_LOST`."""
    asked = u != 0
    base = w.bfloat16().float()
    moved = base + u
    bf16 = asked & (moved.bfloat16().float() == base)
    fp32 = asked & (w + u == w)
    # Truncation of moved + random 16 bits gives base back with these chances: by the bits that are cut off.
    bits, base_bits = moved.view(torch.int32), base.view(torch.int32)
    high, cut = bits >> 16, (bits & 0xFFFF).double() / 65536
    stay = torch.where(high == base_bits >> 16, 1 - cut, torch.where(high + 1 == base_bits >> 16, cut, 0.0))
    expected = torch.where(asked, stay, 0.0)
    return torch.stack([asked.sum(), bf16.sum(), fp32.sum(), expected.sum(), fp32.sum()]).double()

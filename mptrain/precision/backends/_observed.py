"""Books of the backends whose kernels are not ours: the operands of a sampled step are cast once more, on the side.

Foreign kernels report no overflow or underflow, so on a step with ``counters.counting`` each operand goes through our
own pass with the scale its kernel uses; nothing of the pass flows back. On the other steps nothing is computed: an
amax alone reads every operand again (50 MB for 32 x 1024 x 768 in BF16, some 15 us at 3.35 TB/s, a third of the GEMM).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor

from mptrain import kernels
from mptrain.kernels import tiles
from mptrain.precision.counters import Counters
from mptrain.precision.policy import Quantization


class Booking:
    """Books the operands of one layer. ``scale_of(slot)``: the scale (FP32 0-dim) a kernel takes from a table.

    Without ``scale_of`` the scale is the operand's own, at the policy's granularity. Rowwise and block scaling cast
    each operand twice, along both of its dimensions; counted is the cast along the last one, and the scale is NaN.
    """

    ran = False  # has the layer multiplied?
    copied = False

    def __init__(
        self,
        config: Quantization,
        slots: dict[str, int],
        counters: Counters,
        scale_of: Callable[[int], Tensor] | None = None,
    ) -> None:
        self._config, self._slots, self._counters, self._scale_of = config, slots, counters, scale_of

    @property
    def bypassed(self) -> bool:
        return self._counters.bypassed

    @property
    def counting(self) -> bool:
        """Tell whether to book this forward: not in evaluation, and a recomputed one was booked the first time."""
        books = self._counters
        return books.counting and not (self.copied or books.quiet or books.replaying)

    def __deepcopy__(self, memo: Any) -> Self:
        """Serve a copy of the model: it runs where the original does, and enters nothing in its books."""
        copied = copy.copy(self)
        copied.copied = True
        return copied

    def operands(self, x: Tensor, weight: Tensor) -> None:
        """Before the output GEMM: ``x`` [..., K] and ``weight`` [N, K] as the kernel gets them."""
        self.ran = True
        if self.counting:
            self.book(x, "input")
            self.book(weight, "weight")

    def watch(self, out: Tensor) -> None:
        """After the output GEMM: have the gradient of ``out`` [..., N] booked when backward brings it."""
        if self.counting and out.requires_grad:
            _on_gradient(out, partial(self.book, role="grad_output"))

    # A graph break, on sampled steps only: the counters are changed in place.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def book(self, x: Tensor, role: str) -> None:
        """Count ``x`` as operand ``role`` and note its amax (before the cast) and scale."""
        books, slot, fmt = self._counters, self._slots[role], self._config.format_of(role)
        with torch.no_grad():
            rows = x.detach().reshape(-1, x.shape[-1])
            sums = books.row(slot)
            if self._config.fine and sums:
                self._book_tiles(rows, role, sums["counts"])
                return
            amax = kernels.amax(rows)
            books.note(slot, amax)
            scale = kernels.current_scale(amax, fmt, self._config.margin)
            if self._scale_of is not None:
                scale = self._scale_of(slot)
            if not sums:
                return
            books.scale[slot] = scale
            kernels.observe(rows, kernels.Statistics(**sums), fmt=fmt, scale=scale)
            books.observe_part(rows, slot, fmt, scale)

    def _book_tiles(self, rows: Tensor, role: str, counts: Tensor) -> None:
        slot, tile = self._slots[role], self._config.tile_of(role, 1)
        made, amax = tiles.cast(rows, tile, self._config.format_of(role), margin=self._config.margin, counts=counts)
        self._counters.note(slot, amax)
        book_tiles(self._counters, slot, rows, tile, made)


def book_tiles(books: Counters, slot: int, x: Tensor, tile: tiles.Tile, made: tiles.Cast) -> None:
    """Record how a sampled step cast ``x`` [M, N] in row ``slot``; counts are recorded elsewhere.

    The row's scale is NaN, because each tile has its own. Errors are of the values, not of the scaled ones: there a
    tile of small numbers would weigh as much as the largest.
    """
    books.scale[slot] = math.nan
    if "histogram" in books.sums:
        kernels.observe(x, kernels.Statistics(histogram=books.sums["histogram"][slot]))
    if "errors" in books.sums:
        kernels.observe(books.part_of(x), kernels.Statistics(blocks=books.sums["blocks"][slot]))
        part, codes = books.part_of(x).double(), books.part_of(made.codes)
        scale = made.scale / made.ratio
        scale = tiles.join(scale.expand(tiles.split(x, tile).shape), x.shape)
        back = codes.double() / books.part_of(scale)
        squares = torch.stack([part, part - back]).masked_fill(~(part.isfinite() & back.isfinite()), 0).square_()
        books.sums["errors"][slot] += squares.sum((1, 2))


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _on_gradient(out: Tensor, look: Callable[[Tensor], None]) -> None:
    out.register_hook(look)  # type: ignore[no-untyped-call]


def require_rows(x: Tensor, multiple: int, owner: str) -> None:
    """ValueError if ``x`` [..., K] has a number of rows (tokens) that the FP8 GEMMs of ``owner`` do not take."""
    rows = x.numel() // x.shape[-1]
    if rows % multiple:
        raise ValueError(
            f"{owner} needs a multiple of {multiple} tokens in each micro-batch, not {rows}: choose "
            f"trainer.batch_size times model.block_size so, or precision.backend=emulated, which takes any number"
        )

"""Overflow and underflow of the casts that ``torch.autocast`` and the FP16 and TF32 emulation make, on sampled steps.

These casts happen inside torch, so each linear layer is watched from outside: what enters it, its weight, and the
gradient of its output, each against the format that its GEMMs take. A tensor that is in that format already was rounded
by the operation that made it: of it only Inf and NaN can be told.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mptrain.formats import Format, count_cast
from mptrain.kernels.counters import Counters


def watch_casts(model: nn.Module, fmt: Format, counters: Counters, device: torch.device) -> None:
    """Reserve slots for every linear layer of ``model`` and count its operands whenever ``counters.counting``."""
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    for name, layer in layers:
        layer.register_forward_hook(partial(_look, slots=counters.add(name), fmt=fmt, books=counters))
    counters.allocate(device)


def _look(
    layer: nn.Module, args: tuple[Any, ...], out: Tensor, *, slots: dict[str, int], fmt: Format, books: Counters
) -> None:
    if not books.counting or books.quiet or books.replaying:
        return
    _count(args[0], slots["input"], fmt, books)
    _count(layer.weight, slots["weight"], fmt, books)
    if out.requires_grad:
        out.register_hook(partial(_count, slot=slots["grad_output"], fmt=fmt, books=books))  # type: ignore[no-untyped-call]


# A graph break, on sampled steps only: the counters are changed in place.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _count(x: Tensor, slot: int, fmt: Format, books: Counters) -> None:
    with torch.no_grad():
        books.counts[slot] += count_cast(x.detach(), fmt)

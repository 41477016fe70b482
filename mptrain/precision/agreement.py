"""Decide found_inf and the gradient norm alike on all ranks of a step, in one sum, and find out who they are."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from mptrain.distributed import ALONE, Ranks, World, joined

FINITE, NOT_FINITE = (torch.tensor(bad, device="cpu") for bad in (False, True))  # never written to


class Agreement:
    """The ranks that train one model, as told or, left out (None), as found in the first forward.

    Sharded parameters (DTensor) and a DDP whose forward is under way say that the processes train one model.
    """

    def __init__(self, ranks: Ranks | None) -> None:
        self.ranks = ALONE if ranks is None else ranks
        self.known = ranks is not None
        self._sharded = False
        self._counted: tuple[tuple[int, ...], Tensor] = ((), torch.empty(0))

    def max(self, value: Tensor) -> Tensor:
        """Elementwise MAX over the ranks; the same shape, dtype and device."""
        return self.ranks.max(value)

    def find(self, model: nn.Module) -> None:
        """Look whether the processes train ``model`` together, unless that is known."""
        if not self.known and joined():
            ddp = nn.parallel.DistributedDataParallel
            inside = getattr(ddp, "_active_ddp_module", None) is not None
            if inside or any(isinstance(module, ddp) for module in model.modules()):
                self.ranks, self.known = World(), True
            self._find(model.parameters())

    def _find(self, parameters: Iterable[nn.Parameter]) -> None:
        if not self.known and joined() and any(hasattr(p, "placements") for p in parameters):
            self.ranks, self.known = World(), True

    def over(self, parameters: list[nn.Parameter]) -> bool:
        """Tell whether some of ``parameters`` are sharded.

        ValueError if nothing says whether the processes belong together.
        """
        self._find(parameters)
        if not self.known and joined():
            raise ValueError(
                "several processes run, and the model is neither in DDP nor sharded by fully_shard: say "
                "Precision(policy, ranks=mptrain.World()) if they train one model, ranks=mptrain.ALONE if not"
            )
        self._sharded = any(hasattr(p, "placements") for p in parameters)
        return self._sharded

    def reached(
        self,
        norms: Tensor,
        sizes: list[int],
        parameters: list[nn.Parameter],
        own: Tensor | None,
        lost: Tensor | None,
        stop: bool,
    ) -> tuple[tuple[Tensor, Tensor, Tensor], list[Tensor], Tensor | None]:
        """Return :func:`together` of all optimizers, found_inf of each (0-dim), and how many ranks were asked to stop.

        ``norms``: FP32 [parameters], ``sizes``: of which belong to each optimizer; ``own``: were this rank's operands
        not finite? ``lost``: has this rank no finite loss (None: it has one)? Only if no rank has one is the step bad.
        One process alone has nobody to ask (None).
        """
        if self.ranks.size == 1 and len(sizes) == 1:
            total = torch.linalg.vector_norm(norms)
            found_inf = not_finite(total)
            for rank_bad in (own, lost):
                found_inf = found_inf if rank_bad is None else found_inf | rank_bad
            return (total, total, found_inf), [found_inf], None
        parts = [norms] if len(sizes) == 1 else torch.split(norms, sizes)
        if self.ranks.size == 1:
            totals = [torch.linalg.vector_norm(part) for part in parts]
            skips = [not_finite(norm) for norm in totals]
            for rank_bad in (own, lost):
                skips = skips if rank_bad is None else [one | rank_bad for one in skips]
            return together(totals, skips), skips, None
        asked = torch.tensor(float(stop), dtype=torch.float64).to(norms.device, non_blocking=True)
        squares = norms.double().square()  # in FP64 no square of a finite norm overflows
        if self._sharded:  # each element once, however many ranks hold it
            squares = squares.where(self._counts(parameters, norms.device), 0.0)
        sums = [part.sum() for part in ([squares] if len(sizes) == 1 else torch.split(squares, sizes))]
        bad = [~one.isfinite() if own is None else ~one.isfinite() | own for one in sums]
        without = torch.zeros_like(asked) if lost is None else lost.to(asked)
        told = self.ranks.sum(torch.stack([*sums, *(one.double() for one in bad), without, asked]))
        nothing = told[-2] == self.ranks.size
        n = len(sizes)
        if self._sharded:
            totals = [one.sqrt().float() for one in told[:n]]
        else:
            totals = [torch.linalg.vector_norm(part) for part in parts]
        skips = [(told[n + i] > 0) | nothing | not_finite(norm) for i, norm in enumerate(totals)]
        return together(totals, skips), skips, told[-1].float()

    def _counts(self, parameters: list[nn.Parameter], device: torch.device) -> Tensor:
        """Which parameters count here, bool [parameters]; kept, for copying it to a device takes longer than a step's
        arithmetic."""
        key = tuple(map(id, parameters))
        if key != self._counted[0]:
            self._counted = key, torch.tensor([self.ranks.counts(p) for p in parameters], device=device)
        return self._counted[1]


def not_finite(norm: Tensor) -> Tensor:
    """Tell whether a norm (0-dim) is Inf or NaN: bool 0-dim."""
    if norm.is_cpu:  # reading is free, and every operator takes 2 us
        return FINITE if math.isfinite(norm.item()) else NOT_FINITE
    return (norm - norm).ne(0)  # NaN for Inf and NaN: two kernels where isfinite takes 4


def together(totals: list[Tensor], found: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Join all optimizers: their norm, that of those without Inf or NaN (which clipping goes by), and found_inf."""
    if len(totals) == 1:
        return totals[0], totals[0], found[0]
    norms, bad = torch.stack(totals), torch.stack(found)
    return torch.linalg.vector_norm(norms), torch.linalg.vector_norm(norms.where(~bad, 0.0)), bad.any()

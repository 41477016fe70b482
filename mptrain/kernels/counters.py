"""Counts, amaxes and scales of every (layer, role), written by the backends and read by telemetry.

One row a slot, one tensor for all of them, so that a sampled step is read back in a single copy and the check for
non-finite operands is one vectorised call per micro-batch. Columns: :data:`mptrain.kernels.COUNTS`.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROLES = ("input", "weight", "grad_output")
N_COUNTS = 5  # elements, saturated, flushed, inf, nan: mptrain.kernels.COUNTS


class Counters:
    """Device-side counters. ``counting``: this step is sampled. ``replaying``: a forward is being recomputed.

    ``amax`` holds each slot's amax of the current micro-batch, Inf or NaN included (before any saturating cast);
    ``nonfinite`` remembers over the micro-batches of a step which slots saw one. ``quiet`` is set in evaluation:
    then backends neither count, nor stage, nor report. ``bypassed``: converted layers run as plain FP32 layers.
    """

    def __init__(self) -> None:
        self.slots: list[tuple[str, str]] = []
        self.counting = False
        self.replaying = False
        self.quiet = False
        self.bypassed = False
        self.allocate(torch.device("cpu"))

    def add(self, layer: str) -> dict[str, int]:
        """Reserve the three slots of a layer; returns role -> slot. Call before :meth:`allocate`."""
        first = len(self.slots)
        self.slots += [(layer, role) for role in ROLES]
        return {role: first + index for index, role in enumerate(ROLES)}

    def allocate(self, device: torch.device) -> None:
        n = len(self.slots)
        self.counts = torch.zeros(n, N_COUNTS, dtype=torch.int64, device=device)
        self.amax = torch.zeros(n, dtype=torch.float32, device=device)
        self.scale = torch.ones(n, dtype=torch.float32, device=device)
        self.nonfinite = torch.zeros(n, dtype=torch.bool, device=device)

    def end_microbatch(self) -> None:
        """Remember which slots saw Inf or NaN in this micro-batch."""
        if self.slots:
            self.nonfinite |= ~self.amax.isfinite()

    def end_step(self) -> Tensor:
        """The step's non-finite flags (bool [slots]); the next step starts clean."""
        flags = self.nonfinite
        if not self.slots:
            return flags
        self.nonfinite = torch.zeros_like(flags)
        self.amax.zero_()
        return flags

    def take(self) -> Tensor:
        """Counts since the last call (int64 [slots, 5], on the device); the table starts again from zero."""
        counts = self.counts
        self.counts = torch.zeros_like(counts)
        return counts

    def first_bad(self, flags: Tensor) -> tuple[str, str] | None:
        """(layer, role) where a non-finite value first appeared: forward in layer order, then backward in reverse."""
        bad = [self.slots[index] for index in flags.nonzero().flatten().tolist()]
        forward = [slot for slot in bad if slot[1] != "grad_output"]
        return forward[0] if forward else bad[-1] if bad else None

"""Counts, amaxes, scales and histograms of every row (layer, role), written by the backends and by telemetry.

One line a row, one tensor a kind, so that a sampled step is read back in a few copies and the check for non-finite
values is one vectorised call per micro-batch. What a sampled step adds up (:data:`SUMS`) are sums over elements:
micro-batches, calls of a shared layer and ranks merge by addition, exactly where the sums are whole numbers. The tables
of these sums exist from the beginning of a sampled step to :meth:`Counters.take`, and no longer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mptrain.formats import Format
from mptrain.kernels import Statistics, observe
from mptrain.kernels.bins import N_BINS

OPERANDS = ("input", "weight", "grad_output")
BACKWARD = ("grad_output", "grad_weight")
FORWARD_RANK = {"input": 0, "weight": 1, "output": 2}
PARTS, SAMPLED_FROM = 8, 65536  # of tensors with at least as many elements, one of 8 parts
N_COUNTS = 5  # elements, saturated, flushed, inf, nan: mptrain.kernels.COUNTS
SUMS: dict[str, tuple[tuple[int, ...], torch.dtype]] = {  # what one pass over a tensor adds: mptrain.kernels.observe
    "counts": ((N_COUNTS,), torch.int64),
    "histogram": ((N_BINS,), torch.int64),
    "errors": ((2,), torch.float64),
    "blocks": ((2, 256), torch.int64),
}


def _own(amax: Tensor) -> Tensor:
    return amax


def _nowhere(layer: str, role: str) -> bool:
    return False


@dataclass(frozen=True)
class Fault:
    """The first Inf or NaN of a step. ``phase``: forward, backward, or empty where that is not known."""

    kind: str
    layer: str
    role: str
    phase: str = ""
    micro_batch: int = -1

    def __str__(self) -> str:
        where = f" of micro-batch {self.micro_batch}" if self.micro_batch >= 0 else ""
        phase = f" ({self.phase}{where})" if self.phase else ""
        return f"{self.kind} in {self.role}{phase}"


class Counters:
    """Device-side counters. ``counting``: this step is sampled, if only its casts. ``replaying``: a forward is being
    recomputed.

    ``amax`` holds each row's amax of the current step, Inf or NaN included (before any saturating cast); ``fault``
    which rows saw a non-finite value, of which kind and in which micro-batch first. The first ``decisive`` rows are
    operands that a saturating cast would hide: a fault there skips the step; the others, seen on sampled steps only,
    explain a skip and never cause one, or watching a run would change it. ``quiet`` is set in evaluation: then backends
    neither count, nor stage, nor report. ``bypassed``: converted layers run as plain FP32 layers, as they do outside
    every region of their model (:mod:`mptrain.precision.regions`). ``order``: the place of each layer in the model.
    ``closed``: a backward ended, and the next forward is of another micro-batch. ``held_elsewhere``: of (layer, role),
    does another rank hold the same and count it? Such rows are ``muted`` here. ``share``: MAX over the ranks that hold
    parts of one operand, so that tensor-parallel ones have the scale of the whole.
    """

    def __init__(self) -> None:
        self.slots: list[tuple[str, str]] = []
        self.counting = False
        self.replaying = False
        self.quiet = False
        self.bypassed = True
        self.micro = 0
        self.closed = False
        self.turn = 0  # of the parts that large tensors are sampled by; a function of the step, as all is
        self.decisive = 0
        self.order: dict[str, int] = {}
        self.held_elsewhere: Callable[[str, str], bool] = _nowhere
        self.muted: set[int] = set()
        self.share: Callable[[Tensor], Tensor] = _own
        self.sums: dict[str, Tensor] = {}
        self._noted: set[int] = set()
        self.allocate(torch.device("cpu"))

    def __deepcopy__(self, memo: Any) -> Counters:
        """Itself: copies of a model run where the original does."""
        return self

    def __reduce__(self) -> Any:
        raise TypeError("a prepared model cannot be pickled: save model.state_dict(), and prepare a new model with it")

    def add(self, layer: str, roles: tuple[str, ...] = OPERANDS) -> dict[str, int]:
        """Reserve rows of a layer; returns role -> index of the row. Call before :meth:`allocate`."""
        first = len(self.slots)
        self.slots += [(layer, role) for role in roles]
        return {role: first + index for index, role in enumerate(roles)}

    def allocate(self, device: torch.device) -> None:
        """Make the small tables for the rows added so far."""
        n = len(self.slots)
        self.muted = {index for index, slot in enumerate(self.slots) if self.held_elsewhere(*slot)}
        self.device = device
        self.amax = torch.zeros(n, dtype=torch.float32, device=device)
        self.last_amax = self.amax
        self.scale = torch.ones(n, dtype=torch.float32, device=device)
        self.fault = torch.zeros(n, dtype=torch.int32, device=device)  # 0, or 1 + 2 * micro-batch + is it NaN

    def sample(self, names: Iterable[str] = tuple(SUMS)) -> None:
        """This step is sampled: make the tables of these sums."""
        self.counting = True
        n, kinds = len(self.slots), {name: SUMS[name] for name in names}
        self.sums = {name: torch.zeros(n, *shape, dtype=d, device=self.device) for name, (shape, d) in kinds.items()}
        self._noted.clear()

    def take(self) -> dict[str, Tensor]:
        """The sums of the sampled step, by name, on the device; sampling ends."""
        sums, self.sums, self.counting = self.sums, {}, False
        return sums

    def row(self, slot: int) -> dict[str, Tensor]:
        """Return what a cast of this row's tensor shall count, as fields of ``Statistics``; empty on unsampled steps.

        A backend casts a weight in every micro-batch of a step; it is counted in the first.
        """
        if (
            not self.counting
            or slot in self.muted
            or (self.micro and slot < self.decisive and self.slots[slot][1] == "weight")
        ):
            return {}
        return {name: self.sums[name][slot] for name in ("counts", "histogram") if name in self.sums}

    def observe_part(self, x: Tensor, slot: int, fmt: Format, scale: Tensor) -> None:
        """Add what a cast of ``x`` [..., K] costs in this row: errors and blocks, of :meth:`part_of` it."""
        tables = {name: self.sums[name][slot] for name in ("errors", "blocks") if name in self.sums}
        if tables:
            observe(self.part_of(x), Statistics(**tables), fmt=fmt, scale=scale)

    def part_of(self, x: Tensor) -> Tensor:
        """The part of ``x`` [..., K] for the statistics that are not counts: errors and blocks.

        They cost as much again as a histogram, and a ratio or a median needs no more than an eighth of a large tensor:
        each sampled step takes another one.
        """
        if x.numel() < SAMPLED_FROM or x.numel() < PARTS * x.shape[-1]:
            return x
        rows = x.reshape(-1, x.shape[-1])
        size = len(rows) // PARTS
        return rows.narrow(0, self.turn % PARTS * size, size)

    def note(self, slot: int, amax: Tensor) -> None:
        """A layer may run more than once: an Inf seen in its first call must outlive the second."""
        if slot in self._noted:
            amax = torch.maximum(self.amax[slot], amax)
        self._noted.add(slot)
        self.amax[slot] = amax

    def end_microbatch(self) -> None:
        """Remember which rows saw Inf or NaN in this micro-batch first."""
        if self.decisive or self.counting:
            self._blame()
        self.micro += 1
        self.closed = True

    def _blame(self) -> None:
        finite = self.amax.isfinite()
        if self.device.type == "cpu" and bool(finite.all()):  # a CPU reads for nothing
            return
        code = 1 + 2 * self.micro + self.amax.isnan().int()
        self.fault = torch.where(finite | (self.fault > 0), self.fault, code)

    def end_step(self) -> Tensor:
        """The step's faults (int32 [rows], see ``fault``); the next step starts clean."""
        if self.counting:
            self._blame()  # of the weights' gradients, seen after the last micro-batch
        fault, self.micro, self.last_amax = self.fault, 0, self.amax
        self._noted.clear()
        if self.decisive or self.counting:
            self.fault = torch.zeros_like(fault)
            self.amax = torch.zeros_like(self.amax)
        return fault

    def first_fault(self, fault: Tensor) -> Fault | None:
        """The non-finite value that came first: by micro-batch, forward in the model's order, backward from its end."""
        faults = [(index, code) for index, code in enumerate(fault.tolist()) if code]
        if not faults:
            return None

        def when(item: tuple[int, int]) -> tuple[int, ...]:
            layer, role = self.slots[item[0]]
            micro, place = (item[1] - 1) // 2, self.order.get(layer, 0)
            if role in BACKWARD:
                return micro, 1, -place, BACKWARD.index(role)
            return micro, 0, place, FORWARD_RANK.get(role, 3)

        index, code = min(faults, key=when)
        layer, role = self.slots[index]
        phase = "backward" if role in BACKWARD else "forward"
        micro = -1 if role == "grad_weight" else (code - 1) // 2  # they add up over the micro-batches
        return Fault("NaN" if (code - 1) % 2 else "Inf", layer, role, phase, micro)

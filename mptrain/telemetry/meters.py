"""Throughput and memory, measured the same way for every precision.

Memory is the allocator's peak on a GPU. A CPU has no such allocator, and RSS holds the interpreter, libraries and freed
pages, so there it is the peak of live tensor bytes over one whole training step: :mod:`mptrain.memory.training.live`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from mptrain.distributed import local
from mptrain.memory.training import live

GIB = 2**30
NOTHING = nullcontext()
MEMORY_STEP = 1  # the second step: optimizer state exists, and warm-up is not over
REBUILT_STEP = 2  # DDP makes its buckets again in the second step's forward (torch 2.13, static_graph)
WARMUP_STEPS = 3  # kernels chosen, optimizer state allocated, memory measured: none of it is the speed of training


class Throughput:
    """Tokens (or images) per second from the median step after warm-up; evaluation and checkpoints are not in it."""

    def __init__(self, tokens_per_step: int) -> None:
        self.tokens_per_step = tokens_per_step
        self.seconds: list[float] = []

    def add(self, seconds: float) -> None:
        self.seconds.append(seconds)

    def tokens_per_s(self, *, first: int = 0, last: int = 0) -> float:
        """Over the ``first`` steps, the ``last`` ones, or all (0). NaN before the first step."""
        end = min(first, len(self.seconds)) if first else len(self.seconds)
        begin = WARMUP_STEPS if end > WARMUP_STEPS else 0
        timed = self.seconds[max(begin, end - last) if last else begin : end]
        return self.tokens_per_step / statistics.median(timed) if timed else float("nan")


class PeakMemory:
    """The peak of a run in GiB: the allocator's on a GPU, of live tensors over one early step on a CPU; NaN before.

    ``roles_gib``: what was alive at the peak, by the roles of :mod:`mptrain.memory.training.live`. ``others``: role ->
    tensors that live from step to step beside the model's and the optimizer's. On a GPU all that is not weights,
    gradients and moments is one, the rest of the allocator's peak.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.others: Mapping[str, Iterable[Tensor]] = {}
        self._meter: live.LiveBytes | None = None
        self.measuring = False  # is this step the one that is measured?
        self.peak_gib = float("nan")
        self.roles_gib: dict[str, float] = {}

    def start(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def end(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if self._device.type != "cuda":
            return
        self.peak_gib = torch.cuda.max_memory_allocated(self._device) / GIB
        sizes = {
            role: sum(t.nbytes for t in tensors) / GIB for role, tensors in live.resident(model, optimizer).items()
        }
        sizes["gradients"] = sum(local(p.detach()).nbytes for p in model.parameters() if p.requires_grad) / GIB
        self.roles_gib = sizes | {"activations and workspace": max(0.0, self.peak_gib - sum(sizes.values()))}

    def due(
        self, steps_done: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer
    ) -> AbstractContextManager[None]:
        """Return the context of the next step: on a CPU :meth:`measured` for one, as soon as it can be."""
        if not math.isnan(self.peak_gib) or self._device.type != "cpu":
            return NOTHING
        if steps_done < (REBUILT_STEP if self.others.get("communication") else MEMORY_STEP):
            return NOTHING
        return self.measured(model, optimizer)

    @contextmanager
    def measured(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Around a step on a CPU: live bytes (:mod:`mptrain.memory.training.live`). Call :meth:`updating` within."""
        with live.watched({**live.resident(model, optimizer), **self.others}, model) as meter:
            self._meter, self.measuring = meter, True
            yield
        self._meter, self.measuring = None, False
        roles = live.by_role(max(meter.peaks.values(), key=lambda peak: sum(peak.values())))
        self.roles_gib = {role: size / GIB for role, size in roles.items() if size}
        self.peak_gib = sum(self.roles_gib.values())

    def updating(self) -> None:
        """The gradients are there, and the optimizer's part of the step begins."""
        if self._meter is not None:
            self._meter.at(live.UPDATE)

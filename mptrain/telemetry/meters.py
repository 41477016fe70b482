"""Throughput and memory, measured the same way for every precision.

Memory is the allocator's peak on a GPU. A CPU has no such allocator, and RSS holds the interpreter, libraries and
freed pages, so there it is the peak of live tensor bytes over one whole training step, tracked storage by storage.
"""

from __future__ import annotations

import math
import statistics
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mptrain import kernels

GIB = 2**30
MEMORY_STEP = 1  # the second step: optimizer state exists, and warm-up is not over
WARMUP_STEPS = 3  # kernels chosen, optimizer state allocated, memory measured: none of it is the speed of training

# Dense peak rates in TFLOP/s, vendor figures. MFU is against the peak of the format the GEMMs really ran in.
PEAK_TFLOPS = {
    "H100": {"fp8": 1979.0, "bf16": 989.0, "fp16": 989.0, "tf32": 494.0, "fp32": 67.0},
    "H200": {"fp8": 1979.0, "bf16": 989.0, "fp16": 989.0, "tf32": 494.0, "fp32": 67.0},
    "A100": {"bf16": 312.0, "fp16": 312.0, "tf32": 156.0, "fp32": 19.5},
}


def peak_tflops(device: torch.device, fmt: str) -> float | None:
    """The device's dense peak for a GEMM format (fp8, bf16, ...), None where none is known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    rates = next((rates for card, rates in PEAK_TFLOPS.items() if card in name), {})
    return rates.get(fmt)


def weighted_peak_tflops(device: torch.device, coverage: Mapping[str, float]) -> float | None:
    """The peak of a step whose GEMM FLOPs ran in several formats: 1 / sum(share / peak), None if a peak is unknown.

    ``coverage``: format -> share, as :attr:`mptrain.telemetry.coverage.Audit.coverage`; claimed shares count as theirs.
    """
    seconds = 0.0  # per TFLOP
    for name, share in coverage.items():
        peak = peak_tflops(device, name.removesuffix(" claimed"))
        if peak is None:
            return None
        seconds += share / peak
    return 1.0 / seconds if seconds else None


class Throughput:
    """Tokens (or images) per second from the median step after warm-up; evaluation and checkpoints are not in it."""

    def __init__(self, tokens_per_step: int) -> None:
        self.tokens_per_step = tokens_per_step
        self.seconds: list[float] = []

    def add(self, seconds: float) -> None:
        self.seconds.append(seconds)

    def tokens_per_s(self, *, first: int = 0, last: int = 0) -> float:
        """Over the ``first`` steps, the ``last`` ones, or all (0). NaN before the first step."""
        seconds = self.seconds[:first] if first else self.seconds
        timed = (seconds[WARMUP_STEPS:] or seconds)[-last:]
        return self.tokens_per_step / statistics.median(timed) if timed else float("nan")


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Peak bytes of live tensor storages while active; ``resident`` tensors (weights, moments) count from the start.

    Every storage an operator returns is counted once, until Python and autograd let go of it. Work space inside an
    operator is not seen.
    """

    def __init__(self, resident: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self._known: set[int] = set()
        for tensor in resident:
            self._track(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._track(leaf)
        return out

    def _track(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


class PeakMemory:
    """The peak of a run in GiB: the allocator's on a GPU, of live tensors over one early step on a CPU; NaN before."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.peak_gib = float("nan")

    def start(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def end(self) -> None:
        if self._device.type == "cuda":
            self.peak_gib = torch.cuda.max_memory_allocated(self._device) / GIB

    def due(self, steps_done: int) -> bool:
        """Is the next step to be run under :meth:`measured`? One is, on a CPU, as soon as it can be."""
        return steps_done >= MEMORY_STEP and self._device.type == "cpu" and math.isnan(self.peak_gib)

    @contextmanager
    def measured(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Around the forward and backward of a step on a CPU: live bytes, by :class:`LiveBytes`."""
        with kernels.onlooker(), LiveBytes(resident_tensors(model, optimizer)) as meter:
            yield
        self.peak_gib = meter.peak / GIB


def resident_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Weights, buffers, gradients and optimizer state: what lives from step to step."""
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    tensors += [p.grad for p in model.parameters() if p.grad is not None]
    tensors += [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return tensors

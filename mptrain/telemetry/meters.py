"""Throughput and memory, measured the same way for every precision.

Memory is the allocator's peak on a GPU. A CPU has no such allocator, and RSS holds the interpreter, libraries and
freed pages, so there it is the peak of live tensor bytes over one whole training step, tracked storage by storage.
"""

from __future__ import annotations

import math
import statistics
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mptrain import kernels
from mptrain.distributed import local

GIB = 2**30
MEMORY_STEP = 1  # the second step: optimizer state exists, and warm-up is not over
ROLES = ("weights", "gradients", "moments", "activations", "workspace")
WARMUP_STEPS = 3  # kernels chosen, optimizer state allocated, memory measured: none of it is the speed of training

# Dense peak rates in TFLOP/s, vendor figures. MFU is against the peak of the format the GEMMs really ran in.
PEAK_TFLOPS = {
    "H100": {"fp8": 1979.0, "bf16": 989.0, "fp16": 989.0, "tf32": 494.0, "fp32": 67.0},
    "H200": {"fp8": 1979.0, "bf16": 989.0, "fp16": 989.0, "tf32": 494.0, "fp32": 67.0},
    "A100": {"bf16": 312.0, "fp16": 312.0, "tf32": 156.0, "fp32": 19.5},
}


def peaks(device: torch.device) -> dict[str, float]:
    """The device's dense peaks in TFLOP/s by GEMM format (fp8, bf16, ...); empty where none are known."""
    if device.type != "cuda":
        return {}
    name = torch.cuda.get_device_name(device)
    return next((rates for card, rates in PEAK_TFLOPS.items() if card in name), {})


def peak_tflops(device: torch.device, fmt: str) -> float | None:
    """The device's dense peak for a GEMM format, None where none is known."""
    return peaks(device).get(fmt)


def weighted_rate(rates: Mapping[str, float], coverage: Mapping[str, float]) -> float | None:
    """The rate of a step whose GEMM FLOPs ran in several formats: 1 / sum(share / rate), None if a rate is unknown.

    ``coverage``: format -> share, as :attr:`mptrain.telemetry.coverage.Audit.coverage`; claimed shares count as theirs.
    """
    seconds = 0.0  # per FLOP, in the unit of the rates
    for name, share in coverage.items():
        rate = rates.get(name.removesuffix(" claimed"))
        if rate is None:
            return None
        seconds += share / rate
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
    """Bytes of live tensor storages while active, by role; ``resident`` (role -> tensors) counts from the start.

    Every storage an operator returns is counted once, until Python and autograd let go of it, as ``workspace`` until
    :meth:`claim` says what it is. Work space inside an operator is not seen.
    """

    def __init__(self, resident: Mapping[str, Iterable[Tensor]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._total = self._most = 0
        self._role: dict[int, str] = {}
        for role, tensors in resident.items():
            for tensor in tensors:
                self._track(tensor, role)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and not hasattr(leaf, "placements"):  # the parts of a sharded one come by here
                self._track(leaf, "workspace")
        return out

    def claim(self, tensor: Tensor, role: str) -> None:
        """What was work space is known to be of this role."""
        storage = tensor.untyped_storage()
        if self._role.get(storage._cdata) == "workspace":
            self._role[storage._cdata] = role
            self.live["workspace"] -= storage.nbytes()
            self.live[role] += storage.nbytes()
            if self._total == self._most:
                self.peak = self.live.copy()

    def _track(self, tensor: Tensor, role: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._role:
            return
        size = storage.nbytes()
        self._role[key] = role
        self.live[role] += size
        self._total += size
        if self._total > self._most:
            self._most, self.peak = self._total, self.live.copy()
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self.live[self._role.pop(key)] -= size
        self._total -= size


class PeakMemory:
    """The peak of a run in GiB: the allocator's on a GPU, of live tensors over one early step on a CPU; NaN before.

    ``roles_gib``: what was alive at the peak. Activations are what autograd saved for backward, low-precision copies
    of the weights among it; workspace is everything else. On a GPU both are one, the rest of the allocator's peak.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.peak_gib = float("nan")
        self.roles_gib: dict[str, float] = {}

    def start(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def end(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if self._device.type != "cuda":
            return
        self.peak_gib = torch.cuda.max_memory_allocated(self._device) / GIB
        sizes = {role: sum(t.nbytes for t in tensors) / GIB for role, tensors in resident(model, optimizer).items()}
        sizes["gradients"] = sum(local(p.detach()).nbytes for p in model.parameters() if p.requires_grad) / GIB
        self.roles_gib = sizes | {"activations and workspace": max(0.0, self.peak_gib - sum(sizes.values()))}

    def due(self, steps_done: int) -> bool:
        """Is the next step to be run under :meth:`measured`? One is, on a CPU, as soon as it can be."""
        return steps_done >= MEMORY_STEP and self._device.type == "cpu" and math.isnan(self.peak_gib)

    @contextmanager
    def measured(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Around the forward and backward of a step on a CPU: live bytes, by :class:`LiveBytes`."""
        meter = LiveBytes(resident(model, optimizer))

        def saved(tensor: Tensor) -> Tensor:
            meter.claim(tensor, "activations")
            return tensor

        def accumulated(parameter: Tensor) -> None:
            if parameter.grad is not None:
                meter.claim(local(parameter.grad), "gradients")

        trained = [p for p in model.parameters() if p.requires_grad]
        hooks = [p.register_post_accumulate_grad_hook(accumulated) for p in trained]  # type: ignore[no-untyped-call]
        try:
            with kernels.onlooker(), meter, torch.autograd.graph.saved_tensors_hooks(saved, lambda tensor: tensor):
                yield
        finally:
            for hook in hooks:
                hook.remove()
        self.roles_gib = {role: meter.peak[role] / GIB for role in ROLES}
        self.peak_gib = sum(self.roles_gib.values())


def resident(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, list[Tensor]]:
    """What lives from step to step, by role."""
    state = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    gradients = [local(p.grad) for p in model.parameters() if p.grad is not None]
    weights = [local(p.detach()) for p in model.parameters()]
    return {"weights": [*weights, *model.buffers()], "gradients": gradients, "moments": state}

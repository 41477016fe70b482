"""Bytes of live tensors by role, as one training step runs: on real tensors a measurement, on fake ones a plan.

Every storage that an operator returns and was not given is counted, until Python and autograd let go of it. Work space
inside an operator is not seen. What a checkpointed block computes again in backward is workspace.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mptrain import kernels
from mptrain.distributed import local
from mptrain.distributed.layout import FEEDBACK, DistConfig

ROLES = (
    "weights",  # the parameters (FP32 masters, unless optim.weights says otherwise) and buffers
    "gradients",
    "moments",  # all that the optimizer keeps
    "average",  # of the weights (optim.ema_decay)
    "weight copies",  # what a product takes in the weight's place: autocast's casts, FP8 codes
    "activations",  # what autograd saved for backward
    "communication",  # DDP's buckets, weights that FSDP gathered, and what both send
    "workspace",  # everything else
)
FORWARD, EARLY, LATE, UPDATE = "forward", "early backward", "late backward", "optimizer step"
WINDOWS = (FORWARD, EARLY, LATE, UPDATE)
"""Windows of a step; backward is late once half of the gradients are there. In each, memory grows evenly with depth."""

GATHERED = "gathered"  # by FSDP, into storages that it resizes
CODES = " (8 bits)"  # behind the name of an operator that made such

Bytes = Counter[tuple[str, str]]  # (role, the operator that made it) -> bytes


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """``resident`` (role -> tensors) counts from the start. ``peaks``: what was alive at the peak of each window."""

    def __init__(self, resident: Mapping[str, Iterable[Tensor]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.window = FORWARD
        self.peaks: dict[str, Bytes] = {}
        self._live: Bytes = Counter()
        self._total, self._most = 0, dict.fromkeys(WINDOWS, -1)
        self._known: dict[int, tuple[str, str, int]] = {}  # storage -> role, operator, bytes
        self._resize = torch.UntypedStorage.resize_
        for role, tensors in resident.items():
            for tensor in tensors:
                self._track(tensor.untyped_storage(), role, "")

    def __enter__(self) -> Any:
        meter, resize = self, self._resize

        def resized(storage: torch.UntypedStorage, size: int) -> Any:  # how FSDP frees what it has gathered
            out = resize(storage, size)
            meter._forget(storage._cdata)
            meter._track(storage, "communication", GATHERED)
            return out

        torch.UntypedStorage.resize_ = resized  # type: ignore[method-assign,assignment]
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and not hasattr(leaf, "placements"):  # the parts of a sharded one come by here
                storage = leaf.untyped_storage()
                if storage._cdata not in self._known:
                    self._see(storage, leaf, func, args, kwargs)
        return out

    def _see(self, storage: torch.UntypedStorage, made: Tensor, func: Any, args: Any, kwargs: Any) -> None:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(not hasattr(t, "placements") and t.untyped_storage()._cdata == storage._cdata for t in given):
            return  # it was there before: the batch, a bucket of DDP's
        made_by = func.overloadpacket.__name__ + (CODES if made.element_size() == 1 else "")
        self._track(storage, self._role_of(func, given, made), made_by)

    def claim(self, tensor: Tensor, role: str) -> None:
        """Note that what was work space is of this role."""
        key = tensor.untyped_storage()._cdata
        known, made_by, size = self._known.get(key, ("", "", 0))
        if known == "workspace":
            self._known[key] = role, made_by, size
            self._live[known, made_by] -= size
            self._live[role, made_by] += size
            self._at_most()

    def at(self, window: str) -> None:
        """The step is in this window from now on."""
        self.window = window
        self._at_most()

    def _role_of(self, func: Any, given: list[Tensor], made: Tensor) -> str:
        """A copy of a weight is what an operator makes of one weight alone, element for element."""
        if func.namespace in ("fsdp", "c10d", "_c10d_functional"):
            return "communication"
        if len(given) != 1 or given[0].numel() != made.numel() or hasattr(given[0], "placements"):
            return "workspace"
        source, made_by, _ = self._known.get(given[0].untyped_storage()._cdata, ("", "", 0))
        gathered = source == "communication" and made_by == GATHERED
        return "weight copies" if gathered or source in ("weights", "weight copies") else "workspace"

    def _track(self, storage: torch.UntypedStorage, role: str, made_by: str) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or not size:
            return
        self._known[key] = role, made_by, size
        self._live[role, made_by] += size
        self._total += size
        self._at_most()
        weakref.finalize(storage, self._forget, key)

    def _at_most(self) -> None:
        if self._total >= self._most[self.window]:
            self._most[self.window] = self._total
            self.peaks[self.window] = self._live.copy()

    def _forget(self, key: int) -> None:
        role, made_by, size = self._known.pop(key, ("", "", 0))
        if size:
            self._live[role, made_by] -= size
            self._total -= size


@contextmanager
def watched(resident: Mapping[str, Iterable[Tensor]], model: nn.Module) -> Iterator[LiveBytes]:
    """Around a training step of ``model``: call ``at(UPDATE)`` on the meter before the optimizer's part of it."""
    meter = LiveBytes(resident)
    trained = [p for p in model.parameters() if p.requires_grad]
    accumulated = 0

    def save(tensor: Tensor) -> Tensor:
        nonlocal accumulated
        if meter.window != FORWARD:  # of the next micro-batch
            meter.window, accumulated = FORWARD, 0
        meter.claim(tensor, "activations")
        return tensor

    def unpack(tensor: Tensor) -> Tensor:
        if meter.window == FORWARD:
            meter.at(LATE if 2 * accumulated > len(trained) else EARLY)
        return tensor

    def accumulate(parameter: Tensor) -> None:
        nonlocal accumulated
        accumulated += 1
        if meter.window == EARLY and 2 * accumulated > len(trained):
            meter.at(LATE)
        if parameter.grad is not None:
            meter.claim(local(parameter.grad), "gradients")

    hooks = [p.register_post_accumulate_grad_hook(accumulate) for p in trained]  # type: ignore[no-untyped-call]
    try:
        with kernels.onlooker(), meter, torch.autograd.graph.saved_tensors_hooks(save, unpack):
            yield meter
    finally:
        for hook in hooks:
            hook.remove()


def resident(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, list[Tensor]]:
    """List what lives from step to step, by role."""
    state = [
        local(value) for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)
    ]
    gradients = [local(p.grad) for p in model.parameters() if p.grad is not None]
    weights = [local(p.detach()) for p in model.parameters()]
    return {"weights": [*weights, *model.buffers()], "gradients": gradients, "moments": state}


def buckets_of(model: nn.Module, config: DistConfig, device: torch.device | None = None) -> list[Tensor]:
    """Make as many bytes as DDP's buckets, which are there from the first step to the last; its gradients are views of
    them.

    A compression that keeps what it lost for the next step keeps as much again.

    ``device``: meta, where the true ones are there beside them. Empty without DDP.
    """
    if config.kind != "ddp":
        return []
    copies = 2 if config.compress in FEEDBACK else 1
    return [torch.empty_like(p, device=device) for _ in range(copies) for p in model.parameters() if p.requires_grad]


def by_role(peak: Bytes) -> dict[str, int]:
    """Bytes of every role, in the order of :data:`ROLES`."""
    sizes = dict.fromkeys(ROLES, 0)
    for (role, _), size in peak.items():
        sizes[role] += size
    return sizes

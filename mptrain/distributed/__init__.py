"""Ranks, and what all of them must agree on. One process is a world of one: the same calls, and nothing is sent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mptrain.tools.launcher import world_size

Agree = Callable[[Tensor], Tensor]  # elementwise MAX over the ranks that share a tensor
T = TypeVar("T")


def joined() -> bool:
    """Tell whether this process is one of several in a process group."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def may_join() -> bool:
    """Tell whether this process is, or is going to be, in a process group. torchrun announces one that is not there
    yet.
    """
    return dist.is_available() and (dist.is_initialized() or world_size() > 1)


class Ranks:
    """All ranks of a run; this class is the world of a single one. All ranks call its collectives, in one order."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Tell whether this is the rank that writes."""
        return self.rank == 0

    def max(self, value: Tensor) -> Tensor:
        """Elementwise MAX; the same shape, dtype and device."""
        return value

    def sum(self, value: Tensor) -> Tensor:
        """Elementwise SUM; likewise."""
        return value

    def counts(self, tensor: Tensor) -> bool:
        """Tell whether what this rank holds of ``tensor`` is to be counted, so that each element counts once."""
        return True

    def gather(self, value: T) -> list[T]:
        """The plain value (anything picklable) of every rank, by rank, on all of them."""
        return [value]

    def share(self, value: T) -> T:
        """Rank 0's value."""
        return value

    def by_first(self, make: Callable[[], T]) -> T:
        """Return what rank 0 makes, on all of them; an error there is an error of all, told once (:class:`Told`)."""
        return make()

    def barrier(self) -> None:
        """Wait for all."""


class Told(ValueError):
    """An error that rank 0 tells."""


class World(Ranks):
    """The ranks of the process group."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def max(self, value: Tensor) -> Tensor:
        return self._reduced(value, dist.ReduceOp.MAX)

    def sum(self, value: Tensor) -> Tensor:
        return self._reduced(value, dist.ReduceOp.SUM)

    @staticmethod
    def _reduced(value: Tensor, operation: Any) -> Tensor:
        sent = value.int() if value.dtype is torch.bool else value.clone()
        dist.all_reduce(sent, operation)
        return sent.to(value.dtype)

    def counts(self, tensor: Any) -> bool:
        """Tell whether it counts here: on the first rank that holds the part; a plain tensor on rank 0."""
        if not hasattr(tensor, "placements"):
            return self.first
        mesh = tensor.device_mesh
        replicated = [dim for dim, place in enumerate(tensor.placements) if place.is_replicate()]
        return bool((mesh.mesh == 0).any()) and all(mesh.get_local_rank(dim) == 0 for dim in replicated)

    def gather(self, value: T) -> list[T]:
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def share(self, value: T) -> T:
        held = [value]
        dist.broadcast_object_list(held, src=0)
        return held[0]

    def by_first(self, make: Callable[[], T]) -> T:
        made: Any = None
        error: Exception | None = None
        if self.first:
            try:
                made = make()
            except Exception as raised:
                error = raised
        failed, made_there = self.share((error is not None, made))
        if error is not None:
            raise error
        if failed:
            raise Told("rank 0 says why")
        value: T = made_there
        return value

    def barrier(self) -> None:
        dist.barrier()


ALONE = Ranks()


def among(group: dist.ProcessGroup) -> Agree:
    """MAX over the ranks of ``group``."""

    def agree(value: Tensor) -> Tensor:
        sent = value.clone()
        dist.all_reduce(sent, dist.ReduceOp.MAX, group=group)
        return sent

    return agree


def local(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor: its shard of a DTensor, a plain one itself (DTensor takes 1 s to
    import).
    """
    held: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return held


def like(held: Tensor, model: Any) -> Tensor:
    """``held``, this rank's part, as a tensor sharded like ``model``; itself if that one is plain."""
    if not hasattr(model, "placements"):
        return held
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        held, model.device_mesh, model.placements, run_check=False, shape=model.shape, stride=model.stride()
    )

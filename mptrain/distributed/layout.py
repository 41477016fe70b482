"""How the ranks are arranged: ``dist=single|ddp|fsdp|hsdp`` and ``dist.tp=N``, as one device mesh.

The mesh is replicas x shards x tensor parallel, the last next to each other: they talk in every layer. A step's samples
are those of one process with the same settings: the ranks share its micro-batches out among them, so that each is cast
and scaled as it would be there, and only where they do not go round is a micro-batch itself cut up.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from mptrain.tools.settings import require

KINDS = ("single", "ddp", "fsdp", "hsdp")
COMPRESSIONS = ("none", "bf16", "fp16", "fp8", "powersgd")
FEEDBACK = ("fp8", "powersgd")  # those that keep what was lost, in FP32, for the next step
GATHERS = ("compute", "fp32")
REPLICAS, SHARDS, PARTS = "replicas", "shards", "parts"  # the dimensions of the mesh


@dataclass(frozen=True)
class DistConfig:
    """``kind``: single (one copy of the model), ddp (one a rank), fsdp (one, sharded), hsdp (``replicas`` sharded ones,
    0: one a node). ``tp``: ranks that share each matrix product. ``compress``: the format of gradients between ddp's
    ranks. ``gather``: that of fsdp's weights, the format the layer computes in or fp32. ``timeout_s``: how long ranks
    wait for each other before the run is ended."""

    kind: str = "single"
    tp: int = 1
    replicas: int = 0
    compress: str = "none"
    gather: str = "compute"
    timeout_s: int = 600

    def __post_init__(self) -> None:
        require(self.kind in KINDS, "dist.kind", self.kind, f"one of {', '.join(KINDS)}")
        require(self.tp >= 1, "dist.tp", self.tp, "at least 1")
        require(self.replicas >= 0, "dist.replicas", self.replicas, "0 (one a node) or more")
        require(self.compress in COMPRESSIONS, "dist.compress", self.compress, f"one of {', '.join(COMPRESSIONS)}")
        require(self.gather in GATHERS, "dist.gather", self.gather, f"one of {', '.join(GATHERS)}")
        require(self.timeout_s >= 1, "dist.timeout_s", self.timeout_s, "at least 1")
        if self.kind == "ddp" and self.tp > 1:
            raise ValueError(f"dist=ddp replicates whole models: use dist=hsdp (or fsdp) with dist.tp={self.tp}")
        if self.compress != "none" and self.kind != "ddp":
            raise ValueError(
                f"dist.compress={self.compress} is for dist=ddp; fsdp reduces in the format of precision.reduce"
            )


@dataclass(frozen=True)
class Share:
    """A rank's share of each step: ``accumulate`` micro-batches of ``batch_size`` samples, as number ``rank`` of the
    ``size`` that see different samples. ``first_part``: of the ranks that see the same, is this the first?"""

    batch_size: int
    accumulate: int
    rank: int = 0
    size: int = 1
    first_part: bool = True


@dataclass(frozen=True)
class Layout:
    """``replicas`` x ``shards`` x ``parts`` ranks; all 1 for one process."""

    replicas: int = 1
    shards: int = 1
    parts: int = 1

    @classmethod
    def of(cls, config: DistConfig, size: int) -> Layout:
        """ValueError if ``size`` processes cannot be arranged like this, with what would do."""
        if size % config.tp:
            raise ValueError(
                f"dist.tp={config.tp} does not divide the {size} processes: start a multiple of {config.tp}"
            )
        rest = size // config.tp
        if config.kind == "single" and rest > 1:
            tp = "" if config.tp == 1 else f" of dist.tp={config.tp} each"
            raise ValueError(
                f"{size} processes, and dist=single trains one model{tp}: add dist=ddp (a copy a process) or dist=fsdp "
                "(sharded), or start it without torchrun"
            )
        if config.kind != "hsdp":
            return cls(rest if config.kind == "ddp" else 1, rest if config.kind == "fsdp" else 1, config.tp)
        replicas = config.replicas or max(1, size // int(os.environ.get("LOCAL_WORLD_SIZE", size)))
        if rest % replicas:
            raise ValueError(f"dist.replicas={replicas} does not divide {rest} ranks: choose a divisor")
        return cls(replicas, rest // replicas, config.tp)

    @property
    def data_parallel(self) -> int:
        """Ranks that see different samples."""
        return self.replicas * self.shards

    def share(self, batch_size: int, accumulate: int, rank: int) -> Share:
        """Return the share of rank number ``rank`` in a step of batch_size * accumulate samples.

        ValueError if that number cannot be shared out evenly.
        """
        ranks, place = self.data_parallel, rank // self.parts
        first = rank % self.parts == 0
        if accumulate % ranks == 0:
            return Share(batch_size, accumulate // ranks, place, ranks, first)
        each, rest = divmod(batch_size * accumulate, ranks)
        if rest:
            raise ValueError(
                f"a step of {batch_size} x {accumulate} samples cannot be shared out among {ranks} ranks: choose "
                f"trainer.accumulate={-(-accumulate // ranks) * ranks}, or trainer.batch_size a multiple of {ranks}"
            )
        size = max(size for size in range(1, min(batch_size, each) + 1) if each % size == 0)
        return Share(size, each // size, place, ranks, first)

    def mesh(self, device: torch.device) -> DeviceMesh:
        """A collective: every rank makes it."""
        shape, names = (self.replicas, self.shards, self.parts), (REPLICAS, SHARDS, PARTS)
        return init_device_mesh(device.type, shape, mesh_dim_names=names)

    def __str__(self) -> str:
        sizes = ((self.replicas, "replicas"), (self.shards, "shards"), (self.parts, "tensor-parallel parts"))
        return " x ".join(f"{size} {name}" for size, name in sizes if size > 1) or "one process"

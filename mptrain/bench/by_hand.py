"""A hand-written training loop for several ranks, in plain torch: the reference for the trainer's steps.

The same model, data, wrappers and arithmetic, nothing else: no check of the gradients for Inf, no agreement
between ranks, no meters.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from mptrain.bench.cpu import CLIP, LR
from mptrain.build.preflight import Prepared


class ByHand:
    """A model under ``ddp`` or ``fsdp``, BF16 by autocast; ``scale``: a loss scale that is left in the gradients."""

    def __init__(self, wrapper: str, prepared: Prepared, scale: float = 1.0) -> None:
        config, ranks = prepared.config, prepared.ranks
        torch.manual_seed(config.seed)
        self.device, self.data, self.scale, self.seed = prepared.device, prepared.data, scale, config.seed
        self.model: nn.Module = prepared.model_module.build(prepared.model_config).to(self.device)
        self.wrapped: Any = self._sharded(ranks.size) if wrapper == "fsdp" else self._replicated()
        self.optimizer = AdamW(self.model.parameters(), lr=LR, weight_decay=0.1, fused=True)
        self.parameters = list(self.model.parameters())
        share = prepared.layout.share(config.trainer.batch_size, config.trainer.accumulate, ranks.rank)
        self.micro_batches = share.accumulate
        self.sizes = {"microbatches": share.accumulate, "batch_size": share.batch_size, "seed": config.seed}
        self.sizes |= {"rank": share.rank, "world_size": share.size}
        self.done = 0

    @property
    def ddp(self) -> DistributedDataParallel:
        assert isinstance(self.wrapped, DistributedDataParallel)
        return self.wrapped

    def _replicated(self) -> DistributedDataParallel:
        return DistributedDataParallel(self.model, static_graph=True, gradient_as_bucket_view=True)

    def _sharded(self, ranks: int) -> nn.Module:
        mesh = init_device_mesh(self.device.type, (ranks,))
        wide = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        narrow = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        blocks: Any = self.model.blocks
        for block in blocks:
            fully_shard([block.norm1, block.norm2], mesh=mesh, mp_policy=wide)
            fully_shard(block, mesh=mesh, mp_policy=narrow)
        fully_shard(self.model, mesh=mesh, mp_policy=wide)
        return self.model

    def step(self) -> None:
        """Run one optimizer step."""
        alone = getattr(self.wrapped, "no_sync", nullcontext) if self.done else nullcontext  # a static graph is learned
        for micro in range(self.micro_batches):
            batch = self.data.batch(self.done, micro=micro, **self.sizes)
            tensors = {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}
            with alone() if micro < self.micro_batches - 1 else nullcontext():
                with torch.autocast(self.device.type, dtype=torch.bfloat16):
                    loss = self.wrapped(**tensors)
                (loss * (self.scale / self.micro_batches)).backward()
        nn.utils.clip_grad_norm_(self.parameters, CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1

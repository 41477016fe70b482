"""PowerSGD (Vogels et al. 2019) as torch has it, so that it can be saved, and that no step spoils it for good.

Of a matrix M two thin factors are summed over the ranks: ``P = M Q``, made orthogonal, then ``Q = M^T P``; vectors, and
matrices that would not become at least 2 times smaller, are summed as they are. The first two steps are plain, as torch
requires. Around torch's hook: errors are held by parameter, and of a step with an Inf or NaN in a bucket its errors and
Q are forgotten, where torch would carry the NaN in its memory for ever.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

from mptrain import kernels
from mptrain.distributed import Ranks
from mptrain.distributed.residuals import Residuals, used_here

if TYPE_CHECKING:
    from torch._C._distributed_c10d import GradBucket  # torch.distributed does not export it to checkers

RANK = 2
START = 2  # the first step that is compressed; torch requires 2
# Added to the norms of columns: without it a zero gradient is divided by zero. The seed of what a column is made of
# again after it was zero (for with Q = 0 nothing of M would ever arrive again), far below any gradient otherwise.
TINY = 1e-16


class LowRank:
    """Sends buckets as above."""

    def __init__(self, ranks: Ranks, residuals: Residuals) -> None:
        self.ranks, self.residuals = ranks, residuals
        self._state: Any = PowerSGDState(None, RANK, START, orthogonalization_epsilon=TINY)
        self._layouts: dict[int, str] = {}
        self._factors: dict[str, dict[str, Any]] = {}  # loaded, of layouts that did not come yet
        self._seeds: dict[int, Tensor] = {}

    def send(self, bucket: GradBucket) -> tuple[torch.futures.Future[Tensor], float]:
        """The mean, in the bucket's buffer, and the bytes that this rank sends to others in ring all-reduces."""
        state, index, buffer = self._state, bucket.index(), bucket.buffer()
        share = 2.0 * (self.ranks.size - 1) / self.ranks.size * buffer.element_size()
        if state.iter < START:
            return powerSGD_hook(state, bucket), share * buffer.numel()
        self._recall(bucket)
        residual = self.residuals.of(bucket)
        before = state.q_memory_dict[index].clone() if index in state.q_memory_dict else None
        state.error_dict[index] = residual
        elements = -state.total_numel_after_compression
        future = powerSGD_hook(state, bucket)
        elements += state.total_numel_after_compression
        seed = self._seed(index, state.q_memory_dict[index])

        def remember(done: torch.futures.Future[Tensor]) -> Tensor:
            result, q, lost = done.value(), state.q_memory_dict[index], state.error_dict.pop(index)
            fine = kernels.amax(result).isfinite()
            used_here(q, lost, seed, *([] if before is None else [before]))
            torch.where(fine, lost, residual, out=residual)
            q.copy_(torch.where(fine, torch.where(q == 0, seed, q), seed if before is None else before))
            return result

        return future.then(remember), share * elements

    def _recall(self, bucket: GradBucket) -> None:
        """Give torch the factors of what is in this bucket now; it makes new ones where there are none."""
        index, layout = bucket.index(), self.residuals.layout(bucket)
        if self._layouts.get(index) == layout:
            return
        self._layouts[index] = layout
        self._state.p_memory_dict.pop(index, None)
        self._state.q_memory_dict.pop(index, None)
        if found := self._factors.pop(layout, None):
            self._state.q_memory_dict[index] = found["q"].clone()
            self._state.p_memory_dict[index] = found["q"].new_empty(found["p"])  # its values are always new

    def _seed(self, index: int, like: Tensor) -> Tensor:
        """Tiny random numbers in the place of zeros: the same on all ranks and at any step."""
        held = self._seeds.get(index)
        if held is None or held.numel() != like.numel():
            noise = torch.randn(like.numel(), generator=torch.Generator().manual_seed(index)) * TINY
            held = self._seeds[index] = noise.to(like)
        return held

    def state_dict(self) -> dict[str, Any]:
        """Q and the size of P by what is in the bucket; step; the random numbers that make new ones."""
        state = self._state
        held = {
            layout: {"q": state.q_memory_dict[index], "p": state.p_memory_dict[index].numel()}
            for index, layout in self._layouts.items()
            if index in state.q_memory_dict
        }
        _, keys, position, *_ = state.rng.get_state()
        rng = {"keys": torch.from_numpy(keys.astype("int64")), "position": int(position)}
        return {"factors": self._factors | held, "iteration": state.iter, "rng": rng}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        state, rng = self._state, saved["rng"]
        state.p_memory_dict.clear()
        state.q_memory_dict.clear()
        self._layouts.clear()
        self._factors = dict(saved["factors"])
        state.iter = saved["iteration"]
        state.rng.set_state(("MT19937", rng["keys"].cpu().numpy().astype("uint32"), rng["position"]))

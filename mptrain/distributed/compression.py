"""Gradients made smaller on their way between the ranks, with the bill: the bytes sent, and what they cost in accuracy.

=========  ==========================================  ===================================================
kind       how                                         bytes a rank sends for a bucket of N elements
=========  ==========================================  ===================================================
none       ring all-reduce in FP32                     2 (n-1)/n 4 N
bf16 fp16  ring all-reduce in the format (torch's)     2 (n-1)/n 2 N
fp8        all-to-all and all-gather in E4M3           (n-1)/n N (1 + 4/1024) each; error feedback
powersgd   ring all-reduces of two factors (torch's)   2 (n-1)/n 4 (2 (rows + columns) a matrix, and vectors)
=========  ==========================================  ===================================================

n ranks. A process group may choose other algorithms (trees, hierarchies), with which the shares between kinds stay.
The copy that is sent on sampled steps to measure the error is not on the bill.

FP16: gradients come times the loss scale. One beyond 65504 becomes Inf, as does a sum, and the step is skipped like any
with an Inf; what is below 2^-25 becomes zero, so use it with a loss scale. BF16 has FP32's range. Residuals are in
units of the scaled gradients: after a change of the scale one step adds them at the old one.

After its first backward DDP rebuilds its buckets. A continued run is the same bit for bit only with the same buckets:
let one backward pass through DDP, and throw its gradients away, before the state is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook, fp16_compress_hook

from mptrain.distributed import Ranks
from mptrain.distributed.exchange import Exchange
from mptrain.distributed.layout import COMPRESSIONS
from mptrain.distributed.lowrank import LowRank
from mptrain.distributed.reduction import plain
from mptrain.distributed.residuals import Residuals, used_here

if TYPE_CHECKING:
    from torch._C._distributed_c10d import GradBucket  # torch.distributed does not export it to checkers

Mean = torch.futures.Future[Tensor]
KINDS = COMPRESSIONS


class Compression:
    """One way to send gradients. ``send`` is what ``look_and_send`` takes; ``names`` as there.

    Set ``sampling`` on steps whose error shall be measured: it costs a copy of each bucket and its FP32 all-reduce.
    """

    def __init__(self, kind: str, ranks: Ranks, names: Mapping[nn.Parameter, str]) -> None:
        if kind not in KINDS:
            raise ValueError(f"dist.compress={kind}: choose one of {', '.join(KINDS)}")
        scalars = [name for parameter, name in names.items() if parameter.dim() == 0]
        if kind == "powersgd" and scalars:
            raise ValueError(f"dist.compress=powersgd: torch's takes no parameter without a dimension: {scalars[0]}")
        self.kind, self.ranks, self.sampling = kind, ranks, False
        self._residuals = Residuals(names)
        self._low_rank = LowRank(ranks, self._residuals) if kind == "powersgd" else None
        self._sender = self._senders()[kind]
        self._bytes = self._uncompressed = 0.0
        self._steps = 0
        self._squares: Tensor | None = None  # FP64[2] on the device: of the mean, of what the one sent differs by

    def _senders(self) -> dict[str, Callable[[GradBucket], tuple[Mean, float]]]:
        def halved(hook: Any) -> Callable[[GradBucket], tuple[Mean, float]]:
            return lambda bucket: (hook(dist.group.WORLD, bucket), self._ring(2 * bucket.buffer().numel()))

        return {
            "none": lambda bucket: (plain()(bucket), self._ring(bucket.buffer().nbytes)),
            "bf16": halved(bf16_compress_hook),
            "fp16": halved(fp16_compress_hook),
            "fp8": Exchange(self.ranks, self._residuals).send,
        } | ({"powersgd": self._low_rank.send} if self._low_rank else {})

    def send(self, bucket: GradBucket) -> Mean:
        """The mean over the ranks of a bucket's gradients, in its dtype and size, equal on all ranks to the bit."""
        self._uncompressed += self._ring(bucket.buffer().nbytes)
        exact = self._exact(bucket.buffer()) if self.sampling and self.kind != "none" else None
        last, on_cpu = bucket.is_last(), bucket.buffer().device.type == "cpu"
        future, sent = self._sender(bucket)
        self._bytes += sent
        self._steps += last
        if exact is not None:
            future = future.then(lambda done: self._compared(done.value(), exact))
        if on_cpu:  # gloo's threads would start a bucket's second collective at another time on each rank
            future.wait()
        return future

    def _ring(self, nbytes: int) -> float:
        return 2.0 * (self.ranks.size - 1) / self.ranks.size * nbytes

    def _exact(self, buffer: Tensor) -> Tensor:
        mean = buffer.to(torch.float32, copy=True).div_(self.ranks.size)
        dist.all_reduce(mean)
        return mean

    def _compared(self, sent: Tensor, exact: Tensor) -> Tensor:
        """Adds up squares; of a bucket with an Inf or NaN none."""
        used_here(exact)
        norms = [torch.linalg.vector_norm(x, dtype=torch.float64) for x in (exact, sent - exact)]
        squares = torch.stack(norms).square_()
        squares = torch.where(squares.isfinite().all(), squares, 0.0)
        self._squares = squares if self._squares is None else self._squares + squares
        return sent

    def bill(self) -> dict[str, float]:
        """Return metrics of the steps since the last call; empty without one.

        ``comm/bytes_per_step``: sent by a rank, on average; ``comm/bytes_frac``: of what none would send (not with one
        rank); ``comm/sqnr_db``: of the mean gradient, over the sampled steps, if there were any; NaN where it was
        exact. Reads the device only for the last.
        """
        figures = {}
        if self._steps:
            figures["comm/bytes_per_step"] = self._bytes / self._steps
        if self._uncompressed:
            figures["comm/bytes_frac"] = self._bytes / self._uncompressed
        if self._squares is not None:
            signal, error = self._squares.tolist()
            figures["comm/sqnr_db"] = 10.0 * math.log10(signal / error) if signal and error else math.nan
        self._bytes = self._uncompressed = 0.0
        self._steps, self._squares = 0, None
        return figures

    def state_dict(self) -> dict[str, Any]:
        """Return what this rank needs to continue the same; other ranks hold other residuals."""
        state: dict[str, Any] = {"residuals": self._residuals.state_dict()}
        if self._low_rank:
            state["powersgd"] = self._low_rank.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over residuals, from another kind of compression too: they are what any kind owes."""
        self._residuals.load_state_dict(state["residuals"])
        if self._low_rank and "powersgd" in state:
            self._low_rank.load_state_dict(state["powersgd"])

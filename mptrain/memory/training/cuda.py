"""A GPU's training step, on the fake CPU tensors of a plan: what CUDA does otherwise and a CPU build cannot run.

Fake CUDA tensors have no backward on a CPU build of torch. So a plan for a GPU runs CPU kernels under CPU autocast,
with the operators in FP32 that CUDA's autocast runs in FP32 (the CPU's leaves norms in BF16). The fused attention
kernels of both keep the same for backward: query, key, value, output and one FP32 number a row.

FP8 by Transformer Engine stands on our own FP8 layers, which keep the same 8-bit input and weight; it keeps the
transposed weight beside it (:data:`TRANSPOSED`). Its GEMMs take 8-bit operands, ours BF16 ones: up to one layer's
operands of workspace too much. FP8 by torchao is torchao's own layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mptrain.formats import Format
from mptrain.memory.training.live import CODES, Bytes
from mptrain.precision.policy import AUTO, LossScale, PrecisionPolicy, Scaling

CONTEXT_BYTES = 600 * 2**20
"""Assumed: a CUDA context with torch's kernels and cuBLAS's workspace (32 MiB on Hopper); nvidia-smi shows 450 to 700
MiB for an idle process. torch's own figures do not hold it."""

FRAGMENTATION_FRAC = 0.05
"""Assumed: what the caching allocator holds beyond what is alive."""


# torch.amp's FP32 list, as far as a forward meets it
WIDE = {
    F.layer_norm, F.rms_norm, F.group_norm, F.softmax, F.log_softmax, F.cross_entropy, F.nll_loss, F.mse_loss,
    F.l1_loss, F.smooth_l1_loss, F.binary_cross_entropy_with_logits, F.kl_div, F.softplus, F.normalize,
    torch.layer_norm, torch.rms_norm, torch.group_norm, torch.softmax, torch.log_softmax, torch.exp, torch.log,
    torch.pow, torch.rsqrt, torch.cumsum, torch.sum, torch.prod, torch.norm, torch.logsumexp, Tensor.softmax,
    Tensor.log_softmax, Tensor.exp, Tensor.log, Tensor.pow, Tensor.__pow__, Tensor.rsqrt, Tensor.cumsum, Tensor.sum,
    Tensor.prod, Tensor.norm, Tensor.logsumexp,
}  # fmt: skip


class CudaCasts(TorchFunctionMode):
    """CUDA autocast's FP32 operators, wherever autocast is on."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in WIDE and torch.is_autocast_enabled("cpu"):
            args = tuple(_wide(value) for value in args)
            kwargs = {name: _wide(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)


def casting(recompute: Callable[..., Any]) -> Callable[..., Any]:
    """``recompute`` with the same casts in backward, which torch runs outside of every function mode."""

    def run(fn: Callable[..., Any], *args: Any) -> Any:
        def cast(*given: Any) -> Any:
            with CudaCasts():
                return fn(*given)

        return recompute(cast, *args)

    return run


def _wide(value: Any) -> Any:
    narrow = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if narrow else value


def backend_on_gpu(policy: PrecisionPolicy) -> str:
    """The backend that ``auto`` takes on a GPU with FP8 units, Transformer Engine being installed."""
    if policy.backend != AUTO:
        return policy.backend
    if not policy.quantized:
        return "autocast"
    return "native" if policy.quantization.scaling is Scaling.rowwise else "te"


def stand_in(policy: PrecisionPolicy) -> PrecisionPolicy:
    """The policy to run on the CPU in the place of ``policy`` on a GPU. A loss scale is a number: it takes no room."""
    unscaled = replace(policy, loss_scale=LossScale())
    if policy.quantized:
        name = backend_on_gpu(policy)
        return replace(unscaled, backend="native" if name == "native" else "emulated")
    compute = Format.fp32 if policy.compute is Format.tf32 else policy.compute
    return replace(unscaled, compute=compute, backend="autocast")


def with_transposed(peak: Bytes, policy: PrecisionPolicy) -> Bytes:
    """``peak`` with what Transformer Engine holds beside each weight in FP8: its transpose, as long as that (on Hopper
    FP8 GEMMs read only operands that are contiguous along the dimension they sum over)."""
    if policy.quantized and backend_on_gpu(policy) == "te":
        codes = sum(size for (role, by), size in peak.items() if role == "weight copies" and by.endswith(CODES))
        return peak + Counter({("weight copies", "transposed" + CODES): codes})
    return peak

"""FP32, TF32, BF16 and FP16 on the device's own units, through ``torch.autocast`` and the TF32 switches.

The switches act when each GEMM runs, so they must hold in backward too: they are process-wide and set whenever a
forward of this backend begins, and stay as they are until another precision sets its own.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from mptrain.distributed import Agree
from mptrain.formats import Format
from mptrain.precision.convert import ConversionReport
from mptrain.precision.counters import Counters
from mptrain.precision.policy import PrecisionPolicy
from mptrain.precision.regions import Plain, Region


def set_tf32(on: bool) -> None:
    """TF32 for CUDA matmuls and cuDNN convolutions (cuDNN's default is on: an FP32 baseline must turn both off)."""
    wanted = "tf32" if on else "ieee"
    if torch.backends.cuda.matmul.fp32_precision != wanted:
        torch.backends.cuda.matmul.fp32_precision = wanted
    if torch.backends.cudnn.conv.fp32_precision != wanted:  # type: ignore[attr-defined]
        torch.backends.cudnn.conv.fp32_precision = wanted  # type: ignore[attr-defined]


class Backend:
    """See :class:`mptrain.precision.backends.Backend`."""

    name = "autocast"
    auto_place = 3
    emulated = False

    def __init__(self, policy: PrecisionPolicy, device: torch.device, agree: Agree) -> None:
        self._policy, self._device = policy, device
        self._counters = Counters()
        self.carrier = str(policy.compute)

    @staticmethod
    def missing(policy: PrecisionPolicy, device: torch.device, *, auto: bool) -> str | None:
        if policy.quantized:
            return "autocast has no quantized GEMMs; use precision.backend=auto"
        if device.type == "cpu" and policy.compute is Format.tf32:
            return "a CPU has no TF32 unit and ignores its switches; use precision.backend=emulated"
        if device.type == "cpu" and policy.compute is Format.fp16 and auto:
            return "FP16 GEMMs on a CPU are many times slower than FP32 and not what a GPU computes"
        if (
            device.type == "cuda"
            and policy.compute is Format.tf32
            and torch.cuda.get_device_capability(device) < (8, 0)
        ):
            return "TF32 needs an Ampere GPU (compute capability 8.0) or newer; use precision.backend=emulated"
        return None

    def convert(self, model: nn.Module, counters: Counters) -> ConversionReport:
        self._counters = counters
        plain = Plain(self._device.type)
        self._always_plain = self._policy.compute is Format.fp32 and self._device.type == "cpu"
        self._forward = Region(counters, plain, quantized=True)  # made once: a step enters two
        self._backward = Region(counters, plain, quantized=True, replaying=True)
        counters.allocate(self._device)
        return ConversionReport()

    def forward(self, *, policy_on: bool) -> AbstractContextManager[object]:
        if policy_on and self._always_plain:
            return self._forward
        return Region(self._counters, self.casts(policy_on), quantized=policy_on)

    def casts(self, policy_on: bool) -> AbstractContextManager[object]:
        compute = self._policy.compute
        if self._device.type == "cuda":
            set_tf32(policy_on and compute is Format.tf32)
        if not policy_on or compute in (Format.fp32, Format.tf32):
            return Plain(self._device.type)
        return torch.autocast(self._device.type, dtype=compute.value.dtype)

    def backward(self) -> AbstractContextManager[object]:
        return self._backward

    def replay(self) -> AbstractContextManager[object]:
        return Region(self._counters, self.casts(True), quantized=True, replaying=True)

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        del state  # nothing to continue: scales of an FP8 run have no meaning here

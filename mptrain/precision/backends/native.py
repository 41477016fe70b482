"""FP8 GEMMs of PyTorch itself (``torch._scaled_mm``) through torchao's float8 training, current or rowwise scaling.

Formats stay as the policy asks: each role gets a cast of its own with the format named. (torchao fills a format left
open in the first role that meets it, so one cast shared by three roles makes grad_output E4M3 without a word.)
On a machine without FP8 units torchao's own emulation runs: FP32 GEMMs on the dequantized operands, and slower still
than ``backend=emulated`` (7 to 9 times the BF16 layer on a CPU). An Inf turns its whole tensor (rowwise: its row) into
NaN, so it needs no watching on the steps that are not sampled: the gradients show it.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from mptrain.distributed import Agree
from mptrain.formats import Format
from mptrain.precision.backends._observed import Booking, require_rows
from mptrain.precision.backends.autocast import set_tf32
from mptrain.precision.convert import ConversionReport, select, swap
from mptrain.precision.counters import Counters
from mptrain.precision.policy import PrecisionPolicy, Quantization, Scaling
from mptrain.precision.regions import Plain, Region
from mptrain.tools.quiet import quiet_import


class Backend:
    """See :class:`mptrain.precision.backends.Backend`."""

    name = "native"
    auto_place = 2
    emulated = False

    def __init__(self, policy: PrecisionPolicy, device: torch.device, agree: Agree) -> None:
        del agree  # scales of the current operand belong to one rank alone
        self._policy, self._device = policy, device
        self._counters = Counters()
        self.emulated = not has_fp8(device)
        version = importlib.metadata.version("torchao")
        gemm = "FP32 GEMMs on dequantized operands" if self.emulated else "FP8 tensor cores, torch._scaled_mm"
        self.carrier = f"{gemm} (torchao {version})"

    @staticmethod
    def missing(policy: PrecisionPolicy, device: torch.device, *, auto: bool) -> str | None:
        config = policy.quantization
        if not policy.quantized:
            return f"torchao only adds FP8 GEMMs and {policy.name} has none; use precision.backend=autocast"
        if importlib.util.find_spec("torchao") is None:
            return 'torchao is not installed: pip install "mptrain[native]", or use precision.backend=emulated'
        if config.scaling is Scaling.delayed:
            return (
                "torchao dropped delayed scaling; use precision.quantization.scaling=current or rowwise, "
                "or keep delayed with precision.backend=te or emulated"
            )
        if config.scaling is Scaling.block:
            return "torchao trains without block scaling; use precision.quantization.scaling=current or rowwise"
        if config.margin:
            return f"torchao has no margin ({config.margin} was asked for); use precision.quantization.margin=0"
        if not has_fp8(device):
            slow = f"{device.type} has no FP8 units and torchao's emulation is slow; use precision.backend=emulated"
            return slow if auto else None
        if config.forward is Format.fp8_e5m2:
            return "FP8 units do not multiply E5M2 by E5M2; use precision.quantization.forward=fp8_e4m3"
        if config.scaling is Scaling.rowwise and policy.compute is not Format.bf16:
            return "rowwise FP8 GEMMs give BF16 only; use precision.compute=bf16"
        return None

    def convert(self, model: nn.Module, counters: Counters) -> ConversionReport:
        self._counters = counters
        chosen, kept = select(
            model,
            self._policy.keep,
            keep_default=self._policy.keep_default,
            multiple=self._policy.quantization.multiple,
            replaced=True,
        )
        slots = {name: counters.add(name) for name in chosen}
        counters.allocate(self._device)
        linear_class = _linear_class()
        config = _torchao_config(self._policy.quantization, emulate=self.emulated)

        def make(name: str, layer: nn.Linear) -> nn.Module:
            new: nn.Module = linear_class.from_float(layer, config=config)
            new.booking = Booking(self._policy.quantization, slots[name], counters)  # type: ignore[assignment]
            return new

        swap(model, chosen, make)
        for name, old in chosen.items():  # some of torchao's conversions are silent no-ops: never believe one
            new = model.get_submodule(name)
            assert isinstance(new, linear_class), f"{name} was not converted"
            assert new.weight is old.weight, f"{name}: the weight was copied"
            assert new.bias is old.bias, f"{name}: the bias was copied"
        return ConversionReport(tuple(chosen), kept)

    def forward(self, *, policy_on: bool) -> AbstractContextManager[object]:
        if self._device.type == "cuda":
            set_tf32(False)
        return Region(self._counters, self.casts(policy_on), quantized=policy_on)

    def casts(self, policy_on: bool) -> AbstractContextManager[object]:
        if policy_on and self._policy.compute is Format.bf16:
            return torch.autocast(self._device.type, dtype=torch.bfloat16)
        return Plain(self._device.type)

    def backward(self) -> AbstractContextManager[object]:
        return Region(self._counters, Plain(self._device.type), quantized=True, replaying=True)

    def replay(self) -> AbstractContextManager[object]:
        return Region(self._counters, self.casts(True), quantized=True, replaying=True)

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        del state  # current and rowwise scaling remember nothing


def has_fp8(device: torch.device) -> bool:
    """FP8 tensor cores: Ada, Hopper and newer (compute capability 8.9)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def _torchao_config(config: Quantization, *, emulate: bool) -> Any:
    """torchao's description of the policy. Rowwise scales are rounded down to powers of two, as its recipe does."""
    with quiet_import():
        from torchao.float8.config import CastConfig, Float8LinearConfig, ScalingGranularity
    rowwise = config.scaling is Scaling.rowwise
    granularity = ScalingGranularity.AXISWISE if rowwise else ScalingGranularity.TENSORWISE
    casts = {
        f"cast_config_{role}": CastConfig(
            scaling_granularity=granularity, target_dtype=config.format_of(role).value.dtype
        )
        for role in ("input", "weight", "grad_output")
    }
    return Float8LinearConfig(**casts, emulate=emulate, round_scales_to_power_of_2=rowwise)


@functools.cache
def _linear_class() -> Any:
    """torchao's layer with our books around it. Made on first use, because importing torchao takes seconds."""
    with quiet_import():
        from torchao.float8.float8_linear import Float8Linear

    class NativeLinear(Float8Linear):  # type: ignore[misc]
        booking: Booking

        def forward(self, input: Tensor) -> Tensor:
            if self.booking.bypassed:
                return nn.functional.linear(input, self.weight, self.bias)
            if not self.config.emulate and torch.is_grad_enabled():
                require_rows(input, 16, "torch._scaled_mm")  # they are the inner dimension of grad_weight's GEMM
            device = input.device.type
            if torch.is_autocast_enabled(device):  # torchao looks at CUDA's setting only
                input = input.to(torch.get_autocast_dtype(device))
            self.booking.operands(input, self.weight)
            with torch.autocast(device, enabled=False):  # its emulation multiplies in FP32 and must go on doing so
                out: Tensor = super().forward(input)
            self.booking.watch(out)
            return out

    return NativeLinear

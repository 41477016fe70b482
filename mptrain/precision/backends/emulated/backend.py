"""Numerics of FP8, FP16 and TF32 on any machine: real rounding, FP8 activations really in 8 bits, speed not real."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from mptrain import kernels
from mptrain.distributed import Agree
from mptrain.formats import Format
from mptrain.precision.backends._delayed_scaling import DelayedScaling
from mptrain.precision.backends.emulated.gemm import carrier_dtype
from mptrain.precision.backends.emulated.linear import Operands, Quantizers, emulate
from mptrain.precision.backends.emulated.rounding import Rounded
from mptrain.precision.backends.emulated.tiled_linear import FineQuantizers
from mptrain.precision.convert import ConversionReport, is_conv1d, leave_fast_path, select
from mptrain.precision.counters import Counters
from mptrain.precision.policy import PrecisionPolicy, Scaling
from mptrain.precision.regions import Plain, Region


class Backend:
    """See :class:`mptrain.precision.backends.Backend`."""

    name = "emulated"
    auto_place = 4
    emulated = True

    def __init__(self, policy: PrecisionPolicy, device: torch.device, agree: Agree) -> None:
        self._policy, self._device, self._agree = policy, device, agree
        self._counters = Counters()
        self._delayed: DelayedScaling | None = None
        self._carrier = torch.float32
        if policy.quantized:  # measured, so the ranks of one machine may differ: fast for one is right for all
            fast = agree(torch.tensor(carrier_dtype(device.type) is torch.bfloat16, device=device))
            self._carrier = torch.bfloat16 if fast else torch.float32
        carried = str(self._carrier).removeprefix("torch.")
        self.carrier = f"{carried} GEMMs on exact operands, {kernels.described(device)}"

    @staticmethod
    def missing(policy: PrecisionPolicy, device: torch.device, *, auto: bool) -> str | None:
        if policy.quantized or policy.compute in (Format.fp16, Format.tf32):
            return None
        return f"{policy.compute} needs no emulation; use precision.backend=autocast"

    def convert(self, model: nn.Module, counters: Counters) -> ConversionReport:
        self._counters = counters
        if not self._policy.quantized:
            counters.allocate(self._device)
            return ConversionReport()
        config = self._policy.quantization
        chosen, kept = select(
            model, self._policy.keep, keep_default=self._policy.keep_default, multiple=config.multiple
        )
        slots = {name: counters.add(name) for name in chosen}
        counters.allocate(self._device)
        if config.scaling is Scaling.delayed:
            self._delayed = DelayedScaling(config, counters, self._device, self._agree)

        for name, layer in chosen.items():
            if config.fine:
                books: Operands = FineQuantizers(config, slots[name], counters, self._carrier)
            else:
                books = Quantizers(config, slots[name], counters, self._delayed, self._carrier)
            emulate(layer, books, transposed=is_conv1d(layer))
        leave_fast_path(model, chosen)
        return ConversionReport(tuple(chosen), kept)

    def forward(self, *, policy_on: bool) -> AbstractContextManager[object]:
        rotate = self._delayed.rotate if self._delayed is not None and policy_on else None
        return Region(self._counters, self.casts(policy_on), quantized=policy_on, opening=rotate)

    def casts(self, policy_on: bool) -> AbstractContextManager[object]:
        if not policy_on:
            return Plain(self._device.type)
        if not self._policy.quantized:
            return Rounded(self._policy.compute, self._device.type)
        if self._policy.compute is Format.bf16:
            return torch.autocast(self._device.type, dtype=torch.bfloat16)
        return Plain(self._device.type)

    def backward(self) -> AbstractContextManager[object]:
        device = self._device.type
        casts: AbstractContextManager[object] = Plain(device)
        if not self._policy.quantized:
            casts = Rounded(self._policy.compute, device, casting=False)
        return Region(self._counters, casts, quantized=True, replaying=True)

    def replay(self) -> AbstractContextManager[object]:
        return Region(self._counters, self.casts(True), quantized=True, replaying=True)

    def state_dict(self) -> dict[str, Tensor]:
        return {} if self._delayed is None else self._delayed.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if self._delayed is not None:
            self._delayed.load_state_dict(state)

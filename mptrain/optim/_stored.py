"""AdamW whose weights or moments are stored in fewer bits; its arithmetic is torch's fused AdamW in FP32."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from mptrain.tools.quiet import quiet_import

MOMENT_BLOCK = 256  # elements that share a scale, of the 8-bit moments (Dettmers et al., arXiv 2110.02861)


class StoredAdamW(Optimizer):
    """AdamW whose weights and moments are stored as :class:`OptimConfig` says.

    BF16 weights are the parameters themselves, converted here: 2 bytes each, gradients too. One FP32 copy of one
    parameter and of its moments is alive at a time.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float = 0.0,
        weights: str = "fp32",
        moments: str = "fp32",
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.weights, self._int8 = weights, moments == "int8"
        if self._int8:
            with quiet_import():
                importlib.import_module("torchao.optim.quant_utils")
        for parameter in (p for group in self.param_groups for p in group["params"]):
            if weights != "fp32":
                self._begin(parameter)

    @torch.no_grad()
    def _begin(self, parameter: nn.Parameter) -> None:
        master = parameter.detach()
        parameter.data = master.to(torch.bfloat16)
        if self.weights == "bf16_remainder":
            self._store(parameter, master)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "step" not in state:
                    state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                master, (first, second) = self.master(parameter), self.moments(parameter)
                adamw(
                    [master], [parameter.grad.float()], [first], [second], [], [state["step"]],
                    fused=True, amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"],
                    weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
                )  # fmt: skip
                self._store(parameter, master)
                self._store_moments(parameter, first, second)

    def master(self, parameter: nn.Parameter) -> Tensor:
        """The weight in FP32, with its remainder if it has one."""
        if self.weights == "fp32":
            return parameter.detach()
        remainder = self.state[parameter].get("remainder")
        return parameter.detach().float() if remainder is None else join(parameter.detach(), remainder)

    def _store(self, parameter: nn.Parameter, master: Tensor) -> None:
        if self.weights == "bf16_remainder":
            high, self.state[parameter]["remainder"] = split(master)
            parameter.copy_(high)
        elif self.weights == "bf16_stochastic":
            parameter.copy_(round_stochastically(master))
        elif self.weights == "bf16":
            parameter.copy_(master)

    def moments(self, parameter: nn.Parameter) -> tuple[Tensor, Tensor]:
        """Both moments in FP32: those kept, or zeros before the first step."""
        state = self.state[parameter]
        found = []
        for name in ("exp_avg", "exp_avg_sq"):
            if name not in state and f"{name}_codes" not in state:
                state[name] = torch.zeros_like(parameter, dtype=torch.float32)
            found.append(state[name] if name in state else _from_8bit(state, name))
        return found[0], found[1]

    def _store_moments(self, parameter: nn.Parameter, first: Tensor, second: Tensor) -> None:
        """Store moments in 8 bits where that is asked for and blocks fit: small vectors stay FP32, as in torchao."""
        state = self.state[parameter]
        if not self._int8 or parameter.numel() < 4096 or parameter.numel() % MOMENT_BLOCK:
            return
        for name, moment in (("exp_avg", first), ("exp_avg_sq", second)):
            state.pop(name, None)
            state[f"{name}_codes"], state[f"{name}_scale"] = _to_8bit(moment, signed=name == "exp_avg")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load as torch does, which would cast every state to its parameter's dtype: FP32 moments would become BF16."""
        super().load_state_dict(state_dict)
        everyone = [p for group in self.param_groups for p in group["params"]]
        for index, saved in state_dict["state"].items():
            parameter = everyone[int(index)]
            self.state[parameter] = {name: value.to(parameter.device).clone() for name, value in saved.items()}


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """FP32 as (BF16, int16 remainder): rounded half *up* on the bits, so that :func:`join` gives every bit back.

    With nearest-even half of the ties come back one last place of BF16 off (NVIDIA apex, issue 1842).
    """
    bits = master.view(torch.int32)
    high = (bits + 0x8000) >> 16
    remainder = (bits - (high << 16)).to(torch.int16)
    return high.to(torch.int16).view(torch.bfloat16), remainder


def join(high: Tensor, remainder: Tensor) -> Tensor:
    """The FP32 tensor that :func:`split` took apart."""
    bits = (high.view(torch.int16).int() << 16) + remainder.int()
    return bits.view(torch.float32)


def round_stochastically(master: Tensor) -> Tensor:
    """FP32 to BF16, up with the probability of what would be cut off: right on average. Inf and NaN stay."""
    noise = torch.randint(0, 1 << 16, master.shape, dtype=torch.int32, device=master.device)
    rounded = ((master.view(torch.int32) + noise) & -0x10000).view(torch.float32)
    return torch.where(master.isfinite(), rounded, master).to(torch.bfloat16)


def _to_8bit(moment: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """(codes uint8 in the moment's shape, scale FP32 [blocks]) by torchao's dynamic map."""
    from torchao.optim.quant_utils import quantize_8bit_with_qmap, scale_tensor

    scaled, scale = scale_tensor(moment, MOMENT_BLOCK)
    return quantize_8bit_with_qmap(scaled, _map(signed, moment.device)).view(moment.shape), scale


def _from_8bit(state: dict[str, Tensor], name: str) -> Tensor:
    from torchao.optim.quant_utils import dequant_with_qmap

    codes = state[f"{name}_codes"]
    values: Tensor = dequant_with_qmap(codes, _map(name == "exp_avg", codes.device), state[f"{name}_scale"])
    return values


@functools.cache
def _map(signed: bool, device: torch.device) -> Tensor:
    from torchao.optim.subclass_8bit import get_qmap_signed, get_qmap_unsigned

    with unset_fake_temporarily():  # kept for real steps to come, also where a plan asks first
        return torch.tensor(get_qmap_signed() if signed else get_qmap_unsigned(), dtype=torch.float32, device=device)

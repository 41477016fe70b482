"""Optimizers, learning-rate schedules and the running average of the weights, by configuration.

The default is torch's fused AdamW on FP32 masters. The variants of :class:`StoredAdamW` keep weights or moments in
fewer bits, to save memory or to show what is lost: their arithmetic is the same fused AdamW in FP32, on one parameter
at a time, between reading what is stored and storing it again.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from mptrain.distributed import like, local
from mptrain.distributed.optimizer import ShardedOptimizer, is_sharded
from mptrain.tools.quiet import quiet_import
from mptrain.tools.settings import require

WEIGHTS = ("fp32", "bf16", "bf16_stochastic", "bf16_remainder")
MOMENTS = ("fp32", "int8")
MOMENT_BLOCK = 256  # elements that share a scale, of the 8-bit moments (Dettmers et al., arXiv 2110.02861)


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with warm-up and cosine decay. ``warmup_frac`` is of max_steps; the rate ends at ``min_lr_frac`` of lr.

    ``weights``: how they are stored: fp32 (masters), bf16 (updates below half a last place are lost), bf16_stochastic
    (rounded at random, right on average) or bf16_remainder (BF16 and the 16 bits below it: nothing is lost). Gradients
    of BF16 weights are BF16, and add up so over micro-batches: 1.5 % off at 256 of them.
    ``moments``: fp32 or int8 (blocks of 256). ``ema_decay``: of a running average of the weights, 0 for none.
    """

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    warmup_frac: float = 0.1
    min_lr_frac: float = 0.1
    weights: str = "fp32"
    moments: str = "fp32"
    ema_decay: float = 0.0

    def __post_init__(self) -> None:
        require(self.lr > 0, "optim.lr", self.lr, "above 0, e.g. 0.001")
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, f"optim.{name}", getattr(self, name), "in [0, 1)")
        require(self.eps > 0, "optim.eps", self.eps, "above 0, e.g. 1e-8")
        require(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "0 or more")
        for name in ("warmup_frac", "min_lr_frac"):
            require(0 <= getattr(self, name) <= 1, f"optim.{name}", getattr(self, name), "in [0, 1]")
        require(self.weights in WEIGHTS, "optim.weights", self.weights, f"one of {', '.join(WEIGHTS)}")
        require(self.moments in MOMENTS, "optim.moments", self.moments, "fp32 or int8")
        require(0 <= self.ema_decay < 1, "optim.ema_decay", self.ema_decay, "in [0, 1), e.g. 0.999")


def build_optimizer(config: OptimConfig, model: nn.Module) -> Optimizer:
    """AdamW on ``model``, whose weights are stored as the configuration says from here on.

    Matrices decay, vectors (norms, biases) do not. A tied weight counts once.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    used = [group for group in groups if group["params"]]
    settings: dict[str, Any] = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps}
    plain = config.weights == config.moments == "fp32"
    if is_sharded(model):
        if not plain:
            raise ValueError(
                f"optim.weights={config.weights}, optim.moments={config.moments}: sharded weights are kept in FP32, "
                "use optim=adamw, or dist=ddp"
            )
        sharded = ShardedOptimizer(used, lambda parts: torch.optim.AdamW(parts, **settings, fused=True))
        return cast(Optimizer, sharded)  # all that is asked of one here
    if plain:
        return torch.optim.AdamW(used, **settings, fused=True)
    return StoredAdamW(used, **settings, weights=config.weights, moments=config.moments)


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
        """In 8 bits where they are asked for and blocks fit: small vectors stay FP32, as in torchao."""
        state = self.state[parameter]
        if not self._int8 or parameter.numel() < 4096 or parameter.numel() % MOMENT_BLOCK:
            return
        for name, moment in (("exp_avg", first), ("exp_avg_sq", second)):
            state.pop(name, None)
            state[f"{name}_codes"], state[f"{name}_scale"] = _to_8bit(moment, signed=name == "exp_avg")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but that casts every state to the dtype of its parameter: FP32 moments would become BF16."""
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


class Average:
    """Exponential running average of the weights, in FP32; moved once for every *applied* step."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._names = [name for name, p in model.named_parameters() if p.requires_grad]
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self.shadow = [local(p.detach()).float().clone() for p in self._parameters]

    @torch.no_grad()
    def update(self) -> None:
        torch._foreach_lerp_(self.shadow, [local(p.detach()).float() for p in self._parameters], 1.0 - self.decay)

    @contextmanager
    @torch.no_grad()
    def in_place(self) -> Iterator[None]:
        """The model computes with the average."""
        held = [local(p.detach()) for p in self._parameters]
        kept = [p.clone() for p in held]
        for parameter, average in zip(held, self.shadow, strict=True):
            parameter.copy_(average)
        try:
            yield
        finally:
            for parameter, weight in zip(held, kept, strict=True):
                parameter.copy_(weight)

    def state_dict(self) -> dict[str, Tensor]:
        parts = zip(self._names, self.shadow, self._parameters, strict=True)
        return {name: like(average, parameter) for name, average, parameter in parts}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue the average of a run that kept one; a run without starts from the weights it continues."""
        for name, average, parameter in zip(self._names, self.shadow, self._parameters, strict=True):
            average.copy_(local(state.get(name, parameter.detach())))


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then cosine, as a function of the number of *applied* steps: a skipped step moves nothing."""

    lr: float
    warmup_steps: int
    max_steps: int
    min_lr_frac: float

    @classmethod
    def of(cls, config: OptimConfig, max_steps: int) -> Schedule:
        return cls(config.lr, round(config.warmup_frac * max_steps), max_steps, config.min_lr_frac)

    def at(self, applied: int) -> float:
        """The rate of the step that follows ``applied`` applied ones."""
        if applied < self.warmup_steps:
            return self.lr * (applied + 1) / self.warmup_steps
        progress = min(1.0, (applied - self.warmup_steps) / max(1, self.max_steps - self.warmup_steps))
        cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
        return self.lr * (self.min_lr_frac + (1.0 - self.min_lr_frac) * cosine)

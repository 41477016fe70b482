"""Loss scaling on the device: the scale, its trackers and its update, without a read by the host.

    found_inf:  tracker = 0; hysteresis_left -= 1; if hysteresis_left <= 0: scale = max(scale * backoff, floor)
    otherwise:  tracker += 1; at `interval`: tracker = 0, hysteresis_left = hysteresis,
                scale *= growth unless that leaves FP32

Rule and order of Megatron's DynamicGradScaler, with torch.amp.GradScaler's guard that the scale stays finite.
"""

from __future__ import annotations

import math
from enum import IntEnum

import torch
from torch import Tensor

from mptrain.precision.policy import LossScale, LossScaleKind


class ScaleEvent(IntEnum):
    """The effect of one update on the loss scale."""

    steady = 0
    grew = 1
    backed_off = 2
    at_floor = 3  # an overflow at the floor: the scale cannot fall further, so something else is wrong
    tolerated = 4  # an overflow that hysteresis absorbed


class LossScaler:
    """none | static | dynamic. ``scale`` is an FP32 0-dim tensor on the device (1 for kind none)."""

    def __init__(self, config: LossScale, device: torch.device) -> None:
        self.config = config
        self.active = config.kind is not LossScaleKind.none
        init = 1.0 if config.kind is LossScaleKind.none else config.init
        self.scale = torch.tensor(init, dtype=torch.float32, device=device)
        self._on_host = device.type == "cpu"  # there the counts are ints: a tensor's step takes 2 us
        self._tracker = self._count(0)
        self._hysteresis_left = self._count(config.hysteresis)
        self._steady = torch.zeros((), dtype=torch.int32, device=device)
        self._before = self.scale, self._tracker, self._hysteresis_left

    def _count(self, value: int) -> int | Tensor:
        return value if self._on_host else torch.tensor(value, dtype=torch.int32, device=self.scale.device)

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss to call backward on (FP32; same shape)."""
        if not self.active:
            return loss
        return loss * self.scale if loss.dim() == 0 else loss.float() * self.scale  # FP16 [1] would stay FP16

    def update(self, found_inf: Tensor, *, again: bool = False) -> Tensor:
        """Move the scale after a step. ``found_inf``: bool 0-dim. Returns a :class:`ScaleEvent` code (int32 0-dim).

        ``again``: instead of the update before, from the state that one began with (several optimizers in one round).
        """
        if self.config.kind is not LossScaleKind.dynamic:
            return self._steady
        if again:
            self.scale, self._tracker, self._hysteresis_left = self._before
        self._before = self.scale, self._tracker, self._hysteresis_left
        if self._on_host:
            return self._update_on_host(bool(found_inf))
        return self._update_on_device(found_inf)

    def _update_on_host(self, found_inf: bool) -> Tensor:
        """The rule where reading is free: 1 us, where the tensor operations below take 60 on a CPU."""
        config, event = self.config, ScaleEvent.steady
        if found_inf:
            self._hysteresis_left -= 1
            self._tracker = 0
            event = ScaleEvent.tolerated
            if self._hysteresis_left <= 0:
                lowered = (self.scale * config.backoff).clamp_(min=config.floor)
                event = ScaleEvent.at_floor if lowered.item() >= self.scale.item() else ScaleEvent.backed_off
                self.scale = lowered
            return torch.tensor(event, dtype=torch.int32)
        self._tracker += 1
        if self._tracker < config.interval:
            return self._steady
        self._tracker = 0
        self._hysteresis_left = config.hysteresis
        raised = self.scale * config.growth
        if math.isfinite(raised.item()):
            self.scale, event = raised, ScaleEvent.grew
        return torch.tensor(event, dtype=torch.int32)

    def _update_on_device(self, found_inf: Tensor) -> Tensor:
        """The same without a read: every outcome is computed, the right one selected."""
        config = self.config
        left = self._hysteresis_left - found_inf.int()
        tracker = (torch.as_tensor(self._tracker) + 1).mul_(~found_inf)
        backs_off = found_inf & (left <= 0)
        lowered = (self.scale * config.backoff).clamp_(min=config.floor)
        at_floor = backs_off & (lowered >= self.scale)
        raised = self.scale * config.growth
        due = tracker >= config.interval
        grows = due & raised.isfinite()
        self.scale = torch.where(backs_off, lowered, torch.where(grows, raised, self.scale))
        self._hysteresis_left = torch.where(due, config.hysteresis, left)
        self._tracker = tracker.mul_(~due)
        code = grows * int(ScaleEvent.grew) + found_inf * int(ScaleEvent.tolerated)
        code -= backs_off * (int(ScaleEvent.tolerated) - int(ScaleEvent.backed_off))
        return code.add_(at_floor).int()

    def state_dict(self) -> dict[str, Tensor]:
        """Scale, growth tracker and hysteresis left, to be read after ``update``; the rest is in the policy.

        Empty without scaling: a BF16 run's 1 must not become the first scale of the FP16 run that continues it.
        """
        if not self.active:
            return {}
        counts = {"tracker": self._tracker, "hysteresis_left": self._hysteresis_left}
        return {"scale": self.scale} | {
            name: torch.as_tensor(n, dtype=torch.int32, device=self.scale.device) for name, n in counts.items()
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue a saved scale. Only dynamic scaling does, a static one is a setting; without one, ``init`` stays."""
        if self.config.kind is not LossScaleKind.dynamic or "scale" not in state:
            return
        device = self.scale.device
        self.scale = state["scale"].to(device, torch.float32).clone()
        self._tracker = self._count(int(state["tracker"]))
        self._hysteresis_left = self._count(int(state["hysteresis_left"]))

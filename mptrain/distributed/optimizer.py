"""A torch optimizer on what this rank holds of sharded parameters.

Its kernels get plain tensors: the fused AdamW takes the scale and found_inf of a step as they are, parameters on
different meshes go through one call, and no operator is dispatched through DTensor (hundreds of microseconds a step).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from mptrain.distributed import like, local


class ShardedOptimizer:
    """``make(groups)`` gives the optimizer of the parts that this rank holds of the parameters in ``groups``.

    ``shards``: parameter -> its part, under which ``state`` and ``param_groups`` know it. ``state_dict`` is that of the
    optimizer of one process, with sharded tensors.
    """

    _step_supports_amp_scaling = True

    def __init__(self, groups: list[dict[str, Any]], make: Callable[[list[dict[str, Any]]], Optimizer]) -> None:
        everyone = [parameter for group in groups for parameter in group["params"]]
        self.shards = {p: nn.Parameter(local(p.detach())) for p in everyone}
        self._inner = make([{**group, "params": [self.shards[p] for p in group["params"]]} for group in groups])
        self.param_groups, self.state = self._inner.param_groups, self._inner.state
        self.grad_scale: Tensor | None = None
        self.found_inf: Tensor | None = None

    def step(self) -> None:
        """Update from the gradients of the sharded parameters."""
        for parameter, part in self.shards.items():
            part.grad = None if parameter.grad is None else local(parameter.grad)
        self._inner.grad_scale, self._inner.found_inf = self.grad_scale, self.found_inf  # type: ignore[attr-defined]
        self._inner.step()
        for part in self.shards.values():
            part.grad = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        for parameter in self.shards:
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        held: dict[str, Any] = self._inner.state_dict()
        everyone = list(self.shards)
        sharded = {
            index: {name: _sharded(value, everyone[index]) for name, value in state.items()}
            for index, state in held["state"].items()
        }
        return {**held, "state": sharded}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        parts = {
            index: {name: local(value) if isinstance(value, Tensor) else value for name, value in entry.items()}
            for index, entry in state["state"].items()
        }
        self._inner.load_state_dict({**state, "state": parts})
        self.param_groups, self.state = self._inner.param_groups, self._inner.state


def _sharded(value: Any, parameter: nn.Parameter) -> Any:
    """A state of the parameter's own shape is sharded as it is; a step count is not."""
    same = isinstance(value, Tensor) and value.shape == local(parameter).shape and value.dim() > 0
    return like(value, parameter) if same else value


def sharded_as(model: nn.Module, optimizer: Any) -> Callable[[str, list[int]], Tensor | None]:
    """Return, for a tensor's name and shape in a checkpoint, the one of this run that is sharded as it shall be."""
    known = {f"model/{name}": tensor for name, tensor in model.state_dict().items() if hasattr(tensor, "placements")}
    owners: dict[str, Any] = {}
    average: dict[str, Any] = {}
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "placements"):
            average[f"average/{name}"] = parameter
    for index, parameter in enumerate(getattr(optimizer, "shards", {})):
        owners[f"optimizer/state/{index}"] = parameter

    def find(name: str, shape: list[int]) -> Tensor | None:
        tensor = known.get(name, average.get(name))
        if tensor is None:
            owner = owners.get(name.rpartition("/")[0])
            tensor = owner if owner is not None and list(owner.shape) == shape and shape else None
        return tensor if tensor is not None and hasattr(tensor, "placements") else None

    return find


def is_sharded(model: nn.Module) -> bool:
    """Tell whether any parameter lives on several ranks."""
    return any(hasattr(parameter, "placements") for parameter in model.parameters())

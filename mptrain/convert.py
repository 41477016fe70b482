"""Select modules by full-match regex and swap them for others that share their parameters.

Parameters are moved, never cloned: ties and ``requires_grad`` survive, and an optimizer built before or after the
swap sees the same tensors. Every module looked at is in the report, with the reason if it was left alone: other
libraries stop at the first layer that does not fit and leave its siblings unconverted without a word.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

HOOKS = (  # where nn.Module keeps its hooks; the dicts themselves move, for a hook's handle refers to its dict
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


@dataclass(frozen=True)
class ConversionReport:
    """Which layers were converted, and why each of the others was kept (name -> reason)."""

    converted: tuple[str, ...] = ()
    kept: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        reasons: dict[str, list[str]] = {}
        for name, why in self.kept.items():
            reasons.setdefault(why, []).append(name)
        parts = [f"{len(self.converted)} linear layers converted"]
        for why, names in reasons.items():
            shown = ", ".join(names[:3]) + (f", ... ({len(names)})" if len(names) > 3 else "")
            parts.append(f"kept {shown}: {why}")
        return "; ".join(parts)


def select(
    model: nn.Module, keep: str, *, multiple: int, setting: str = "precision.keep", keep_default: str = ""
) -> tuple[dict[str, nn.Linear], dict[str, str]]:
    """The linear layers to convert, and the kept ones with the reason.

    ``keep`` and ``keep_default`` are full-match regexes (``blocks.2`` does not hit ``blocks.20``), set by ``setting``
    and ``setting_default``; ``multiple``: both dimensions of the weight must be divisible by it (16 for FP8 GEMMs on
    tensor cores). A layer with several names goes by its first, and is kept if any of them matches. A subclass that
    computes something else than ``nn.Linear`` is kept.
    """
    asked = {setting: keep, f"{setting}_default": keep_default}
    patterns = {which: re.compile(regex) for which, regex in asked.items() if regex}
    chosen: dict[str, nn.Linear] = {}
    kept: dict[str, str] = {}
    for module, names in _names(model).items():
        if not isinstance(module, nn.Linear):
            continue
        name = names[0]
        if name == "":
            kept["(root)"] = "the model itself is the layer and cannot be swapped: wrap it in nn.Sequential"
        elif any(matches := [which for which, one in patterns.items() if any(map(one.fullmatch, names))]):
            kept[name] = f"matches {matches[0]}"
        elif type(module).forward is not nn.Linear.forward:
            kept[name] = f"{type(module).__name__} has a forward of its own, which a swap would drop"
        elif "weight" not in module._parameters:
            kept[name] = "its weight is computed from other parameters (parametrized) and cannot be shared"
        elif module.in_features % multiple or module.out_features % multiple:
            size = f"{module.out_features}x{module.in_features}"
            kept[name] = f"{size} is not divisible by {multiple}, which FP8 GEMMs need"
        else:
            chosen[name] = module
    return chosen, kept


def swap(model: nn.Module, chosen: dict[str, nn.Linear], make: Callable[[str, nn.Linear], nn.Module]) -> None:
    """Replace each chosen layer by ``make(name, layer)``, which must hold the very same parameters.

    A layer reached by several names is made once and put in all of its places, so that shared modules stay shared.
    """
    names = _names(model)
    for name, old in chosen.items():
        new = make(name, old)
        assert getattr(new, "weight", None) is old.weight, f"{name}: a swap must share the weight, not copy it"
        new.train(old.training)
        for hooks in HOOKS:
            setattr(new, hooks, getattr(old, hooks))
        for alias in names[old]:
            parent, _, leaf = alias.rpartition(".")
            setattr(model.get_submodule(parent), leaf, new)


def parameter_names(model: nn.Module) -> dict[nn.Parameter, str]:
    """Every trained parameter with its name, in the order of the model.

    One with several names (a head tied to the embedding) goes by that of the linear layer, which multiplies by it.
    """
    names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if isinstance(module, nn.Linear) and weight in names:
            names[weight] = f"{name}.weight" if name else "weight"
    return names


def _names(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Every module with all of its names, in the order of the model."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return names

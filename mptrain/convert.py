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


def select(model: nn.Module, keep: str, *, multiple: int) -> tuple[dict[str, nn.Linear], dict[str, str]]:
    """The linear layers to convert, and the kept ones with the reason.

    ``keep`` is a full-match regex (``blocks.2`` does not hit ``blocks.20``); ``multiple``: both dimensions of the
    weight must be divisible by it (16 for FP8 GEMMs on tensor cores).
    """
    pattern = re.compile(keep)
    chosen: dict[str, nn.Linear] = {}
    kept: dict[str, str] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        if name == "":
            kept["(root)"] = "the model itself is the layer and cannot be swapped: wrap it in nn.Sequential"
        elif keep and pattern.fullmatch(name):
            kept[name] = "matches precision.keep"
        elif module.in_features % multiple or module.out_features % multiple:
            size = f"{module.out_features}x{module.in_features}"
            kept[name] = f"{size} is not divisible by {multiple}, which FP8 GEMMs need"
        else:
            chosen[name] = module
    return chosen, kept


def swap(model: nn.Module, chosen: dict[str, nn.Linear], make: Callable[[str, nn.Linear], nn.Module]) -> None:
    """Replace each chosen layer by ``make(name, layer)``, which must hold the very same parameters.

    A layer reached by several names is made once, so that shared modules stay shared.
    """
    made: dict[int, nn.Module] = {}
    for name, old in chosen.items():
        new = made.get(id(old)) or made.setdefault(id(old), make(name, old))
        assert getattr(new, "weight", None) is old.weight, f"{name}: a swap must share the weight, not copy it"
        new.train(old.training)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new)

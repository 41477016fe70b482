"""Select modules by full-match regex, to be converted in place or swapped for others that share their parameters.

Every module that holds a matrix is in the report, with the reason if it was left alone: other libraries stop at the
first layer that does not fit and leave its siblings unconverted without a word. What a conversion could not keep (a
method, a buffer, a forward of its own) is such a reason.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

HOOKS = (  # where nn.Module keeps its hooks; the dicts themselves move, for a hook's handle refers to its dict
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
OTHERS: tuple[tuple[Any, str], ...] = (  # what holds matrices and is not a linear layer, and why it is left alone
    ((nn.Embedding, nn.EmbeddingBag), "an embedding looks rows up and multiplies nothing"),
    (nn.modules.conv._ConvNd, "a convolution: there is no FP8 product for it here"),
    ((nn.RNNBase, nn.RNNCellBase), "recurrent: torch multiplies inside one operator"),
    (nn.MultiheadAttention, "torch multiplies its projections inside MultiheadAttention"),
    ((nn.Bilinear,), "bilinear: there is no FP8 product for it here"),
)
NO_PRODUCT = (ParametrizationList, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase, nn.PReLU)


@dataclass(frozen=True)
class ConversionReport:
    """Which layers were converted, and why each other module that holds a matrix was kept (name -> reason).

    ``others``: those of the kept that are not linear layers, and were never meant to be converted.
    """

    converted: tuple[str, ...] = ()
    kept: dict[str, str] = field(default_factory=dict)
    others: frozenset[str] = frozenset()

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
    model: nn.Module,
    keep: str,
    *,
    multiple: int,
    setting: str = "precision.keep",
    keep_default: str = "",
    replaced: bool = False,
) -> tuple[dict[str, nn.Linear], dict[str, str]]:
    """The linear layers to convert, and the kept ones with the reason.

    ``keep`` and ``keep_default`` are full-match regexes (``blocks.2`` does not hit ``blocks.20``), set by ``setting``
    and ``setting_default``; ``multiple``: both dimensions of the weight must be divisible by it (16 for FP8 GEMMs on
    tensor cores). A layer with several names goes by its first, and is kept if any of them matches. ``replaced``:
    another module will stand in the layer's place, and only a plain ``nn.Linear`` can be moved into one.
    """
    asked = {setting: keep, f"{setting}_default": keep_default}
    patterns = {which: re.compile(regex) for which, regex in asked.items() if regex}
    inner = {id(module.out_proj) for module in model.modules() if isinstance(module, nn.MultiheadAttention)}
    chosen: dict[str, nn.Linear] = {}
    kept: dict[str, str] = {}
    for module, names in _names(model).items():
        if not (isinstance(module, nn.Linear) or (is_conv1d(module) and setting == "precision.keep")):
            continue
        layer: Any = module
        name = names[0]
        matches = [which for which, one in patterns.items() if any(map(one.fullmatch, names))]
        if name == "":
            kept["(root)"] = "the model itself is the layer and cannot be swapped: wrap it in nn.Sequential"
        elif matches:
            kept[name] = f"matches {matches[0]}"
        elif id(module) in inner:
            kept[name] = "MultiheadAttention multiplies by its weight and never calls it"
        elif reason := _unfit(module) or (_unmovable(module) if replaced else ""):
            kept[name] = reason
        elif any(size % multiple for size in layer.weight.shape):
            rows, columns = reversed(layer.weight.shape) if is_conv1d(module) else layer.weight.shape
            kept[name] = f"{rows}x{columns} is not divisible by {multiple}, which FP8 GEMMs need"
        else:
            chosen[name] = layer
    return chosen, kept


def is_conv1d(module: nn.Module) -> bool:
    """Tell whether it is transformers' Conv1D: a linear layer with its weight stored [in, out]."""
    return any(
        kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils" for kind in type(module).__mro__
    )


def _unfit(module: nn.Module) -> str:
    """Why the layer cannot be given another forward; empty: it can."""
    kind = type(module)
    plain: Any = next((one for one in kind.__mro__ if one is nn.Linear or one.__name__ == "Conv1D"), nn.Linear)
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance, which a conversion would drop"
    if kind.forward is not plain.forward:
        return f"{kind.__name__} has a forward of its own, which a swap would drop"
    if kind.__call__ is not nn.Module.__call__:
        return f"{kind.__name__} has a __call__ of its own, which may compute something else"
    if "weight" not in module._parameters:
        return "its weight is computed from other parameters (parametrized) and cannot be shared"
    return ""


def _unmovable(module: nn.Module) -> str:
    """Name what another module in the layer's place would lack; empty: nothing."""
    if is_conv1d(module):
        return "transformers' Conv1D stores its weight transposed: only precision.backend=emulated takes it"
    if type(module) is not nn.Linear:
        return f"{type(module).__name__} is a subclass of nn.Linear, whose methods a swap would drop"
    if any(getattr(module, hooks) for hooks in STATE_HOOKS):
        return "it has hooks on its state_dict, which a swap would drop"
    extra = [*module._buffers, *module._modules, *(n for n in module._parameters if n not in ("weight", "bias"))]
    extra += [name for name in module.__dict__ if name not in _PLAIN]
    return f"it holds {', '.join(extra)} besides weight and bias, which a swap would drop" if extra else ""


_PLAIN = frozenset(nn.Linear(1, 1, device="meta").__dict__)


def other_matrices(model: nn.Module, seen: Callable[[str], bool]) -> dict[str, str]:
    """The modules with parameters of two and more dimensions that are not linear layers, and why they are left alone.

    ``seen(name)``: is it in the report already?
    """
    matrices: dict[str, str] = {}
    for name, module in model.named_modules():
        sizes = [tuple(p.shape) for p in module._parameters.values() if p is not None and p.ndim >= 2]
        if not sizes or seen(name or "(root)") or isinstance(module, (nn.Linear, *NO_PRODUCT)) or is_conv1d(module):
            continue
        shown = " and ".join("x".join(map(str, size)) for size in sizes[:2])
        reason = next((why for kinds, why in OTHERS if isinstance(module, kinds)), "")
        matrices[name or "(root)"] = reason or f"{type(module).__name__} multiplies by its own {shown}: no nn.Linear"
    return matrices


def _pass_by(module: nn.Module, args: Any, out: Any) -> None:
    """A hook that does nothing: torch's fused encoder layer runs modules that have hooks one by one."""


def leave_fast_path(model: nn.Module, converted: dict[str, nn.Linear]) -> None:
    """Have torch's encoder call its converted layers in evaluation too, where one fused operator would read their
    weights."""
    layers = set(converted.values())
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoderLayer) and layers & set(encoder.modules()):
            encoder.register_forward_hook(_pass_by)
        if isinstance(encoder, nn.TransformerEncoder) and layers & set(encoder.modules()):
            encoder.enable_nested_tensor = encoder.use_nested_tensor = False


def swap(model: nn.Module, chosen: dict[str, nn.Linear], make: Callable[[str, nn.Linear], nn.Module]) -> None:
    """Replace each chosen layer by ``make(name, layer)``, which must hold the very same parameters.

    Parameters are moved, never cloned: ties and ``requires_grad`` survive, and an optimizer built before or after the
    swap sees the same tensors. A layer reached by several names is made once and put in all of its places, so that
    shared modules stay shared.
    """
    names = _names(model)
    for name, old in chosen.items():
        new = make(name, old)
        assert getattr(new, "weight", None) is old.weight, f"{name}: a swap must share the weight, not copy it"
        new.train(old.training)
        for hooks in (*HOOKS, "_is_full_backward_hook"):
            setattr(new, hooks, getattr(old, hooks))
        for alias in names[old]:
            parent, _, leaf = alias.rpartition(".")
            setattr(model.get_submodule(parent), leaf, new)


def _names(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Every module with all of its names, in the order of the model."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return names

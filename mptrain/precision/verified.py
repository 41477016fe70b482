"""Trust in a conversion comes when its layers ran: a report of every matrix, and a word about layers that are bypassed.

Code that reads ``layer.weight`` and multiplies by it itself never calls the layer, and trains it unquantized.
"""

from __future__ import annotations

import warnings
from dataclasses import replace

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from mptrain.formats import Format
from mptrain.precision.convert import ConversionReport, other_matrices
from mptrain.precision.policy import PrecisionPolicy


def require_masters(model: nn.Module, policy: PrecisionPolicy) -> None:
    """Raise ValueError for trained parameters below FP32, and frozen ones that the policy would not widen."""
    wide = policy.compute in (Format.fp32, Format.tf32) and not policy.quantized
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise ValueError(f"{name} has no size yet: run one batch through the model before prepare")
        if not parameter.is_floating_point() or parameter.dtype is torch.float32:
            continue
        if parameter.requires_grad or parameter.dtype is torch.float64:
            raise ValueError(
                f"{name} is {parameter.dtype}: parameters are the FP32 master weights, call model.float() first"
            )
        if wide:
            raise ValueError(
                f"{name} is {parameter.dtype} and frozen, and precision={policy.name} multiplies in FP32: "
                "use precision=bf16, or call model.float() first"
            )


def reported(model: nn.Module, report: ConversionReport, *, quantized: bool) -> ConversionReport:
    """Complete the report of a policy that converts with all other modules that hold a matrix."""
    if not quantized:
        return report
    converted = frozenset(report.converted)
    others = other_matrices(model, lambda name: name in converted or name in report.kept)
    return replace(report, kept={**report.kept, **others}, others=frozenset(others))


class Unseen:
    """Know the converted layers that have not multiplied yet: ``layers``, by name."""

    def __init__(self, model: nn.Module, report: ConversionReport) -> None:
        self.layers = {name: model.get_submodule(name) for name in report.converted}

    def check(self, policy: PrecisionPolicy) -> None:
        """Warn, once and before an optimizer step, of layers whose weight has a gradient and that never ran quantized.

        A layer without a gradient may yet run (an expert that no token reached).
        """
        self.layers = {name: layer for name, layer in self.layers.items() if not _ran(layer)}
        bypassed = [name for name, layer in self.layers.items() if getattr(layer.weight, "grad", None) is not None]
        if not bypassed:
            return
        for name in bypassed:
            del self.layers[name]
        shown = ", ".join(bypassed[:3]) + (f", ... ({len(bypassed)})" if len(bypassed) > 3 else "")
        warnings.warn(
            f"{shown}: converted to precision={policy.name}, but trained in {policy.compute}: the layer is not called "
            "inside precision.forward(); something multiplies by its .weight, or runs the model outside that context",
            stacklevel=3,
        )


def is_converted(model: nn.Module) -> bool:
    """Tell whether ``model`` holds a layer that quantizes."""
    books = (getattr(layer, "booking", None) or getattr(layer, "quantizers", None) for layer in model.modules())
    return any(hasattr(one, "bypassed") for one in books)


def _ran(layer: nn.Module) -> bool:
    books = getattr(layer, "booking", None) or layer.quantizers
    return bool(books.ran)  # type: ignore[union-attr]

"""Mixed-precision training of PyTorch models, with the evidence beside it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mptrain.distributed import ALONE, World
    from mptrain.formats import Format, FormatSpec
    from mptrain.precision.convert import ConversionReport
    from mptrain.precision.outcome import StepOutcome, StepRecord
    from mptrain.precision.policy import LossScale, PrecisionPolicy, Quantization
    from mptrain.precision.runtime import Precision
    from mptrain.precision.scaling import LossScaler, ScaleEvent

__version__ = "0.1.0"
__all__ = [
    "ALONE",
    "ConversionReport",
    "Format",
    "FormatSpec",
    "LossScale",
    "LossScaler",
    "Precision",
    "PrecisionPolicy",
    "Quantization",
    "ScaleEvent",
    "StepOutcome",
    "StepRecord",
    "World",
]
_HOMES = {  # imported when asked for: torch takes two seconds, and ``mptrain --help`` needs none of it
    "mptrain.distributed": ("ALONE", "World"),
    "mptrain.formats": ("Format", "FormatSpec"),
    "mptrain.precision.convert": ("ConversionReport",),
    "mptrain.precision.outcome": ("StepOutcome", "StepRecord"),
    "mptrain.precision.policy": ("LossScale", "PrecisionPolicy", "Quantization"),
    "mptrain.precision.runtime": ("Precision",),
    "mptrain.precision.scaling": ("LossScaler", "ScaleEvent"),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(home), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

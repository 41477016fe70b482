"""Mixed-precision training of PyTorch models, with the evidence beside it."""

from mptrain.convert import ConversionReport
from mptrain.distributed import ALONE, World
from mptrain.formats import Format, FormatSpec
from mptrain.outcome import StepOutcome, StepRecord
from mptrain.policy import LossScale, PrecisionPolicy, Quantization
from mptrain.precision import Precision
from mptrain.scaling import LossScaler, ScaleEvent

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

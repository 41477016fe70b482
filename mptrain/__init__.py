"""Mixed-precision training of PyTorch models, with the evidence beside it."""

from mptrain.distributed import ALONE, World
from mptrain.formats import Format, FormatSpec
from mptrain.precision import Precision
from mptrain.precision.convert import ConversionReport
from mptrain.precision.outcome import StepOutcome, StepRecord
from mptrain.precision.policy import LossScale, PrecisionPolicy, Quantization
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

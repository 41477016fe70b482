"""The report of a quantization: format, bytes and error of each weight, and why others were left unquantized."""

from __future__ import annotations

from dataclasses import dataclass, field

BYTES_FP32 = 4


@dataclass
class Layer:
    """A weight of two or more dimensions.

    ``bytes``: as stored in a file, with scales and zero points, INT4 two to a byte. ``sqnr_db``: of the quantized
    weight against the original (infinite: the same bits); None if it was not quantized. ``kept``: why it was not.
    """

    name: str
    format: str
    elements: int
    bytes: int
    bytes_fp32: int
    sqnr_db: float | None = None
    kept: str = ""


@dataclass
class Report:
    """``layers``: quantized and not, in the order of the model.

    ``rest_``: biases and norms. A tied weight counts once.
    """

    method: str
    group_size: int | None
    layers: list[Layer] = field(default_factory=list)
    rest_elements: int = 0
    rest_bytes: int = 0

    @property
    def quantized(self) -> list[Layer]:
        return [layer for layer in self.layers if not layer.kept]

    @property
    def kept(self) -> list[Layer]:
        return [layer for layer in self.layers if layer.kept]

    @property
    def quantized_frac(self) -> float:
        """Bytes of the quantized layers' weights over those in FP32."""
        return sum(layer.bytes for layer in self.quantized) / sum(layer.bytes_fp32 for layer in self.quantized)

    @property
    def bytes(self) -> int:
        """Sum the bytes of the whole model."""
        return sum(layer.bytes for layer in self.layers) + self.rest_bytes

    @property
    def bytes_fp32(self) -> int:
        """Sum the bytes of the whole model, were all of it FP32."""
        return sum(layer.bytes_fp32 for layer in self.layers) + BYTES_FP32 * self.rest_elements

    @property
    def frac(self) -> float:
        """Bytes of the whole model over those in FP32."""
        return self.bytes / self.bytes_fp32


def reasons(why_by_name: dict[str, str]) -> str:
    """Group names by their reason: ``a, b: why; c: why``."""
    groups: dict[str, list[str]] = {}
    for name, why in why_by_name.items():
        groups.setdefault(why, []).append(name)
    parts = []
    for why, names in groups.items():
        shown = ", ".join(names[:3]) + (f", ... ({len(names)})" if len(names) > 3 else "")
        parts.append(f"{shown}: {why}")
    return "; ".join(parts)

"""Bytes of weights in a deployment format: elements, the scales beside them, and the layers kept in a wider one."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from mptrain.formats import Format
from mptrain.memory.inference.architecture import Part
from mptrain.tools.settings import did_you_mean

KEEP = r"(.*\.)?(embed|position|head|router)"  # what the precision recipes keep, and quantized releases do


@dataclass(frozen=True)
class WeightFormat:
    """The storage of a matrix. ``block``: rows and columns that share a scale of format ``scale`` (0: all of them);
    ``tensor_scale``: one more FP32 value per matrix."""

    name: str
    element: Format
    scale: Format | None = None
    block: tuple[int, int] = (0, 0)
    tensor_scale: bool = False

    @property
    def quantized(self) -> bool:
        return self.scale is not None

    def matrix(self, rows: int, columns: int) -> tuple[int, int]:
        """(bytes of elements, bytes of scales) of one matrix; both are rounded up to whole bytes."""
        elements = _bytes(rows * columns, self.element)
        if self.scale is None:
            return elements, 0
        high, wide = self.block
        blocks = -(-rows // (high or rows)) * -(-columns // (wide or columns))
        return elements, _bytes(blocks, self.scale) + 4 * self.tensor_scale

    @property
    def described(self) -> str:
        """``int4, an fp16 scale for each 1 x 128``."""
        if self.scale is None:
            return self.name
        high, wide = (str(size or "all") for size in self.block)
        shared = "row" if self.block == (1, 0) else f"{high} x {wide}"
        return f"{self.name}: {self.element} with {self.scale} scales, one a {shared}"


ROW, GROUP = (1, 0), (1, 128)
FORMATS = {
    one.name: one
    for one in (
        WeightFormat("fp32", Format.fp32),
        WeightFormat("bf16", Format.bf16),
        WeightFormat("fp16", Format.fp16),
        WeightFormat("fp8", Format.fp8_e4m3, Format.fp32, ROW),
        WeightFormat("fp8-block", Format.fp8_e4m3, Format.fp32, (128, 128)),  # DeepSeek-V3's own checkpoint
        WeightFormat("int8", Format.int8, Format.fp32, ROW),
        WeightFormat("int4", Format.int4, Format.fp16, GROUP),
        WeightFormat("mxfp8", Format.fp8_e4m3, Format.e8m0, (1, 32)),
        WeightFormat("mxfp4", Format.fp4_e2m1, Format.e8m0, (1, 32)),
        WeightFormat("nvfp4", Format.fp4_e2m1, Format.fp8_e4m3, (1, 16), tensor_scale=True),
    )
}
WIDE = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class Weights:
    """Bytes of all weights: elements of matrices, their scales, and what stays in the wider format."""

    quantized: int
    scales: int
    kept: int
    kept_layers: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        return self.quantized + self.scales + self.kept


def weight_format(name: str, group_size: int = 0) -> WeightFormat:
    """The format of that name; ``group_size`` (0: the format's own) replaces INT4's and INT8's groups along a row."""
    if name not in FORMATS:
        raise ValueError(f"--format={name} is unknown{did_you_mean(name, [*FORMATS])}")
    known = FORMATS[name]
    if group_size and known.element.value.integer:
        return replace(known, block=(1, group_size), scale=Format.fp16)
    return known


def pattern(keep: str) -> re.Pattern[str]:
    """``keep`` compiled. ValueError for what is not a regular expression."""
    try:
        return re.compile(keep)
    except re.error as error:
        raise ValueError(f"--keep={keep} is not a regular expression ({error}): e.g. 'head|embed|blocks.0'") from error


def kept(part: Part, keep: re.Pattern[str]) -> bool:
    """Tell whether ``keep`` matches in full the part's group, its name, or that of a module it is in."""
    words = part.name.split(".")
    names = [".".join(words[: count + 1]) for count in range(len(words))]
    return bool(keep.pattern) and any(keep.fullmatch(name) for name in (part.group, part.alias, *names) if name)


def weigh(parts: Iterable[Part], fmt: WeightFormat, keep: str, keep_format: str) -> Weights:
    """Bytes of every part: matrices in ``fmt``, kept ones, biases and norms in ``keep_format``.

    A format that is not quantized holds everything itself. ValueError if ``keep`` matches no layer (nor is empty), or
    all of them.
    """
    wide = FORMATS[keep_format]
    if not fmt.quantized:
        return Weights(sum(_bytes(part.elements, fmt.element) for part in parts), 0, 0)
    chosen, quantized, scales, rest = pattern(keep), 0, 0, 0
    layers: dict[str, None] = {}
    for part in parts:
        rest += _bytes(part.vectors, wide.element)
        if part.matrix_elements and kept(part, chosen):
            rest += _bytes(part.matrix_elements, wide.element)
            layers[re.sub(r"\.\d+\.", ".*.", part.name)] = None
        elif part.matrix_elements:
            elements, beside = fmt.matrix(part.rows, part.columns)
            quantized, scales = quantized + part.copies * elements, scales + part.copies * beside
    if keep and not layers:
        raise ValueError(f"--keep={keep} matches no layer: e.g. 'head|embed', 'attention', 'blocks.0.mlp'; '' for none")
    if not quantized:
        raise ValueError(f"--keep={keep} keeps every layer out of {fmt.name}: match fewer of them")
    return Weights(quantized, scales, rest, tuple(layers))


def _bytes(elements: int, fmt: Format) -> int:
    return -(-elements * fmt.value.bits // 8)

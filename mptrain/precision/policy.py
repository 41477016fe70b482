"""A precision as data: frozen, validated values that print themselves. No torch state lives here.

A policy says which formats the numbers pass through; a backend (``mptrain.precision.backends``) owns the kernels that
do it, and :class:`mptrain.Precision` binds both to a live model. FP16, BF16 and FP8 differ only in this data. The null
objects are ``LossScale(kind=none)`` and ``Quantization(scaling=none)``; nothing here is Optional.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from mptrain.formats import Format
from mptrain.tools import registry
from mptrain.tools.settings import did_you_mean, from_plain, require

COMPUTE_FORMATS = (Format.fp32, Format.tf32, Format.bf16, Format.fp16)
FP8_FORMATS = (Format.fp8_e4m3, Format.fp8_e5m2)
BLOCK = 128


AUTO = "auto"  # precision.backend: the first that is there


class LossScaleKind(Enum):
    none = "none"
    static = "static"
    dynamic = "dynamic"


class Scaling(Enum):
    """Where the scale of a quantized tensor comes from (granularity included)."""

    none = "none"
    delayed = "delayed"  # per tensor, from the amaxes of the last `history` micro-batches
    current = "current"  # per tensor, from its own amax
    rowwise = "rowwise"  # one per row / column of each GEMM operand, powers of two
    block = "block"  # one per 1x128 of activations and gradients, 128x128 of weights, powers of two


@dataclass(frozen=True)
class LossScale:
    """Loss scaling. Defaults: torch's init, growth and interval; Megatron's hysteresis and floor.

    ``hysteresis`` overflows (they need not be consecutive) are tolerated before the scale backs off; the count
    refills when the scale grows. ``floor`` is where the scale stops falling, with an alarm: torch's GradScaler
    has none, decays to exactly 0 and then skips every step for ever.
    """

    kind: LossScaleKind = LossScaleKind.none
    init: float = 2.0**16
    growth: float = 2.0
    backoff: float = 0.5
    interval: int = 2000
    hysteresis: int = 2
    floor: float = 1.0

    def __post_init__(self) -> None:
        if self.kind is LossScaleKind.none:
            return
        largest, smallest = Format.fp32.value.max, Format.fp32.value.min_normal  # the scale is an FP32 number
        require(0 < self.init <= largest, "precision.loss_scale.init", self.init, "above 0 and finite, e.g. 65536")
        require(1 < self.growth <= largest, "precision.loss_scale.growth", self.growth, "more than 1, e.g. 2")
        require(0 < self.backoff < 1, "precision.loss_scale.backoff", self.backoff, "between 0 and 1, e.g. 0.5")
        require(self.interval >= 1, "precision.loss_scale.interval", self.interval, "at least 1, e.g. 2000")
        require(self.hysteresis >= 1, "precision.loss_scale.hysteresis", self.hysteresis, "at least 1, e.g. 2")
        reachable = smallest <= self.floor <= self.init
        require(reachable, "precision.loss_scale.floor", self.floor, "from 1.2e-38 (FP32) to init, e.g. 1")


@dataclass(frozen=True)
class Quantization:
    """Low-precision GEMM operands: ``forward`` for input and weight, ``backward`` for grad_output.

    ``history`` and ``warm_start`` matter to delayed scaling only; ``margin`` divides every scale by 2^margin.
    ``warm_start`` fills an empty history from the current amax: Transformer Engine's first scale of 1 flushed up
    to 86 % of grad_output to zero in E5M2 (10 M GPT, measured); ``warm_start=false`` reproduces it.
    """

    scaling: Scaling = Scaling.none
    forward: Format = Format.fp8_e4m3
    backward: Format = Format.fp8_e5m2
    history: int = 1024
    margin: int = 0
    warm_start: bool = True

    def __post_init__(self) -> None:
        if self.scaling is Scaling.none:
            return
        for role, fmt in (("forward", self.forward), ("backward", self.backward)):
            require(fmt in FP8_FORMATS, f"precision.quantization.{role}", fmt, "fp8_e4m3 or fp8_e5m2")
        require(self.history >= 1, "precision.quantization.history", self.history, "at least 1, e.g. 1024")
        require(-16 <= self.margin <= 16, "precision.quantization.margin", self.margin, "from -16 to 16, usually 0")

    def format_of(self, role: str) -> Format:
        """The format of a GEMM operand: role is ``input``, ``weight`` or ``grad_output``."""
        return self.backward if role == "grad_output" else self.forward

    @property
    def fine(self) -> bool:
        """Tell whether an operand has many scales."""
        return self.scaling in (Scaling.rowwise, Scaling.block)

    def tile_of(self, role: str, dim: int) -> tuple[int, int]:
        """(height, width) of the parts of an operand (a matrix) that share a scale; 0 for all of that dimension.

        ``dim``: the dimension that the GEMM sums over, 1 for output and grad_input, 0 for the operand's other GEMM.
        """
        if not self.fine:
            return 0, 0
        run = 0 if self.scaling is Scaling.rowwise else BLOCK
        if run and role == "weight":
            return run, run
        return (1, run) if dim == 1 else (run, 1)

    @property
    def multiple(self) -> int:
        """Both dimensions of a weight must be divisible by it: what tensor cores ask, or whole tiles."""
        return BLOCK if self.scaling is Scaling.block else 16


@dataclass(frozen=True)
class PrecisionPolicy:
    """A precision: formats, loss scaling, quantization, kernels asked for, and the modules left alone.

    ``compute``: the format of GEMMs that are not quantized and of activations. ``reduce``: the format of gradient
    reduction between ranks. ``keep``: a full-match regex of module names that stay in ``compute``, besides those of
    ``keep_default``, which the recipes set (embeddings, head, router).
    Master weights, gradient accumulation, norms and optimizer state are FP32 in every policy; but weights that the
    optimizer stores in BF16 (``optim.weights``) have BF16 gradients, which add up so over micro-batches.
    """

    name: str = "fp32"
    compute: Format = Format.fp32
    reduce: Format = Format.fp32
    loss_scale: LossScale = field(default_factory=LossScale)
    quantization: Quantization = field(default_factory=Quantization)
    backend: str = AUTO
    keep: str = ""
    keep_default: str = ""

    def __post_init__(self) -> None:
        if self.backend != AUTO and self.backend not in registry.kinds("mptrain.precision.backends"):
            known = [AUTO, *registry.kinds("mptrain.precision.backends")]
            raise ValueError(f"precision.backend={self.backend} is unknown{did_you_mean(self.backend, known)}")
        require(self.compute in COMPUTE_FORMATS, "precision.compute", self.compute, "fp32, tf32, bf16 or fp16")
        require(self.reduce in (Format.fp32, Format.bf16, Format.fp16), "precision.reduce", self.reduce, "fp32 or bf16")
        if self.quantized:
            narrow = self.compute in (Format.bf16, Format.fp32)
            require(narrow, "precision.compute", self.compute, "bf16 (or fp32) beside quantized GEMMs")
        for setting in ("keep", "keep_default"):
            pattern = getattr(self, setting)
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"precision.{setting}={pattern!r} is not a regular expression: {error}") from error

    @property
    def quantized(self) -> bool:
        return self.quantization.scaling is not Scaling.none

    @property
    def flow(self) -> str:
        """The way of the numbers through one step, in three lines for the terminal."""
        gemm = str(self.compute)
        if self.quantized:
            q = self.quantization
            gemm = f"{q.forward} x {q.forward} forward, {q.backward} x {q.forward} backward, {q.scaling.value} scaling"
        cast = "no cast" if self.compute is Format.fp32 and not self.quantized else f"cast to {self.compute}"
        scale = self.loss_scale
        loss = "unscaled loss" if scale.kind is LossScaleKind.none else f"{scale.kind.value} loss scale {scale.init:g}"
        return (
            f"weights fp32 (masters) -> {cast} -> GEMMs {gemm}, fp32 accumulation\n"
            f"{loss} -> gradients fp32, reduced in {self.reduce} -> found_inf on all ranks -> clip\n"
            "optimizer in fp32 on the masters, or the step is skipped and recorded"
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PrecisionPolicy:
        """Build from plain nested values (a YAML file). ValueError names an unknown key and its nearest match."""
        policy: PrecisionPolicy = from_plain(cls, values, "precision")
        return policy

    @classmethod
    def named(cls, name: str | Path) -> PrecisionPolicy:
        """The recipe ``conf/precision/<name>.yaml``, or the YAML file at that path. ValueError if there is none."""
        path = Path(name)
        if path.suffix not in (".yaml", ".yml"):
            folder = conf_dir() / "precision"
            names = sorted(entry.stem for entry in folder.glob("*.yaml"))
            if str(name) not in names:
                raise ValueError(f"unknown precision {str(name)!r}{did_you_mean(str(name), names)}")
            path = folder / f"{name}.yaml"
        if not path.is_file():
            raise ValueError(f"no precision recipe at {path}: give a name from conf/precision or a YAML file")
        try:
            values = yaml.safe_load(path.read_text())
        except yaml.YAMLError as error:
            raise ValueError(f"precision recipe {path} is not YAML: {' '.join(str(error).split())}") from error
        return cls.from_dict(values)


def conf_dir() -> Path:
    """``conf/`` of the checkout this package is run from, else the copy that ships inside the package."""
    package = Path(__file__).resolve().parent.parent
    checkout = package.parent / "conf"
    return checkout if (checkout / "config.yaml").is_file() else package / "conf"

"""The quantization methods: one row each, with torchao's configuration.

torchao's defaults are kept: a scale is amax / 127.5 (INT8) or amax / 7.5 (INT4) in FP32, so the largest positive
weight clips by half a step; the zero points of symmetric codes are zeros, kept because its tensors have them.
``set_inductor_config`` is off everywhere: it changes settings of the whole process.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from mptrain.quantization.packing import INT2, INT4
from mptrain.tools.quiet import quiet_import
from mptrain.tools.settings import did_you_mean, require

NEEDS = (0, 18)  # torchao version: older ones make other tensors from these configurations
SMALLEST_GROUP = 8
"""Numbers that share a scale: with fewer, scales and zero points weigh more than the codes of INT4."""


@dataclass(frozen=True)
class Method:
    """One way to store the weights of a model's linear layers.

    ``dtype``: of the stored codes, or of the whole model after a cast. ``tensor``: torchao's class of a quantized
    weight; empty for a cast. ``group_default``: numbers that share a scale, None: a row of the weight.
    ``calibrated``: needs batches to observe activations. ``smooth``: SmoothQuant's alpha where activations are
    observed (None moves nothing from activations to weights).
    """

    name: str
    what: str
    weight_bits: int
    dtype: torch.dtype
    tensor: str = ""
    make: Callable[[int | None], Any] | None = None
    grouped: bool = False
    group_default: int | None = None
    multiple: int = 1
    calibrated: bool = False
    smooth: float | None = None

    @property
    def cast(self) -> bool:
        """Whether it changes the dtype of the whole model, without scales."""
        return self.make is None

    def group(self, size: int | None) -> int | None:
        """Return the group size for a requested one. ValueError if the method does not support it."""
        if size is None:
            return self.group_default
        if not self.grouped:
            having = [name for name, other in METHODS.items() if other.grouped]
            raise ValueError(f"{self.name} has no groups: leave --group-size out, or use --to {' or '.join(having)}")
        require(size >= SMALLEST_GROUP, "--group-size", size, f"at least {SMALLEST_GROUP}, e.g. 32 or 128")
        return size

    def config(self, group_size: int | None = None) -> Any:
        """Return torchao's configuration.

        ValueError for a cast, which has none, and for a group size it cannot have.
        """
        if self.make is None:
            raise ValueError(f"{self.name} is a cast and has no configuration in torchao")
        with quiet_import():
            return self.make(self.group(group_size))

    def missing(self, device: torch.device) -> str | None:
        """Return why this cannot be done on this device with what is installed; None if it can."""
        if self.cast:
            return None
        if importlib.util.find_spec("torchao") is None:
            return f'{self.name} needs torchao, which is not installed: pip install "mptrain[native]"'
        version, needed = importlib.metadata.version("torchao"), ".".join(map(str, NEEDS))
        if tuple(int(part) for part in version.split("+")[0].split(".")[:2]) < NEEDS:
            return f"{self.name} needs torchao {needed} or newer, not {version}: pip install -U torchao"
        if self.name == "fp8-dynamic" and not _has_fp8(device):
            where = "a CPU has none" if device.type == "cpu" else "this GPU is older than Ada (compute capability 8.9)"
            return f"fp8-dynamic multiplies in FP8 units and {where}: use --to fp8 (weights only) or int8-dynamic"
        return None


def named(name: str) -> Method:
    """Return the method of this name. ValueError (did you mean ...) for an unknown one."""
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}{did_you_mean(name, [*METHODS])}")
    return METHODS[name]


def missing(name: str, device: torch.device) -> str | None:
    """Return why the method of this name cannot be used on this device; None if it can."""
    return named(name).missing(device)


def _has_fp8(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def _config(name: str, **options: Any) -> Callable[[int | None], Any]:
    """Return a function from group size to torchao's configuration ``name``; an option may be a function of both."""

    def make(size: int | None) -> Any:
        torchao = importlib.import_module("torchao.quantization")
        fixed = {key: option(torchao, size) if callable(option) else option for key, option in options.items()}
        return getattr(torchao, name)(**fixed)

    return make


def _group(torchao: Any, size: int | None) -> Any:
    return torchao.PerGroup(size)


def _row_or_group(torchao: Any, size: int | None) -> Any:
    return torchao.PerRow() if size is None else torchao.PerGroup(size)


def _tensor_and_row(torchao: Any, _: int | None) -> list[Any]:
    """Return the granularities of activations (one fixed scale) and of weights."""
    return [torchao.PerTensor(), torchao.PerRow()]


ALONE = {"set_inductor_config": False}
_int8 = _config("Int8WeightOnlyConfig", granularity=_row_or_group, **ALONE)
_int8_dynamic = _config("Int8DynamicActivationInt8WeightConfig", **ALONE)
_int8_static = _config("Int8StaticActivationInt8WeightConfig", granularity=_tensor_and_row, **ALONE)
_int4 = _config("IntxWeightOnlyConfig", weight_dtype=INT4, granularity=_group)
_int2 = _config("IntxWeightOnlyConfig", weight_dtype=INT2, granularity=_group)
_int4_dynamic = _config("Int8DynamicActivationIntxWeightConfig", weight_dtype=INT4, weight_granularity=_group)
_fp8 = _config("Float8WeightOnlyConfig", granularity=_row_or_group, **ALONE)
_fp8_dynamic = _config("Float8DynamicActivationFloat8WeightConfig", **ALONE)

INT8 = partial(Method, weight_bits=8, dtype=torch.int8, tensor="Int8Tensor")
INTX = partial(Method, dtype=torch.int8, tensor="IntxUnpackedToInt8Tensor", grouped=True)
FLOAT8 = partial(Method, weight_bits=8, dtype=torch.float8_e4m3fn, tensor="Float8Tensor")
BY_TOKEN, CALIBRATED = "activations INT8 by token", "activations INT8 by a scale from calibration"
SMOOTHED = "the same as int8-dynamic after SmoothQuant moved outliers from activations to weights"
METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("fp32", "as it is", 32, torch.float32),
        Method("bf16", "every weight in BF16", 16, torch.bfloat16),
        Method("fp16", "every weight in FP16", 16, torch.float16),
        INT8("int8", "INT8 weights", make=_int8, grouped=True),
        INT8("int8-dynamic", f"INT8 weights; {BY_TOKEN}", make=_int8_dynamic),
        INT8("int8-static", f"INT8 weights; {CALIBRATED}", make=_int8_static, calibrated=True),
        INT8("int8-smooth", SMOOTHED, make=_int8_dynamic, calibrated=True, smooth=0.5),
        INTX("int4", "INT4 weights in groups", 4, make=_int4, group_default=128),
        INTX("int4-dynamic", f"INT4 weights in groups; {BY_TOKEN}", 4, make=_int4_dynamic, group_default=128),
        INTX("int2", "INT2 weights in groups (with --finetune)", 2, make=_int2, group_default=32),
        FLOAT8("fp8", "FP8 (E4M3) weights", make=_fp8, grouped=True),
        FLOAT8("fp8-dynamic", "FP8 (E4M3) weights and activations", make=_fp8_dynamic, multiple=16),
    )
}

"""Checks before anything is on the device: settings, backend, data, whether they fit each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from mptrain.config import RunConfig, parse_open
from mptrain.data import Dataset
from mptrain.distributed import ALONE, Ranks
from mptrain.distributed.joining import join
from mptrain.distributed.layout import Layout
from mptrain.formats import Format
from mptrain.models import Architecture
from mptrain.precision.backends import resolve
from mptrain.runs import identity
from mptrain.telemetry.drill import Drill
from mptrain.telemetry.peaks import peaks
from mptrain.tools import machine, registry
from mptrain.tools.launcher import world_size


@dataclass(frozen=True)
class Prepared:
    """Everything that is known before anything is on the device. ``shell``: the model on meta, for its sizes."""

    config: RunConfig
    device: torch.device
    data: Dataset
    model_module: Architecture
    model_config: Any
    shell: nn.Module
    fp32_gemm: str
    fingerprint: str
    layout: Layout = field(default_factory=Layout)
    ranks: Ranks = ALONE

    @cached_property
    def gemm_tflops(self) -> dict[str, float]:
        """TFLOP/s by GEMM format: of a GPU the vendor's peaks, of a CPU what one large product reached just now."""
        if self.device.type != "cpu":
            return peaks(self.device)
        used = {Format.fp32: torch.float32}
        if self.config.precision.compute is Format.bf16:
            used[Format.bf16] = torch.bfloat16
        return {str(fmt): machine.gemm_flops_per_s(dtype) / 1e12 for fmt, dtype in used.items()}

    @property
    def units_per_step(self) -> int:
        """Tokens, or images, of an optimizer step."""
        sizes = self.config.trainer
        return int(sizes.batch_size * sizes.accumulate * self.data.units_per_sample)


def prepare(config: RunConfig, say: Callable[[str], None] = lambda text: None) -> Prepared:
    """Check the settings, read the data, fingerprint. Nothing is on the device yet. ValueError names what to change."""
    layout = Layout.of(config.dist, world_size())
    layout.share(config.trainer.batch_size, config.trainer.accumulate, 0)  # refused here if it does not go round
    machine.set_deterministic(config.deterministic)
    device = machine.pick_device(config.device)
    resolve(config.precision, device)
    ranks = join(config.dist, device)
    model_module, model_config = parse_open("mptrain.models", "model", config.model)
    block_size = model_config.block_size
    data_module, data_config = parse_open("mptrain.data", "data", config.data, block_size=block_size)
    _require_same_input(config, model_module.INPUT, data_module.INPUT)
    require_consistent(config, model_config)
    say(f"data: reading {config.data['kind']}")
    data = data_module.build(data_config)
    _, model_config = parse_open("mptrain.models", "model", config.model, **data.sizes)
    _require_room(model_config, data)
    with torch.device("meta"):
        shell = model_module.build(model_config)
    with torch.no_grad():  # shapes that do not fit are refused here, before anything is made
        shell(**{name: tensor.to("meta") for name, tensor in data.train_at([0]).items()})
    if config.debug.inject:
        Drill.parse(config.debug.inject).check(shell)
    fp32_gemm = machine.choose_fp32_gemm(shell, device)
    seen = data.fingerprint + model_config.digest  # of what the model is built from
    mark = identity.fingerprint(config, seen, machine.describe(device), torch.__version__, fp32_gemm)
    return Prepared(config, device, data, model_module, model_config, shell, fp32_gemm, mark, layout, ranks)


def _require_same_input(config: RunConfig, taken: str, given: str) -> None:
    """ValueError when the model takes something else than the data holds, with the kinds that would fit."""
    if taken == given:
        return

    def fitting(package: str, wanted: str) -> str:
        inputs = {kind: registry.load(package, kind).INPUT for kind in registry.kinds(package)}
        return " or ".join(kind for kind, held in inputs.items() if held == wanted)

    raise ValueError(
        f"model.kind={config.model['kind']} takes {taken} and data={config.data['kind']} holds {given}: use "
        f"data={fitting('mptrain.data', taken)}, or a model of kind {fitting('mptrain.models', given)}"
    )


def require_consistent(config: RunConfig, model_config: Any) -> None:
    """ValueError when weights are stored in a format that the precision does not multiply by, or tensor parallelism
    would cut through a head."""
    if config.optim.weights != "fp32" and config.precision.compute is not Format.bf16:
        raise ValueError(
            f"optim.weights={config.optim.weights} stores BF16 weights, which precision={config.precision.name} "
            "does not multiply by: use precision=bf16 or fp8, or optim=adamw (FP32 masters)"
        )
    for name in ("n_head", "n_kv_head"):
        heads, parts = getattr(model_config, name, config.dist.tp), config.dist.tp
        if heads % parts:
            raise ValueError(f"dist.tp={parts} would cut through heads: choose a divisor of model.{name}={heads}")


def _require_room(model_config: Any, data: Dataset) -> None:
    """ValueError when the model was set to be smaller than the data needs (fewer classes, a smaller vocabulary)."""
    for name, size in data.sizes.items():
        if getattr(model_config, name) < size:
            raise ValueError(
                f"model.{name}={getattr(model_config, name)} is less than the {size} of data={data.name}: "
                f"leave it out, or set model.{name}={size}"
            )

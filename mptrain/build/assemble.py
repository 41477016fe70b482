"""A trainer from settings: the model on the device, in its precision, laid out over the ranks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from mptrain.build.preflight import Prepared
from mptrain.checkpoint.checkpoints import Checkpoints
from mptrain.distributed import among, wrap
from mptrain.distributed.compression import Compression
from mptrain.distributed.layout import PARTS
from mptrain.distributed.reduction import Send, plain, summed
from mptrain.formats import Format
from mptrain.loggers import NullSink, Sinks
from mptrain.memory.training.live import buckets_of
from mptrain.optim import Average, Schedule, build_optimizer
from mptrain.precision import Precision
from mptrain.runs import identity
from mptrain.telemetry.audit import StepAudit
from mptrain.telemetry.drill import Drill
from mptrain.telemetry.meters import Throughput
from mptrain.telemetry.monitor import Monitor
from mptrain.telemetry.peaks import peak_tflops
from mptrain.tools.modules import parameter_names
from mptrain.training.extras import Extras
from mptrain.training.trainer import Trainer
from mptrain.training.validation import to_device

REDUCED = {Format.fp32: "none", Format.bf16: "bf16", Format.fp16: "fp16"}  # precision.reduce under ddp


def assemble(
    prepared: Prepared, sink: Sinks | NullSink, checkpoints: Checkpoints | None = None, *, audited: bool = False
) -> Trainer:
    """Put the model on the device, in its precision, with optimizer and meters, and make a trainer of them.

    ``audited``: the products of the first step are looked at.
    """
    config = prepared.config
    with torch.device("meta"):
        model = prepared.model_module.build(prepared.model_config)
    precision = Precision(config.precision, ranks=prepared.ranks)
    placed = _placed(model, prepared, precision)
    if config.trainer.checkpointing:
        model.recompute = precision.recompute  # type: ignore[assignment]
    optimizer = build_optimizer(config.optim, model)
    average = Average(model, config.optim.ema_decay) if config.optim.ema_decay else None
    trainer = Trainer(
        config.trainer,
        model=model,
        precision=precision,
        optimizer=optimizer,
        schedule=Schedule.of(config.optim, config.trainer.max_steps),
        data=prepared.data,
        sink=sink,
        extras=replace(
            _extras(prepared, model, precision, placed),
            average=average,
            checkpoints=checkpoints,
            audit=StepAudit(model, precision, min_coverage=config.audit.min_coverage) if audited else None,
        ),
    )
    buckets = buckets_of(model, config.dist, torch.device("meta"))
    trainer.memory.others = {"communication": buckets, "average": average.shadow if average else []}
    return trainer


def _extras(prepared: Prepared, model: nn.Module, precision: Precision, placed: Placed) -> Extras:
    """The optional parts that follow from the settings."""
    config, ranks = prepared.config, prepared.ranks
    drill = Drill.parse(config.debug.inject) if config.debug.inject else None
    recorded = config.telemetry.record_every > 0
    peak = peak_tflops(prepared.device, "fp8" if config.precision.quantized else str(config.precision.compute))
    about = {"precision": config.precision.name, "fingerprint": prepared.fingerprint, "initial_weights": placed.mark}
    return Extras(
        seed=config.seed,
        every=config.telemetry.every,
        throughput=Throughput(prepared.units_per_step),
        monitor=Monitor(model, precision, config.telemetry, config.trainer.max_steps) if recorded else None,
        drill=drill if drill is not None and drill.rank in (None, ranks.rank) else None,
        wrapped=placed.wrapped,
        run_model=torch.compile(placed.wrapped) if config.trainer.compile else placed.wrapped,  # type: ignore[arg-type]
        compression=placed.compression,
        ranks=ranks,
        share=prepared.layout.share(config.trainer.batch_size, config.trainer.accumulate, ranks.rank),
        masters_whole=config.dist.kind not in ("fsdp", "hsdp") or config.dist.gather == "fp32",
        checkpoint_every=config.checkpoint.every,
        about=about,
        flops_per_token=model.flops_per_token(),  # type: ignore[operator]
        peak_flops_per_s=None if peak is None else peak * 1e12 * ranks.size,
    )


@dataclass(frozen=True)
class Placed:
    """``wrapped``: what is called in the model's place; ``mark``: of its first weights."""

    wrapped: nn.Module
    mark: str
    compression: Compression | None = None


def _placed(model: nn.Module, prepared: Prepared, precision: Precision) -> Placed:
    """A model that is on meta, on its device with the first weights that one process would draw; prepared, wrapped."""
    config = prepared.config
    torch.manual_seed(config.seed)
    if config.dist.kind in ("fsdp", "hsdp") or prepared.layout.parts > 1:
        return _cut_up(model, prepared, precision)
    model.to_empty(device="cpu").reset_parameters()  # type: ignore[operator]
    mark = identity.weights_mark(model)
    precision.prepare(model.to(prepared.device))
    if config.dist.kind == "single":
        return Placed(model, mark)
    mesh = prepared.layout.mesh(prepared.device)
    precision.counters.held_elsewhere = wrap.held_elsewhere({}, mesh)
    names = parameter_names(model)
    kind = config.dist.compress if config.dist.compress != "none" else REDUCED[config.precision.reduce]
    compression = Compression(kind, prepared.ranks, names)
    senders: list[Send] = [plain()]
    wrapped = wrap.replicate(model, mesh, precision.unreduced, lambda bucket: senders[-1](bucket))
    _prime(wrapped, prepared, precision)
    senders.append(summed(compression.send, prepared.ranks.size))
    return Placed(wrapped, mark, compression)


def _cut_up(model: nn.Module, prepared: Prepared, precision: Precision) -> Placed:
    """The same for a model that no rank holds all of: it is cut on meta, and each shard filled where it is."""
    config, device = prepared.config, prepared.device
    precision.prepare(model, device)
    mesh = prepared.layout.mesh(device)
    plan = prepared.model_module.TENSOR_PARALLEL
    formats = config.precision.compute.value.dtype, config.precision.reduce.value.dtype
    cut = wrap.cut_up(model, plan, mesh, config.dist, formats, precision.unreduced)
    wrap.materialize(model, device, model.reset_parameters)  # type: ignore[arg-type]
    precision.counters.held_elsewhere = wrap.held_elsewhere(cut, mesh)
    if cut:
        precision.counters.share = among(mesh[PARTS].get_group())
    return Placed(model, identity.weights_mark(model))


def _prime(wrapped: nn.Module, prepared: Prepared, precision: Precision) -> None:
    """One sample there and back before the first step.

    DDP learns its static graph from it and orders its buckets: else the first step of a resumed run would be summed in
    another order than the same step of one that was not interrupted.
    """
    quiet, precision.counters.quiet = precision.counters.quiet, True
    with precision.backend.forward(policy_on=True):
        loss = wrapped(**to_device(prepared.data.train_at([0]), prepared.device))
    with precision.backend.backward():
        loss.backward()
    wrapped.zero_grad()
    precision.unreduced.clear()
    precision.counters.quiet = quiet

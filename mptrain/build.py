"""The composition root: the only place that knows every concrete class. Settings in, a run ready to fit out.

The order is that of cost: settings, device and backend are checked first, then the data is read and the plan printed,
then FP32 is probed in a process of its own, and only then does this process put a model on the device.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TextIO

import torch
from rich.console import Console

from mptrain import baseline, identity, machine
from mptrain.backends.base import resolve
from mptrain.baseline import Figures
from mptrain.checkpoint import Checkpoints, read_about, require_fit
from mptrain.config import RunConfig
from mptrain.folder import describe, discard, folder_of
from mptrain.loggers import ConsoleSink, JsonLines, NullSink, Sinks
from mptrain.optim import Average, Schedule, build_optimizer
from mptrain.policy import PrecisionPolicy
from mptrain.precision import Precision
from mptrain.prepare import Prepared, prepare
from mptrain.report.terminal import emulation_note, print_lines
from mptrain.run import Run, about
from mptrain.settings import to_plain
from mptrain.telemetry.audit import StepAudit
from mptrain.telemetry.drill import DebugConfig, Drill
from mptrain.telemetry.meters import Throughput, peak_tflops
from mptrain.telemetry.monitor import Monitor
from mptrain.trainer import Trainer
from mptrain.wandb_logger import WandbSink


def build(config: RunConfig, console: Console | None = None) -> Run:
    """Make everything a run needs. ValueError or OSError, naming the setting to change, if it cannot be."""
    console = console or Console()
    start = _resume_path(config)
    prepared = prepare(config, lambda text: console.print(text, highlight=False))
    if start is not None:
        require_fit(start, prepared.shell)
    fp32 = _known_baseline(prepared)
    folder, held = folder_of(config, resumed=start is not None)
    try:
        return _build(prepared, console, folder, held, start, fp32)
    except BaseException:
        discard(folder)
        held.close()
        raise


def _build(
    prepared: Prepared, console: Console, folder: Path, held: TextIO, start: Path | None, fp32: Figures | None
) -> Run:
    config = prepared.config
    _announce(console, prepared, folder, fp32)
    if fp32 is None:
        fp32 = baseline.probe(config, prepared.fingerprint, Path(config.runs_dir), lambda text: console.print(text))
    sinks = Sinks([])
    checkpoints = Checkpoints(folder / "checkpoints", config.checkpoint.keep)
    first = 0 if start is None else int(read_about(start)["step"])
    trainer = assemble(prepared, sinks, checkpoints)
    trainer.audit = StepAudit(trainer.model, trainer.precision, min_coverage=config.audit.min_coverage)
    if config.precision.quantized:
        console.print(f"{trainer.precision.report}; {trainer.precision.backend.carrier}", highlight=False)
    if start is not None:
        trainer.resume(start)
    sinks.sinks.append(JsonLines(folder))
    if config.logger.wandb:
        sinks.sinks.append(WandbSink(folder, config.logger.project, to_plain(config), console, config.logger.group))
    sinks.sinks.append(ConsoleSink(console, config.trainer.max_steps, first, prepared.data.unit))
    describe(folder, about(prepared, trainer))
    return Run(prepared, trainer, sinks, console, folder, held, fp32)


def assemble(prepared: Prepared, sink: Sinks | NullSink, checkpoints: Checkpoints | None = None) -> Trainer:
    """The model on the device, in its precision, with optimizer and meters, inside a trainer."""
    config, data, device, ranks = prepared.config, prepared.data, prepared.device, prepared.ranks
    with torch.device("meta"):
        model = prepared.model_module.build(prepared.model_config)
    precision = Precision(config.precision, ranks=ranks)
    wrapped, mark = wrap(model, prepared, precision)
    if config.trainer.checkpointing:
        model.recompute = precision.recompute
    drill = Drill.parse(config.debug.inject) if config.debug.inject else None
    recorded = config.telemetry.record_every > 0
    peak = peak_tflops(device, "fp8" if config.precision.quantized else str(config.precision.compute))
    share = prepared.layout.share(config.trainer.batch_size, config.trainer.accumulate, ranks.rank)
    optimizer = build_optimizer(config.optim, model)
    return Trainer(
        config.trainer,
        model=model,
        precision=precision,
        optimizer=optimizer,
        schedule=Schedule.of(config.optim, config.trainer.max_steps),
        data=data,
        sink=sink,
        monitor=Monitor(model, precision, config.telemetry, config.trainer.max_steps) if recorded else None,
        throughput=Throughput(prepared.units_per_step),
        average=Average(model, config.optim.ema_decay) if config.optim.ema_decay else None,
        drill=drill,
        seed=config.seed,
        every=config.telemetry.every,
        wrapped=wrapped,
        run_model=torch.compile(wrapped) if config.trainer.compile else wrapped,  # type: ignore[arg-type]
        ranks=ranks,
        share=share,
        masters_whole=config.dist.kind not in ("fsdp", "hsdp") or config.dist.gather == "fp32",
        checkpoints=checkpoints,
        checkpoint_every=config.checkpoint.every,
        about={
            "precision": config.precision.name,
            "fingerprint": prepared.fingerprint,
            "initial_weights": mark,
        },
        flops_per_token=model.flops_per_token(),
        peak_flops_per_s=None if peak is None else peak * 1e12 * ranks.size,
    )


def probe(config: RunConfig) -> Figures:
    """The first steps of the run that ``config`` describes, in FP32: what the probe's process does."""
    quiet = replace(config.telemetry, record_every=0)
    masters = replace(config.optim, weights="fp32", moments="fp32")
    policy = PrecisionPolicy.named("fp32")
    fp32 = replace(config, precision=policy, optim=masters, telemetry=quiet, debug=DebugConfig())
    prepared = prepare(fp32)
    trainer = assemble(prepared, NullSink())
    trainer.fit(until=baseline.PROBE_STEPS)
    return Figures("probe", trainer.losses, trainer.throughput.tokens_per_s(), trainer.memory.peak_gib)


def _known_baseline(prepared: Prepared) -> Figures | None:
    """The FP32 figures that are there without a measurement; None if they must be probed."""
    config, wanted = prepared.config, prepared.fingerprint
    if config.baseline not in ("auto", "none"):
        return baseline.named(Path(config.baseline), config, wanted)
    if config.baseline == "none":
        return Figures(note="baseline=none")
    if config.precision.name == "fp32":
        return Figures(note="this is an FP32 run: later runs of these settings are compared with it")
    beside = [Path(config.run_dir).parent] if config.run_dir else []
    return baseline.find([Path(config.runs_dir), *beside], wanted)


def _resume_path(config: RunConfig) -> Path | None:
    if config.resume == "none":
        return None
    if config.resume != "auto":
        read_about(Path(config.resume))
        return Path(config.resume)
    if not config.run_dir:
        raise ValueError("resume=auto needs run_dir=FOLDER, the run to continue")
    return Checkpoints(Path(config.run_dir) / "checkpoints", config.checkpoint.keep).newest()


def _announce(console: Console, prepared: Prepared, folder: Path, fp32: Figures | None) -> None:
    """What is about to happen, before it does."""
    config, device = prepared.config, prepared.device
    backend = resolve(config.precision, device)
    parameters = sum(p.numel() for p in prepared.shell.parameters()) / 1e6
    rows = [
        ("model", f"{config.model.get('kind')}, {parameters:.1f} M parameters, on {machine.describe(device)}"),
        ("data", prepared.data.describe()),
        ("precision", f"{config.precision.name} by backend {backend.name}"),
        *(("", line) for line in config.precision.flow.splitlines()),
    ]
    if backend.emulated:
        rows.append(("", emulation_note(config.precision.name)))
    if backend.emulated and config.precision.quantized:
        rows.append(("kernel", "the quantizer is compiled on first use (3 s) and cached"))
    rows.append(("FP32 baseline", fp32.source if fp32 else f"a probe of {baseline.PROBE_STEPS} steps comes first"))
    units = f"{prepared.units_per_step:,} {prepared.data.unit}"
    rows.append(("training", f"{config.trainer.max_steps} steps of {units}{_minutes(prepared, fp32 is None)}"))
    rows.append(("run folder", str(folder)))
    print_lines(console, rows)


def _minutes(prepared: Prepared, probed: bool) -> str:
    """A rough forecast on a CPU, from the speed of one GEMM; on a GPU nothing may touch the device yet."""
    if prepared.device.type != "cpu":
        return ""
    config = prepared.config
    flops = prepared.shell.flops_per_token() * prepared.units_per_step  # type: ignore[operator]
    low = config.precision.quantized or str(config.precision.compute) == "bf16"
    rates = prepared.gemm_tflops
    step_s = flops / (rates.get("bf16", rates["fp32"]) * 1e12)
    evaluations = 1 + config.trainer.max_steps // max(1, config.trainer.eval_every or config.trainer.max_steps)
    steps = config.trainer.max_steps + evaluations * config.trainer.eval_batches / 3
    seconds = 10 + steps * step_s * (2.2 if low else 1.2)  # what is not a GEMM weighs more where GEMMs are fast
    if probed:
        seconds += 10 + baseline.PROBE_STEPS * flops / (rates["fp32"] * 1e12) * 1.2
    return f", about {max(1, round(seconds / 60))} min in all"

"""The composition root: the only place that knows every concrete class. Settings in, a run ready to fit out.

The order is that of cost: settings, device and backend are checked first, then the data is read and the plan printed,
then FP32 is probed in a process of its own, and only then does this process put a model on the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from mptrain import baseline, machine, registry
from mptrain.backends.base import resolve
from mptrain.baseline import Figures
from mptrain.checkpoint import Checkpoints, load, read_header, require_fit
from mptrain.config import RunConfig, parse_open
from mptrain.data import Dataset
from mptrain.distributed import world_size
from mptrain.folder import discard, folder_of
from mptrain.formats import Format
from mptrain.kernels.counters import N_COUNTS
from mptrain.loggers import ConsoleSink, JsonLines, NullSink, Sinks, WandbSink
from mptrain.optim import Average, Schedule, build_optimizer
from mptrain.policy import PrecisionPolicy
from mptrain.precision import Precision
from mptrain.report.terminal import emulation_note, print_comparison, print_end, print_lines
from mptrain.settings import to_plain
from mptrain.telemetry.audit import StepAudit
from mptrain.telemetry.coverage import summary_of
from mptrain.telemetry.drill import DebugConfig, Drill
from mptrain.telemetry.meters import Throughput, peak_tflops
from mptrain.telemetry.monitor import ELEMENTS, FLUSHED, INF, NAN, SATURATED, Monitor
from mptrain.trainer import Trainer


@dataclass(frozen=True)
class Prepared:
    """What is known before anything is on the device. ``shell``: the model on meta, for its sizes."""

    config: RunConfig
    device: torch.device
    data: Dataset
    model_module: Any
    model_config: Any
    shell: nn.Module
    fp32_gemm: str
    fingerprint: str


@dataclass
class Run:
    """A trainer with its folder, sinks and baseline."""

    prepared: Prepared
    trainer: Trainer
    sinks: Sinks
    console: Console
    folder: Path
    fp32: Figures

    def train(self) -> dict[str, Any]:
        """Fit, summarize, compare with FP32, close the sinks; returns the summary (also in ``summary.json``)."""
        try:
            self.trainer.fit()
            summary = self.summary()
            self.sinks.summary(summary)
        finally:
            self.sinks.close()
        print_comparison(self.console, summary)
        print_end(self._say, self.folder, self.trainer.stopped_early)
        return summary

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)

    def summary(self) -> dict[str, Any]:
        """The figures of the run; NaN (null in the file) where there is none."""
        trainer, config = self.trainer, self.prepared.config
        backend = trainer.precision.backend
        monitor = trainer.monitor
        totals = [0] * N_COUNTS if monitor is None else monitor.totals.sum(0).tolist()
        counted = totals[ELEMENTS] > 0
        overflow = totals[SATURATED] + totals[INF] + totals[NAN]
        return {
            "precision": config.precision.name,
            "backend": backend.name,
            "emulated": backend.emulated,
            "carrier": backend.carrier,
            "scaling": config.precision.quantization.scaling.value,
            "fp32_gemm": self.prepared.fp32_gemm,
            "steps": trainer.step_number,
            "skipped_steps": trainer.ledger.skipped,
            "train_loss": trainer.losses.get(trainer.step_number, math.nan),
            **self._validation(),
            "unit": self.prepared.data.unit,
            "tokens_per_s": trainer.throughput.tokens_per_s(),
            "peak_memory_gib": trainer.memory.peak_gib,
            "overflow_events": overflow if counted else None,
            "underflow_frac": totals[FLUSHED] / totals[ELEMENTS] if counted else None,
            "worst_layers": [] if monitor is None else monitor.worst(),
            "baseline": baseline.compare(self._figures(), self.fp32),
            **summary_of(None if trainer.audit is None else trainer.audit.result, compiled=config.trainer.compile),
            "fingerprint": self.prepared.fingerprint,
            "machine": machine.describe(self.prepared.device),
            "torch": torch.__version__,
        }

    def _validation(self) -> dict[str, float]:
        """``val_top1_frac``: of models that classify, else NaN."""
        names = ("loss", "loss_masters", "top1_frac", "top1_frac_masters")
        return {f"val_{name}": self.trainer.final.get(f"val/{name}", math.nan) for name in names}

    def _figures(self) -> Figures:
        """This run's side, its speed over the steps that the other side ran."""
        losses = baseline.read_losses(self.folder)
        speed = self.trainer.throughput.tokens_per_s(first=self.fp32.steps)
        found = self._validation()
        memory = self.trainer.memory.peak_gib
        return Figures("this run", losses, speed, memory, found["val_loss"], found["val_top1_frac"])


def prepare(config: RunConfig, say: Callable[[str], None] = lambda text: None) -> Prepared:
    """Check the settings, read the data, fingerprint. Nothing is on the device yet. ValueError names what to change."""
    if world_size() > 1:
        raise ValueError("this version trains in one process: start it without torchrun")
    device = machine.pick_device(config.device)
    resolve(config.precision, device)
    if config.optim.weights != "fp32" and config.precision.compute is not Format.bf16:
        raise ValueError(
            f"optim.weights={config.optim.weights} stores BF16 weights, which precision={config.precision.name} "
            "does not multiply by: use precision=bf16 or fp8, or optim=adamw (FP32 masters)"
        )
    model_module, model_config = parse_open("mptrain.models", "model", config.model)
    block_size = getattr(model_config, "block_size", 0)
    data_module, data_config = parse_open("mptrain.data", "data", config.data, block_size=block_size)
    _require_same_input(config, model_module.INPUT, data_module.INPUT)
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
    mark = baseline.fingerprint(config, data.fingerprint, machine.describe(device), torch.__version__, fp32_gemm)
    return Prepared(config, device, data, model_module, model_config, shell, fp32_gemm, mark)


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


def _require_room(model_config: Any, data: Dataset) -> None:
    """ValueError when the model was set to be smaller than the data needs (fewer classes, a smaller vocabulary)."""
    for name, size in data.sizes.items():
        if getattr(model_config, name) < size:
            raise ValueError(
                f"model.{name}={getattr(model_config, name)} is less than the {size} of data={data.name}: "
                f"leave it out, or set model.{name}={size}"
            )


def build(config: RunConfig) -> Run:
    """Make everything a run needs. ValueError or OSError, naming the setting to change, if it cannot be."""
    console = Console()
    start = _resume_path(config)
    prepared = prepare(config, lambda text: console.print(text, highlight=False))
    if start is not None:
        require_fit(start, prepared.shell)
    fp32 = _known_baseline(prepared)
    folder = folder_of(config, resumed=start is not None)
    try:
        return _build(prepared, console, folder, start, fp32)
    except BaseException:
        discard(folder)
        raise


def _build(prepared: Prepared, console: Console, folder: Path, start: Path | None, fp32: Figures | None) -> Run:
    config = prepared.config
    _announce(console, prepared, folder, fp32)
    if fp32 is None:
        fp32 = baseline.probe(config, prepared.fingerprint, Path(config.runs_dir), lambda text: console.print(text))
    sinks = Sinks([])
    checkpoints = Checkpoints(folder / "checkpoints", config.checkpoint.keep)
    first = 0 if start is None else int(read_header(start)["step"])
    trainer = assemble(prepared, sinks, checkpoints)
    trainer.audit = StepAudit(trainer.model, trainer.precision, min_coverage=config.audit.min_coverage)
    if config.precision.quantized:
        console.print(f"{trainer.precision.report}; {trainer.precision.backend.carrier}", highlight=False)
    if start is not None:
        trainer.load(load(start, prepared.device), first)
    sinks.sinks.append(JsonLines(folder))
    if config.logger.wandb:
        sinks.sinks.append(WandbSink(folder, config.logger.project, to_plain(config), console))
    sinks.sinks.append(ConsoleSink(console, config.trainer.max_steps, first, prepared.data.unit))
    return Run(prepared, trainer, sinks, console, folder, fp32)


def assemble(prepared: Prepared, sink: Sinks | NullSink, checkpoints: Checkpoints | None = None) -> Trainer:
    """The model on the device, in its precision, with optimizer and meters, inside a trainer."""
    config, data, device = prepared.config, prepared.data, prepared.device
    torch.manual_seed(config.seed)
    model = prepared.model_module.build(prepared.model_config).to(device)
    precision = Precision(config.precision).prepare(model)
    if config.trainer.checkpointing:
        model.recompute = precision.recompute
    drill = Drill.parse(config.debug.inject) if config.debug.inject else None
    recorded = config.telemetry.record_every > 0
    peak = peak_tflops(device, "fp8" if config.precision.quantized else str(config.precision.compute))
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
        throughput=Throughput(_units_per_step(prepared)),
        average=Average(model, config.optim.ema_decay) if config.optim.ema_decay else None,
        drill=drill,
        seed=config.seed,
        every=config.telemetry.every,
        run_model=torch.compile(model) if config.trainer.compile else model,  # type: ignore[arg-type]
        checkpoints=checkpoints,
        checkpoint_every=config.checkpoint.every,
        about={"precision": config.precision.name, "fingerprint": prepared.fingerprint},
        flops_per_token=model.flops_per_token(),
        peak_flops_per_s=None if peak is None else peak * 1e12,
    )


def probe(config: RunConfig) -> Figures:
    """The first steps of the run that ``config`` describes, in FP32: what the probe's process does."""
    quiet = replace(config.telemetry, record_every=0)
    fp32 = replace(config, precision=PrecisionPolicy.named("fp32"), telemetry=quiet, debug=DebugConfig())
    prepared = prepare(fp32)
    trainer = assemble(prepared, NullSink())
    trainer.fit(until=baseline.PROBE_STEPS)
    return Figures("probe", trainer.losses, trainer.throughput.tokens_per_s(), trainer.memory.peak_gib)


def _units_per_step(prepared: Prepared) -> int:
    """Tokens, or images, of an optimizer step."""
    sizes = prepared.config.trainer
    return int(sizes.batch_size * sizes.accumulate * prepared.data.units_per_sample)


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
        read_header(Path(config.resume))
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
    units = f"{_units_per_step(prepared):,} {prepared.data.unit}"
    rows.append(("training", f"{config.trainer.max_steps} steps of {units}{_minutes(prepared, fp32 is None)}"))
    rows.append(("run folder", str(folder)))
    print_lines(console, rows)


def _minutes(prepared: Prepared, probed: bool) -> str:
    """A rough forecast on a CPU, from the speed of one GEMM; on a GPU nothing may touch the device yet."""
    if prepared.device.type != "cpu":
        return ""
    config = prepared.config
    flops = prepared.shell.flops_per_token() * _units_per_step(prepared)  # type: ignore[operator]
    low = config.precision.quantized or str(config.precision.compute) == "bf16"
    step_s = flops / machine.gemm_flops_per_s(torch.bfloat16 if low else torch.float32)
    evaluations = 1 + config.trainer.max_steps // max(1, config.trainer.eval_every or config.trainer.max_steps)
    steps = config.trainer.max_steps + evaluations * config.trainer.eval_batches / 3
    seconds = 10 + steps * step_s * (2.2 if low else 1.2)  # what is not a GEMM weighs more where GEMMs are fast
    if probed:
        seconds += 10 + baseline.PROBE_STEPS * flops / machine.gemm_flops_per_s(torch.float32) * 1.2
    return f", about {max(1, round(seconds / 60))} min in all"

"""The composition root: the only place that knows every concrete class. Settings in, a run ready to fit out.

The order is that of cost: settings, device and backend are checked first, then the data is read and the plan printed,
then FP32 is probed in a process of its own, and only then does this process put a model on the device.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TextIO

import torch
from rich.console import Console

from mptrain import kernels
from mptrain.build.assemble import assemble
from mptrain.build.preflight import Prepared, prepare
from mptrain.build.run import Run, about
from mptrain.checkpoint.checkpoints import Checkpoints, read_about, require_fit
from mptrain.config import RunConfig
from mptrain.distributed import Ranks
from mptrain.loggers.base import NullSink, Sinks
from mptrain.loggers.console import ConsoleSink
from mptrain.loggers.jsonl import JsonLines, RankLog
from mptrain.loggers.wandb import WandbSink
from mptrain.memory.training.plan import TrainingPlan, plan, rank_job
from mptrain.precision.backends.base import resolve
from mptrain.precision.policy import PrecisionPolicy
from mptrain.report.run_summary import emulation_note, print_lines
from mptrain.runs import baseline
from mptrain.runs.baseline import Figures
from mptrain.runs.folder import describe, discard, folder_of, remember, remembered
from mptrain.runs.identity import job_mark
from mptrain.runs.resumption import Earlier, Resumed
from mptrain.runs.resumption import remember as remember_attempt
from mptrain.telemetry.drill import DebugConfig
from mptrain.tools import machine
from mptrain.tools.launcher import rank, world_size
from mptrain.tools.settings import to_plain


def build(config: RunConfig, console: Console | None = None) -> Run | None:
    """Make everything a run needs; None for one that is finished, which is told and left alone. ValueError or OSError,
    naming the setting to change, if it cannot be.

    With several ranks all of them call it; the first one alone reads and writes the run's folder, and speaks.
    """
    first = rank() == 0
    console = (console or Console()) if first else Console(quiet=True)
    again = remembered(Path(config.runs_dir)) if first else None  # torchrun started these processes anew
    if again is not None:
        config = replace(config, run_dir=str(again), resume="auto")
        console.print(f"torchrun's next attempt: going on in {again}", highlight=False, soft_wrap=True)
    asked = _asked_checkpoint(config) if world_size() == 1 else None  # what is quick to refuse comes first
    prepared = prepare(config, lambda text: console.print(text, highlight=False))
    ranks = prepared.ranks
    if len(set(ranks.gather(job_mark(to_plain(config))))) > 1:
        raise ValueError(
            f"not every rank has the same settings: run_dir={config.run_dir} must be in a folder that all of them see"
        )
    prepared = replace(prepared, config=ranks.share(config))
    config = prepared.config
    asked = asked or ranks.by_first(lambda: _asked_checkpoint(config))
    start = asked
    if config.resume == "auto":
        start = _newest(config, ranks, console)
    earlier = ranks.by_first(lambda: _earlier(start, prepared))
    if earlier is not None:
        over = earlier.finished(config.trainer.max_steps)
        if over and config.resume == "auto":
            console.print(over, highlight=False, soft_wrap=True)
            return None
        ranks.by_first(lambda: require_fit(earlier.checkpoint, prepared.shell))
        if config.resume != "auto" and earlier.step >= config.trainer.max_steps:
            raise ValueError(
                f"{earlier.checkpoint} is of step {earlier.step}, and trainer.max_steps={config.trainer.max_steps} "
                f"leaves nothing to do: set trainer.max_steps={2 * earlier.step}"
            )
    fp32 = ranks.by_first(lambda: _known_baseline(prepared))
    held: list[TextIO] = []
    folder = ranks.by_first(lambda: _claimed(config, start, held))
    try:
        return _build(prepared, console, folder, held, earlier, fp32)
    except BaseException:
        if first:
            discard(folder)
            held[0].close()
        raise


def _earlier(start: Path | None, prepared: Prepared) -> Earlier | None:
    """The run so far. ValueError if this one is not meant to go on with it."""
    if start is None:
        return None
    config, earlier = prepared.config, Earlier.of(start, int(read_about(start)["step"]))
    earlier.require_meant(config, prepared.data.fingerprint)
    return earlier


def _claimed(config: RunConfig, start: Path | None, held: list[TextIO]) -> Path:
    folder, lock = folder_of(config, resumed=start is not None)
    held.append(lock)
    remember(Path(config.runs_dir), folder)
    return folder


def _build(
    prepared: Prepared,
    console: Console,
    folder: Path,
    held: list[TextIO],
    earlier: Earlier | None,
    fp32: Figures | None,
) -> Run:
    config, ranks = prepared.config, prepared.ranks
    planned = _planned(prepared, console)
    if ranks.first:
        _announce(console, prepared, folder, fp32, planned)
    if fp32 is None:
        fp32 = _probed(prepared, lambda text: console.print(text))
    checkpoints = Checkpoints(
        folder / "checkpoints", config.checkpoint.keep, ranks, background=config.checkpoint.background
    )
    sinks = Sinks([])
    trainer = assemble(prepared, sinks, checkpoints, audited=True)
    if config.precision.quantized:
        console.print(f"{trainer.precision.report}; {trainer.precision.backend.carrier}", highlight=False)
    if earlier is not None:
        trainer.resume(earlier.checkpoint)
    since = trainer.step_number
    if config.run_dir:
        checkpoints.set_aside(since)
    if ranks.size > 1:
        sinks.sinks.append(RankLog(folder, ranks.rank, prepared.device))
    if ranks.first:
        sinks.sinks.append(JsonLines(folder, since))
        if config.logger.wandb:
            sinks.sinks.append(WandbSink(folder, config.logger.project, to_plain(config), console, config.logger.group))
        sinks.sinks.append(ConsoleSink(console, config.trainer.max_steps, since, prepared.data.unit))
        found = about(prepared, trainer)
        if earlier is not None:
            _went_on(folder, earlier, earlier.resumed(config, found), sinks, console)
        describe(folder, found)
    return Run(prepared, trainer, sinks, console, folder, held, fp32, planned)


def _went_on(folder: Path, earlier: Earlier, resumed: Resumed, sinks: Sinks, console: Console) -> None:
    """Tell what is different from the attempt before, in the terminal, as an event, in the folder's history."""
    remember_attempt(folder, earlier, resumed)
    for line in resumed.lines():
        console.print(line, highlight=False, soft_wrap=True)
    reason = "; ".join(f"{name}: {before} -> {now}" for name, (before, now) in resumed.brief().items())
    sinks.event({"step": resumed.step, "event": "resumed", "reason": reason, "mixed": bool(resumed.mixed)})


def _planned(prepared: Prepared, console: Console) -> TrainingPlan | None:
    """The memory of a step; None, with a line, for a model that cannot be traced. Nothing is sent between ranks."""
    config, gpu = prepared.config, prepared.device.type == "cuda"
    try:
        return plan(rank_job(prepared.model_module, prepared.model_config, config, prepared.layout, gpu=gpu))
    except (ValueError, RuntimeError) as error:  # a plan that fails must not cost the run
        console.print(f"memory is not planned: {str(error).splitlines()[0]}", highlight=False, soft_wrap=True)
        return None


def _probed(prepared: Prepared, say: Callable[[str], None]) -> Figures:
    """FP32 for a few steps: one process has another measure it; several do it themselves, in the same layout."""
    config, ranks = prepared.config, prepared.ranks
    wanted, runs = prepared.fingerprint, Path(config.runs_dir)
    if ranks.size == 1:
        return baseline.probe(config, wanted, runs, say)
    kept = ranks.by_first(lambda: baseline.kept(wanted, runs))
    if kept is None:
        say(f"FP32 probe: {baseline.PROBE_STEPS} steps in the same layout")
        kept = probe(config)
        gc.collect()
        if prepared.device.type == "cuda":
            torch.cuda.empty_cache()
        if ranks.first:
            baseline.keep(kept, wanted, runs)
    return kept


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


def _asked_checkpoint(config: RunConfig) -> Path | None:
    """The checkpoint that ``resume`` names. ValueError if it is none, or nothing says which run to go on with."""
    if config.resume == "auto" and not config.run_dir:
        raise ValueError("resume=auto needs run_dir=FOLDER, the run to continue")
    if config.resume in ("none", "auto"):
        return None
    read_about(Path(config.resume))
    return Path(config.resume)


def _newest(config: RunConfig, ranks: Ranks, console: Console) -> Path | None:
    """The newest whole checkpoint of the run; those that are damaged are named."""
    found = Checkpoints(Path(config.run_dir) / "checkpoints", config.checkpoint.keep, ranks)
    path = found.newest()
    for fault in found.passed_over:
        console.print(f"passed over: {fault}", highlight=False, soft_wrap=True)
    return path


def _announce(
    console: Console, prepared: Prepared, folder: Path, fp32: Figures | None, planned: TrainingPlan | None
) -> None:
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
    if config.optim.weights != "fp32" and config.trainer.accumulate > 1:
        each = f"the {config.trainer.accumulate} micro-batches of a step"
        rows.append(("", f"but gradients of BF16 weights add up in BF16 over {each}; in FP32 with optim=adamw"))
    if backend.emulated:
        rows.append(("", emulation_note(config.precision.name)))
    if backend.emulated and config.precision.quantized:
        rows.append(("kernel", kernels.described(device)))  # builds it, 3 s, where no run has yet
    rows.append(("FP32 baseline", fp32.source if fp32 else f"a probe of {baseline.PROBE_STEPS} steps comes first"))
    units = f"{prepared.units_per_step:,} {prepared.data.unit}"
    if prepared.ranks.size > 1:
        share = prepared.layout.share(config.trainer.batch_size, config.trainer.accumulate, 0)
        each = f"{share.accumulate} x {share.batch_size} samples a step each"
        rows.append(("ranks", f"{prepared.ranks.size}: {prepared.layout}, {each}"))
    if planned is not None:
        rows.append(("memory", f"{planned.brief}{_too_much(planned, device)}"))
    rows.append(("training", f"{config.trainer.max_steps} steps of {units}{_minutes(prepared, fp32 is None)}"))
    rows.append(("run folder", str(folder)))
    print_lines(console, rows)


def _too_much(planned: TrainingPlan, device: torch.device) -> str:
    """A word if the GPU has less than is planned."""
    if device.type != "cuda":
        return ""
    there = torch.cuda.get_device_properties(device).total_memory
    if planned.total <= there:
        return ""
    return f": more than the {there / 2**30:.1f} GiB of this GPU (mptrain plan ... --fit says what would help)"


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

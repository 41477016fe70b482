"""The composition root: the only place that knows every concrete class. Settings in, a run ready to fit out."""

from __future__ import annotations

import hashlib
import json
import math
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from mptrain.checkpoint import Checkpoints, load, read_header
from mptrain.config import RunConfig, parse_open
from mptrain.distributed import world_size
from mptrain.loggers import ConsoleSink, JsonLines, Sink, Sinks, WandbSink
from mptrain.optim import Schedule, build_optimizer
from mptrain.precision import Precision
from mptrain.settings import to_plain
from mptrain.telemetry.meters import Throughput, peak_tflops
from mptrain.telemetry.monitor import ELEMENTS, FLUSHED, INF, NAN, SATURATED, Monitor
from mptrain.trainer import Trainer


@dataclass
class Run:
    """A trainer with its folder, sinks and fingerprint."""

    config: RunConfig
    trainer: Trainer
    sinks: Sinks
    console: Console
    folder: Path
    fingerprint: str

    def train(self) -> dict[str, Any]:
        """Fit, summarize, close the sinks; returns the summary (also in ``summary.json``)."""
        try:
            self.trainer.fit()
            summary = self.summary()
            self.sinks.summary(summary)
        finally:
            self.sinks.close()
        return summary

    def summary(self) -> dict[str, Any]:
        """The figures of the run; NaN where there is none."""
        trainer = self.trainer
        backend = trainer.precision.backend
        totals = trainer.monitor.totals.sum(0).tolist()
        counted = totals[ELEMENTS] > 0
        overflow = totals[SATURATED] + totals[INF] + totals[NAN]
        return {
            "precision": self.config.precision.name,
            "backend": backend.name,
            "emulated": backend.emulated,
            "carrier": backend.carrier,
            "steps": trainer.step_number,
            "skipped_steps": trainer.ledger.skipped,
            "train_loss": trainer.losses.get(trainer.step_number, math.nan),
            "val_loss": trainer.final.get("val/loss", math.nan),
            "val_loss_masters": trainer.final.get("val/loss_masters", math.nan),
            "tokens_per_s": trainer.throughput.tokens_per_s(),
            "peak_memory_gib": trainer.peak_memory_gib,
            "overflow_events": overflow if counted else None,
            "underflow_frac": totals[FLUSHED] / totals[ELEMENTS] if counted else None,
            "worst_layers": trainer.monitor.worst(),
            "fingerprint": self.fingerprint,
        }


def build(config: RunConfig) -> Run:
    """Make everything a run needs. ValueError or OSError, naming the setting to change, if it cannot be."""
    if world_size() > 1:
        raise ValueError("this version trains in one process: start it without torchrun")
    device = pick_device(config.device)
    data_module, data_config = parse_open("mptrain.data", "data", config.data, block_size=_block_size(config))
    data = data_module.build(data_config)
    torch.manual_seed(config.seed)
    model_module, model_config = parse_open("mptrain.models", "model", config.model, vocab_size=data.vocab_size)
    model = model_module.build(model_config).to(device)
    precision = Precision(config.precision).prepare(model)
    if config.trainer.checkpointing:
        model.recompute = precision.recompute
    fingerprint = _fingerprint(config, data.fingerprint, device)
    start = _resume_path(config)
    folder = _make_folder(config, start is not None)
    console = Console()
    _announce(console, config, precision, data.name, folder, model)
    sinks = _sinks(config, console, folder, 0 if start is None else int(read_header(start)["step"]))
    trainer = _trainer(config, model, precision, data, sinks, folder, fingerprint)
    if start is not None:
        trainer.load(load(start, device), int(read_header(start)["step"]))
    return Run(config, trainer, sinks, console, folder, fingerprint)


def _trainer(
    config: RunConfig, model: Any, precision: Precision, data: Any, sinks: Sinks, folder: Path, fingerprint: str
) -> Trainer:
    tokens_per_step = config.trainer.batch_size * config.trainer.accumulate * data.block_size
    peak = peak_tflops(precision.device, "fp8" if config.precision.quantized else str(config.precision.compute))
    return Trainer(
        config.trainer,
        model=model,
        precision=precision,
        optimizer=build_optimizer(config.optim, model),
        schedule=Schedule.of(config.optim, config.trainer.max_steps),
        data=data,
        sink=sinks,
        monitor=Monitor(precision.counters, config.telemetry.every),
        throughput=Throughput(tokens_per_step),
        seed=config.seed,
        every=config.telemetry.every,
        run_model=torch.compile(model) if config.trainer.compile else model,  # type: ignore[arg-type]
        checkpoints=Checkpoints(folder / "checkpoints", config.checkpoint.keep),
        checkpoint_every=config.checkpoint.every,
        about={"precision": config.precision.name, "fingerprint": fingerprint},
        flops_per_token=model.flops_per_token(),
        peak_flops_per_s=None if peak is None else peak * 1e12,
    )


def pick_device(asked: str) -> torch.device:
    """``auto`` is the GPU if there is one. ValueError if a GPU is asked for and missing."""
    if asked == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda: torch sees no GPU here; use device=auto or device=cpu")
    if asked == "auto":
        asked = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(asked)


def _block_size(config: RunConfig) -> int:
    module, model = parse_open("mptrain.models", "model", config.model)
    del module
    return int(model.block_size)


def _fingerprint(config: RunConfig, corpus: str, device: torch.device) -> str:
    """A hash of what makes two runs comparable step by step: everything but precision, sinks and folders."""
    machine = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    )
    plain = to_plain(config)
    same = {key: plain[key] for key in ("model", "optim", "trainer", "seed")}
    text = json.dumps({**same, "corpus": corpus, "machine": machine, "torch": torch.__version__}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _resume_path(config: RunConfig) -> Path | None:
    if config.resume == "none":
        return None
    if config.resume != "auto":
        read_header(Path(config.resume))
        return Path(config.resume)
    if not config.run_dir:
        raise ValueError("resume=auto needs run_dir=FOLDER, the run to continue")
    return Checkpoints(Path(config.run_dir) / "checkpoints", config.checkpoint.keep).newest()


def _make_folder(config: RunConfig, resumed: bool) -> Path:
    """The run's own folder. A folder that already holds a run is refused unless it is being resumed."""
    if config.run_dir:
        folder = Path(config.run_dir)
        if (folder / "metrics.jsonl").exists() and not resumed:
            raise ValueError(f"{folder} already holds a run: continue it with resume=auto, or choose another run_dir")
        folder.mkdir(parents=True, exist_ok=True)
    else:
        folder = _numbered(Path(config.runs_dir), f"{config.model.get('kind')}-{config.precision.name}")
    (folder / "config.json").write_text(json.dumps(to_plain(config), indent=2) + "\n")
    return folder


def _numbered(parent: Path, stem: str) -> Path:
    parent.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        folder = parent / f"{stem}-{number}"
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
        else:
            return folder


def _sinks(config: RunConfig, console: Console, folder: Path, start: int) -> Sinks:
    sinks: list[Sink] = [JsonLines(folder), ConsoleSink(console, config.trainer.max_steps, start)]
    if config.logger.wandb:
        sinks.append(WandbSink(folder, config.logger.project, to_plain(config), console))
    return Sinks(sinks)


def _announce(
    console: Console, config: RunConfig, precision: Precision, data: str, folder: Path, model: torch.nn.Module
) -> None:
    """What is about to happen, before it does."""
    backend = precision.backend
    parameters = sum(p.numel() for p in model.parameters())
    kind = f"{config.model.get('kind')}, {parameters / 1e6:.1f} M parameters"
    console.print(f"{kind}, data {data}, {config.trainer.max_steps} steps on {precision.device} -> {folder}")
    console.print(f"precision {config.precision.name}, backend {backend.name} ({backend.carrier})", highlight=False)
    if backend.emulated:
        console.print("emulation: there is no such unit here; numerics are real, speed is not", highlight=False)
    if config.precision.quantized:
        console.print(str(precision.report), highlight=False)
    console.print(config.precision.flow, highlight=False)
    sys.stdout.flush()


def print_summary(console: Console, summary: dict[str, Any], folder: Path) -> None:
    """The last thing a user sees."""
    table = Table(title=f"{summary['precision']} on {summary['backend']}")
    table.add_column("figure")
    table.add_column("value", justify="right")
    speed = "tokens/s (emulation)" if summary["emulated"] else "tokens/s"
    rows = (
        ("training loss (nats)", f"{summary['train_loss']:.4f}"),
        ("validation loss (nats)", f"{summary['val_loss']:.4f}"),
        (speed, f"{summary['tokens_per_s']:,.0f}"),
        ("peak memory (GiB)", f"{summary['peak_memory_gib']:.3f}"),
        ("skipped steps", str(summary["skipped_steps"])),
        ("overflow events", "not counted" if summary["overflow_events"] is None else str(summary["overflow_events"])),
        ("underflow", "not counted" if summary["underflow_frac"] is None else f"{summary['underflow_frac']:.2%}"),
    )
    for name, value in rows:
        table.add_row(name, value)
    console.print(table)
    if summary["overflow_events"] == 0:
        console.print("no overflow: current scaling fits each tensor's largest value to the format", highlight=False)
    console.print(f"run folder: {folder}", highlight=False)

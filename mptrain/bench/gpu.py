"""``mptrain bench gpu``: tokens per second, memory and MFU of every precision on this GPU.

CUDA events after a warm-up, medians, variants alternating in rounds, BF16 measured twice (an A/A twin: what differs
between them is noise), random tokens, fused AdamW, clipping, no host read in a step. Every row is written to the JSON
file as soon as it is known. ``--dry-run`` runs the same code on a CPU with tiny sizes; its times mean nothing.

MFU divides by the time that the FLOPs would take at the dense peak of the formats they ran in (FP8 in the converted
layers, the rest in ``compute``); FLOPs are the model's own count, attention in full (see ``flops_per_token``).
"""

from __future__ import annotations

import gc
import importlib.metadata
import itertools
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from mptrain import Precision, PrecisionPolicy, models
from mptrain.bench.rows import arguments, now
from mptrain.precision import backends
from mptrain.precision.policy import conf_dir
from mptrain.telemetry.peaks import peaks, weighted_rate
from mptrain.tools.files import write_whole

VOCABULARY = 50304  # GPT-2's 50257 rounded up to a multiple of 128, as the published runs do
WARMUP, STEPS, ROUNDS = 6, 8, 3
RESIDENT_SHARE = 0.2  # of the GPU's memory, for weights and moments of waiting variants


@dataclass(frozen=True)
class Size:
    """A model to measure. ``limits``: FP8 / BF16 at most, by FLOPs alone and with memory traffic (casts fused)."""

    recipe: str
    batch: int
    tokens: int
    limits: tuple[float, float]
    bf16_ceiling: float
    changes: dict[str, int] = field(default_factory=dict)


SIZES = {  # limits and ceilings: derived for one H100, FP8 on the linear layers of the blocks
    "gpt-small": Size("gpt-small", 32, 1024, (1.47, 1.19), 718e3),
    "gpt-350m": Size("gpt-medium", 32, 1024, (1.66, 1.31), 272e3),
    "gpt-1.3b": Size("gpt-medium", 8, 2048, (1.75, 1.45), 78.6e3, {"n_embd": 2048, "n_head": 16}),
}


@dataclass(frozen=True)
class Variant:
    """One row: a precision of conf/precision on a backend, compiled or not.

    A ``twin`` is measured again as a control.
    """

    precision: str
    backend: str = "auto"
    compiled: bool = True
    twin: bool = False

    @property
    def name(self) -> str:
        owner = "" if self.backend == "auto" else f"@{self.backend}"
        return f"{self.precision}{owner}{' compiled' if self.compiled else ''}{' (A/A)' if self.twin else ''}"

    @property
    def policy(self) -> PrecisionPolicy:
        return replace(PrecisionPolicy.named(self.precision), backend=self.backend)


def variants(dry_run: bool) -> list[Variant]:
    """List variants, those that matter most first: the time budget may end the list."""
    quantized = [("fp8", "te"), ("fp8", "native"), ("fp8-delayed", "te")]
    if dry_run:
        quantized += [("fp8", "emulated"), ("fp8-delayed", "emulated")]
    rest = [(name, "auto") for name in ("fp16", "tf32", "fp32")]
    listed = []
    for compiled in (True, False):
        listed += [Variant("bf16", compiled=compiled), Variant("bf16", compiled=compiled, twin=True)]
        listed += [Variant(precision, backend, compiled) for precision, backend in quantized + rest]
    return listed


@dataclass
class Settings:
    """The settings of the benchmark. ``device`` cpu is the dry run."""

    device: torch.device
    minutes: float
    path: Path | None

    @property
    def dry_run(self) -> bool:
        return self.device.type == "cpu"

    def model(self, size: Size) -> nn.Module:
        """Return the model of ``size`` on the device, the same weights for every variant."""
        values = yaml.safe_load((conf_dir() / "model" / f"{size.recipe}.yaml").read_text())
        module = models.load(values.pop("kind"))
        values |= {"vocab_size": VOCABULARY, "block_size": size.tokens} | size.changes
        torch.manual_seed(0)
        with self.device:
            built: nn.Module = module.build(module.Config(**values))
        return built

    def shrunk(self, size: Size) -> Size:
        """Return the size of the dry run, which takes seconds: two layers, width 64, 32 tokens."""
        tiny = {"n_layer": 2, "n_embd": 64, "n_head": 2, "vocab_size": 256}
        return replace(size, batch=2, tokens=32, changes=tiny) if self.dry_run else size


class Runner:
    """A variant made ready to step: model, precision, optimizer, one batch of random tokens."""

    def __init__(self, variant: Variant, size: Size, settings: Settings) -> None:
        self.device, start = settings.device, _allocated(settings.device)
        self.model = settings.model(size)
        self.precision = Precision(variant.policy).prepare(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.run: Callable[..., Any] = self.model
        if variant.compiled:
            self.run = torch.compile(self.model, backend="eager" if settings.dry_run else "inductor")
        vocabulary = 256 if settings.dry_run else VOCABULARY
        self.tokens, self.targets = torch.randint(vocabulary, (2, size.batch, size.tokens), device=self.device)
        self.times_ms: list[float] = []
        self.peak_bytes = 0
        for _ in range(1 if settings.dry_run else WARMUP):
            self.step()
        self.resident = _allocated(self.device) - start

    def step(self) -> None:
        with self.precision.forward():
            loss = self.run(self.tokens, self.targets)
        self.precision.backward(loss)
        self.precision.step(self.optimizer, clip=1.0)
        self.optimizer.zero_grad()

    def visit(self, steps: int) -> None:
        """Time ``steps`` steps and watch the memory; other variants' resident memory is not this one's."""
        others = _allocated(self.device) - self.resident
        if self.device.type == "cpu":
            for _ in range(steps):
                start = time.perf_counter()
                self.step()
                self.times_ms.append((time.perf_counter() - start) * 1e3)
            return
        torch.cuda.reset_peak_memory_stats()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]  # type: ignore[no-untyped-call]
        self.step()  # caches and allocator were left by another variant
        for mark in marks[:-1]:
            mark.record()
            self.step()
        marks[-1].record()
        torch.cuda.synchronize()
        self.times_ms += [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]
        self.peak_bytes = max(self.peak_bytes, torch.cuda.max_memory_allocated() - others)


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


def fp8_share(runner: Runner, flops: float) -> float:
    """Return the share of a token's FLOPs in the converted layers: 6 per weight, as ``flops_per_token`` counts them."""
    layers = [runner.model.get_submodule(name) for name in runner.precision.report.converted]
    return 6.0 * sum(p.numel() for layer in layers for p in layer.parameters() if p.ndim == 2) / flops


def mfu(rate: float, flops: float, share: float, compute: str, tflops: Mapping[str, float]) -> float | None:
    """Return ideal over real time at ``rate`` tokens/s, by the peak of each format in ``tflops``; None if unknown."""
    ideal = weighted_rate(tflops, {"fp8": share, compute: 1 - share} if share else {compute: 1.0})
    return rate * flops / (ideal * 1e12) if ideal else None


def fill(row: dict[str, Any], runner: Runner, size: Size, settings: Settings) -> None:
    """Write what is known of ``runner`` into its row."""
    policy, backend = runner.precision.policy, runner.precision.backend
    flops, compute = float(runner.model.flops_per_token()), str(policy.compute)  # type: ignore[operator]
    share, emulated = fp8_share(runner, flops), backend.emulated
    step_ms = statistics.median(runner.times_ms)
    rate = size.batch * size.tokens / step_ms * 1e3
    label = f"{share:.0%} of FLOPs in FP8, {1 - share:.0%} in {compute}" if policy.quantized else f"all in {compute}"
    tflops = {} if settings.dry_run or emulated else peaks(torch.device("cuda"))
    row |= {
        "backend": backend.name,
        "carrier": backend.carrier,
        "converted": len(runner.precision.report.converted),
        "emulated": emulated,
        "tokens_per_s": None if emulated else rate,
        "step_ms": None if emulated else step_ms,
        "steps": len(runner.times_ms),
        "peak_gib": runner.peak_bytes / 2**30,
        "mfu": mfu(rate, flops, share, compute, tflops),
        "mfu_of": label,
        "flops_per_token": flops,
        "limit_fp8_to_bf16": size.limits,
        "bf16_ceiling_tokens_per_s": size.bf16_ceiling,
    }


def compare(rows: list[dict[str, Any]]) -> None:
    """Divide each row's speed by BF16's, compiled by compiled."""
    fast = [row for row in rows if row.get("tokens_per_s")]
    plain = [row for row in fast if row["precision"] == "bf16" and not row["twin"]]
    against = {(row["model"], row["compiled"]): row["tokens_per_s"] for row in plain}
    for row in fast:
        if (row["model"], row["compiled"]) in against:
            row["to_bf16"] = row["tokens_per_s"] / against[row["model"], row["compiled"]]


def why_not(variant: Variant, device: torch.device) -> str:
    """Return why a variant cannot run here; empty if it can."""
    if variant.compiled and variant.precision == "fp8-delayed" and variant.backend == "te":
        return "Transformer Engine refuses delayed scaling under torch.compile"
    try:
        chosen = backends.resolve(variant.policy, device)
    except ValueError as error:
        return str(error)
    return "an emulation is not worth compiling" if variant.compiled and chosen.name == "emulated" else ""


class Report:
    """Rows of all models; the file is rewritten after each, so that a killed run keeps what it had."""

    def __init__(self, settings: Settings, argv: list[str]) -> None:
        self._path = settings.path
        self._meta = machine(settings) | {"command": " ".join(["mptrain bench gpu", *argv])}
        self.rows: list[dict[str, Any]] = []

    def add(self, model: str, variant: Variant, reason: str) -> dict[str, Any]:
        row = {"model": model, "variant": variant.name, "precision": variant.precision}
        self.rows.append(row | {"compiled": variant.compiled, "twin": variant.twin, "reason": reason})
        return self.rows[-1]

    def write(self) -> None:
        compare(self.rows)
        if self._path is not None:
            write_whole(self._path, json.dumps({"machine": self._meta, "rows": self.rows}, indent=1))

    def __str__(self) -> str:
        lines = [", ".join(f"{key} {value}" for key, value in self._meta.items())]
        lines.append(f"{'model':10} {'variant':28} {'tokens/s':>16} {'/BF16':>6} {'GiB':>6} {'MFU':>6}  of")
        for row in self.rows:
            head = f"{row['model']:10} {row['variant']:28} "
            if row["reason"]:
                lines.append(head + row["reason"])
                continue
            rate = "n/a (emulated)" if row["emulated"] else f"{row['tokens_per_s']:,.0f}"
            ratio = f"{row['to_bf16']:.2f}" if "to_bf16" in row else "-"
            used = f"{row['mfu']:.1%}" if row["mfu"] is not None else "-"
            lines.append(f"{head}{rate:>16} {ratio:>6} {row['peak_gib']:6.1f} {used:>6}  {row['mfu_of']}")
        return "\n".join(lines)


def machine(settings: Settings) -> dict[str, str]:
    """Describe what the numbers belong to: card, versions, commit, date."""
    gpu = "none (dry run)" if settings.dry_run else torch.cuda.get_device_name()
    about = {"gpu": gpu, "date": now(), "python": platform.python_version()}
    about |= {"torch": torch.__version__, "cuda": str(torch.version.cuda)}
    for package in ("transformer_engine", "torchao", "triton"):
        try:
            about[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            about[package] = "not installed"
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False)
    return about | {"commit": commit.stdout.strip() if commit.returncode == 0 else "unknown"}


def measure(name: str, settings: Settings, report: Report) -> None:
    """Measure all variants of one model in rounds.

    Those that fit in memory together stay; the others are built again.
    """
    size, deadline = settings.shrunk(SIZES[name]), time.monotonic() + settings.minutes * 60
    listed = variants(settings.dry_run)
    rows = {variant: report.add(name, variant, why_not(variant, settings.device)) for variant in listed}
    idle: dict[Variant, Runner] = {}
    for turn in range(ROUNDS):
        for variant, row in rows.items():
            if row["reason"]:
                continue
            if time.monotonic() > deadline:
                row["reason"] = "" if turn else f"not run: the time budget of {settings.minutes:g} minutes was spent"
                continue
            visit(variant, row, size, settings, idle)
            if row["reason"] and idle:  # perhaps only because of the others in memory: retry alone
                idle.clear()
                clean()
                visit(variant, row, size, settings, idle)
            report.write()
            clean()


def clean() -> None:
    """Free the memory of a variant, an exception's frames included, before the next is built."""
    gc.collect()
    torch.cuda.empty_cache()


def visit(variant: Variant, row: dict[str, Any], size: Size, settings: Settings, idle: dict[Variant, Runner]) -> None:
    """Measure one variant once. Out of memory, or any other failure, becomes the reason in its row."""
    row["reason"] = ""
    try:
        runner = idle.get(variant) or Runner(variant, size, settings)
        runner.times_ms = row.setdefault("times_ms", [])
        runner.visit(2 if settings.dry_run else STEPS)
        fill(row, runner, size, settings)
        if settings.dry_run or _allocated(settings.device) < RESIDENT_SHARE * torch.cuda.mem_get_info()[1]:
            idle[variant] = runner
    except torch.OutOfMemoryError:
        row["reason"] = f"out of memory at batch {size.batch} x {size.tokens}"
    except Exception as error:
        row["reason"] = f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def run(argv: list[str]) -> int:
    """Measure and print; 0, or 2 with the reason if there is nothing to measure on."""
    parser = arguments("mptrain bench gpu", __doc__, dry_run="tiny sizes on the CPU: does it run, not how fast")
    parser.add_argument("--models", default=",".join(SIZES), help=f"comma-separated, of {', '.join(SIZES)}")
    parser.add_argument("--minutes", type=float, default=8.0, help="time budget of all models together")
    args = parser.parse_args(argv)
    names = args.models.split(",")
    if unknown := [name for name in names if name not in SIZES]:
        print(f"unknown model {unknown[0]!r} in --models: known: {', '.join(SIZES)}")
        return 2
    if not args.dry_run and not torch.cuda.is_available():
        print("no CUDA GPU here: mptrain bench gpu --dry-run goes through the benchmark on the CPU")
        return 2
    settings = Settings(torch.device("cpu" if args.dry_run else "cuda"), args.minutes / len(names), args.json)
    report = Report(settings, argv)
    torch._dynamo.config.recompile_limit = 256  # variants share code: beyond the default of 8 they run eager
    for name in names:
        measure(name, settings, report)
        report.write()
        torch._dynamo.reset()
    print(report)
    return 0

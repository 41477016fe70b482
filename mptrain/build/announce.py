"""The lines that say what a run is about to do, before anything is on the device."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console

from mptrain import kernels
from mptrain.build.preflight import Prepared
from mptrain.memory.training.plan import TrainingPlan
from mptrain.precision.backends import resolve
from mptrain.report.run_summary import emulation_note, print_lines
from mptrain.runs import baseline
from mptrain.runs.baseline import Figures
from mptrain.tools import machine


def announce(
    console: Console, prepared: Prepared, folder: Path, fp32: Figures | None, planned: TrainingPlan | None
) -> None:
    """Print model, data, precision, baseline, memory and folder."""
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

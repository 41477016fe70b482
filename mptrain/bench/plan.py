"""``mptrain bench plan``: how far the plan of memory is from what a run then measures.

Each cell is planned, then trained for two steps and measured: live tensor bytes on a CPU, by the same roles, the
allocator's peak on a GPU. Precisions x activation checkpointing x AdamW's moments x architectures. A bound of 3 % on a
CPU, 5 % on a GPU. ``--dry-run`` takes one cell of each architecture.
"""

from __future__ import annotations

import argparse
import gc
import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mptrain.bench import cpu
from mptrain.build.assemble import assemble
from mptrain.build.preflight import prepare
from mptrain.config import composed
from mptrain.loggers import NullSink
from mptrain.memory.training.grading import Grade, graded
from mptrain.memory.training.plan import plan, rank_job
from mptrain.tools.files import json_text, write_whole

BOUND_CPU, BOUND_GPU = 3.0, 5.0  # percent
PRECISIONS = ("fp32", "bf16", "fp16", "fp8")
MODELS = ("gpt-nano", "llama-nano")
ON_GPU = ("model.n_embd=1024", "model.n_head=16", "model.block_size=1024")  # nano is less than an allocator's blocks


@dataclass
class Row(cpu.Row):
    """``measured``: percent between plan and measurement, either way; the peaks themselves in MiB."""

    planned_mib: float = 0.0
    peak_mib: float = 0.0
    largest_role: str = ""

    def __str__(self) -> str:
        said = (
            f"{self.name:52}{self.planned_mib:10.2f}{self.peak_mib:10.2f}{self.measured or 0.0:9.3f} %  {self.verdict}"
        )
        return f"{said}{f', most in {self.largest_role}' if self.verdict == 'missed' else ''}"


def cells(dry_run: bool) -> Iterator[tuple[str, list[str]]]:
    """A name and the settings of each."""
    for model, precision, kept, optim in itertools.product(MODELS, PRECISIONS, (False, True), ("adamw", "adamw-8bit")):
        if dry_run and (precision, kept, optim) != ("fp8", True, "adamw"):
            continue
        told = f"{model}, {precision}, {'checkpointing' if kept else 'activations kept'}, {optim}"
        settings = [f"model={model}", f"precision={precision}", f"trainer.checkpointing={str(kept).lower()}"]
        yield told, [*settings, f"optim={optim}"]


def grade(overrides: list[str]) -> Grade:
    """Plan and measure the run of these settings."""
    config = composed([*overrides, "telemetry.record_every=0", "trainer.eval_every=0"])
    prepared = prepare(config)
    gpu = prepared.device.type == "cuda"
    planned = plan(rank_job(prepared.model_module, prepared.model_config, config, prepared.layout, gpu=gpu))
    trainer = assemble(prepared, NullSink())
    trainer.fit(until=2)
    found = graded(planned, trainer.memory.roles_gib)
    assert found is not None, "two steps measure memory"
    return found


def row_of(name: str, overrides: list[str]) -> Row:
    gpu = torch.cuda.is_available()
    found = grade([*overrides, *(ON_GPU if gpu else ())])
    apart = {role: abs(share) for role, share in found.by_role().items()}
    return Row(
        name,
        BOUND_GPU if gpu else BOUND_CPU,
        unit="%",
        measured=100 * abs(found.off_frac),
        planned_mib=1024 * sum(found.planned_gib.values()),
        peak_mib=1024 * sum(found.measured_gib.values()),
        largest_role=max(apart, key=lambda role: apart[role]),
    )


def run(argv: list[str]) -> int:
    """Measure and print; 0 whatever the figures are: they are a finding, not a failure."""
    parser = argparse.ArgumentParser(prog="mptrain bench plan", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write rows to this file as they come")
    parser.add_argument("--dry-run", action="store_true", help="one cell of each architecture")
    asked = parser.parse_args(argv)
    about = cpu.machine() | {"command": " ".join(["mptrain bench plan", *argv])}
    if torch.cuda.is_available():
        about["gpu"] = torch.cuda.get_device_name()
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print(f"{'':52}{'planned':>10}{'measured':>10}{'apart':>9}")
    rows: list[dict[str, Any]] = []
    for name, overrides in cells(asked.dry_run):
        row = row_of(name, overrides)
        print(row, flush=True)
        rows.append(asdict(row) | {"verdict": row.verdict})
        if asked.json is not None:
            write_whole(asked.json, json_text({"machine": about, "rows": rows}, indent=1))
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return 0

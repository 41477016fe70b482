"""``mptrain bench plan``: the memory plan of a run against its measured memory.

Each cell is planned, then trained for two steps and measured: live tensor bytes on a CPU, by the same roles, the
allocator's peak on a GPU. Precisions x activation checkpointing x AdamW's moments x architectures. A bound of 3 % on a
CPU, 5 % on a GPU. ``--dry-run`` takes one cell of each architecture.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from mptrain.bench import rows
from mptrain.bench.rows import Report, arguments, machine
from mptrain.build.assemble import assemble
from mptrain.build.preflight import prepare
from mptrain.config import composed
from mptrain.loggers import NullSink
from mptrain.memory.training.grading import Grade, graded
from mptrain.memory.training.plan import plan, rank_job

BOUND_CPU, BOUND_GPU = 3.0, 5.0  # percent
PRECISIONS = ("fp32", "bf16", "fp16", "fp8")
MODELS = ("gpt-nano", "llama-nano")
ON_GPU = ("model.n_embd=1024", "model.n_head=16", "model.block_size=1024")  # nano is smaller than an allocator's blocks


@dataclass
class Row(rows.Row):
    """``measured``: percent between plan and measurement, as an absolute value; the peaks themselves in MiB."""

    planned_mib: float = 0.0
    peak_mib: float = 0.0
    largest_role: str = ""

    def __str__(self) -> str:
        figures = f"{self.planned_mib:10.2f}{self.peak_mib:10.2f}{self.measured or 0.0:9.3f} %"
        role = f", most in {self.largest_role}" if self.verdict == "missed" else ""
        return f"{self.name:52}{figures}  {self.verdict}{role}"


def cells(dry_run: bool) -> Iterator[tuple[str, list[str]]]:
    """Yield the name and the settings of each cell."""
    axes = MODELS, PRECISIONS, (False, True), ("adamw", "adamw-8bit")
    for model, precision, recompute, optim in itertools.product(*axes):
        if dry_run and (precision, recompute, optim) != ("fp8", True, "adamw"):
            continue
        name = f"{model}, {precision}, {'checkpointing' if recompute else 'activations kept'}, {optim}"
        settings = [f"model={model}", f"precision={precision}", f"trainer.checkpointing={str(recompute).lower()}"]
        yield name, [*settings, f"optim={optim}"]


def grade(overrides: list[str]) -> Grade:
    """Plan and measure the run of these settings."""
    config = composed([*overrides, "telemetry.record_every=0", "trainer.eval_every=0"])
    prepared = prepare(config)
    gpu = prepared.device.type == "cuda"
    planned = plan(rank_job(prepared.model_module, prepared.model_config, config, prepared.layout, gpu=gpu))
    trainer = assemble(prepared, NullSink())
    trainer.fit(until=2)
    measured = graded(planned, trainer.memory.roles_gib)
    assert measured is not None, "two steps measure memory"
    return measured


def row_of(name: str, overrides: list[str]) -> Row:
    gpu = torch.cuda.is_available()
    outcome = grade([*overrides, *(ON_GPU if gpu else ())])
    apart = {role: abs(share) for role, share in outcome.by_role().items()}
    return Row(
        name,
        BOUND_GPU if gpu else BOUND_CPU,
        unit="%",
        measured=100 * abs(outcome.off_frac),
        planned_mib=1024 * sum(outcome.planned_gib.values()),
        peak_mib=1024 * sum(outcome.measured_gib.values()),
        largest_role=max(apart, key=lambda role: apart[role]),
    )


def run(argv: list[str]) -> int:
    """Measure and print. Always returns 0: missed targets are results, not failures."""
    command = "mptrain bench plan"
    args = arguments(command, __doc__, dry_run="one cell of each architecture").parse_args(argv)
    about = machine(command, argv)
    if torch.cuda.is_available():
        about["gpu"] = torch.cuda.get_device_name()
    report = Report(args.json, about, f"{'':52}{'planned':>10}{'measured':>10}{'apart':>9}")
    for name, overrides in cells(args.dry_run):
        report.add(row_of(name, overrides))
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return 0

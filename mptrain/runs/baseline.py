"""The FP32 baseline of each run: a previous FP32 run with the same fingerprint, or a probe of a few FP32 steps.

Runs of one fingerprint (:mod:`mptrain.runs.identity`) differ by precision alone, so their losses are compared at
the same step. The probe runs in a separate process, before this run allocates anything on the device, so neither
takes the other's memory or time; a file lock keeps two probes from measuring each other. Its result stays in the
runs folder for the next run with that fingerprint.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mptrain.runs.identity import COMPARED, updates
from mptrain.tools.files import number, object_in, rows_in, write_whole
from mptrain.tools.locks import locked
from mptrain.tools.settings import to_plain

PROBE_STEPS = 8  # 3 of warm-up, then 5 whose median is the speed
FEW_STEPS = 100  # with fewer, a ratio of losses is not meaningful
PROBES = ".fp32-probes"
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Figures:
    """The measurements of one side of the comparison.

    ``losses``: training loss (nats) by step; ``tokens_per_s``: images per second if samples are images.
    """

    source: str = "none"
    losses: dict[int, float] = field(default_factory=dict)
    tokens_per_s: float = math.nan
    peak_memory_gib: float = math.nan
    val_loss: float = math.nan
    val_top1_frac: float = math.nan
    note: str = ""

    @property
    def steps(self) -> int:
        return max(self.losses, default=0)


def find(folders: list[Path], fingerprint: str) -> Figures | None:
    """Return the longest, then newest, FP32 run with this fingerprint in the folders of runs, or None."""
    candidates: list[tuple[int, float, Path]] = []
    for path in {path for folder in folders for path in folder.glob("*/summary.json")}:
        summary = object_in(path)
        if summary.get("precision") == "fp32" and summary.get("fingerprint") == fingerprint:
            candidates.append((int(summary["steps"]), path.stat().st_mtime, path.parent))
    return read_run(max(candidates)[2]) if candidates else None


def named(folder: Path, config: Any, fingerprint: str) -> Figures:
    """Return the FP32 run in ``folder``. ValueError, naming the settings that differ, if it cannot be compared."""
    summary = object_in(folder / "summary.json")
    if not summary:
        raise ValueError(f"baseline={folder} holds no finished run (no summary.json): give the folder of an FP32 run")
    if summary.get("precision") != "fp32":
        raise ValueError(f"baseline={folder} is a {summary.get('precision')} run: give one with precision=fp32")
    if summary.get("fingerprint") != fingerprint:
        both = object_in(folder / "config.json"), to_plain(config)
        theirs, ours = ({**values, "optim": updates(values.get("optim", {}))} for values in both)
        pairs = [d for key in COMPARED for d in _differences(theirs.get(key), ours[key], key)]
        what = "; ".join(pairs) or "another machine, corpus or version of torch"
        raise ValueError(f"baseline={folder} is not comparable ({what}): use baseline=auto or make these equal")
    return read_run(folder)


def read_run(folder: Path) -> Figures:
    """Return the figures of a finished run, from its folder."""
    summary = object_in(folder / "summary.json")
    speed, memory = number(summary.get("tokens_per_s")), number(summary.get("peak_memory_gib"))
    val_loss, val_top1 = number(summary.get("val_loss")), number(summary.get("val_top1_frac"))
    return Figures(f"run {folder}", read_losses(folder), speed, memory, val_loss, val_top1)


def read_losses(folder: Path) -> dict[int, float]:
    """Read training loss by step from ``metrics.jsonl``; of a step done twice (resumed) the last."""
    rows = rows_in(folder / "metrics.jsonl")
    return {row["step"]: row["train/loss_step"] for row in rows if isinstance(row.get("train/loss_step"), float)}


def probe(config: Any, fingerprint: str, runs: Path, say: Callable[[str], None]) -> Figures:
    """Measure FP32 for a few steps in another process, or read the figures of an earlier probe.

    A failure becomes a note.
    """
    folder = runs / PROBES
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / "lock", lambda: say("waiting for the FP32 probe of another run")):
        known = kept(fingerprint, runs)
        if known is None:
            say(f"FP32 probe: {PROBE_STEPS} steps in a process of its own")
            result = _run_probe(config)
            if "error" in result:
                return Figures(note=f"the FP32 probe failed: {result['error']}")
            known = _read(result)
            keep(known, fingerprint, runs)
    return known


def kept(fingerprint: str, runs: Path) -> Figures | None:
    """Read the figures of an earlier probe with this fingerprint."""
    result = object_in(runs / PROBES / f"{fingerprint}.json")
    return _read(result) if result else None


def keep(figures: Figures, fingerprint: str, runs: Path) -> None:
    """Store a probe's figures for later runs."""
    (runs / PROBES).mkdir(parents=True, exist_ok=True)
    write_whole(runs / PROBES / f"{fingerprint}.json", figures_json(figures))


def _read(result: dict[str, Any]) -> Figures:
    losses = {int(step): loss for step, loss in result["losses"].items()}
    source = f"probe of {len(losses)} steps"
    return Figures(source, losses, result["tokens_per_s"], result["peak_memory_gib"])


def _run_probe(config: Any) -> dict[str, Any]:
    """Start ``mptrain probe`` and wait. Whatever interrupts the wait ends the process too."""
    environment = {key: value for key, value in os.environ.items() if key not in LAUNCHER}
    with tempfile.TemporaryDirectory(prefix="mptrain-probe-") as folder:
        settings_file, figures_file = Path(folder) / "config.json", Path(folder) / "figures.json"
        settings_file.write_text(json.dumps(to_plain(config)))
        command = [sys.executable, "-m", "mptrain.cli.subprocesses", "probe", str(settings_file), str(figures_file)]
        done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            return {"error": lines[-1]}
        return object_in(figures_file)


def figures_json(figures: Figures) -> str:
    """Return the figures as the probe's process hands them over."""
    return json.dumps(asdict(figures))


def compare(run: Figures, fp32: Figures, *, emulated: bool = False) -> dict[str, Any]:
    """Return ratios to FP32 (speed above 1: faster; memory below 1: smaller) and differences (nats, accuracy), NaN
    where unknown.

    Losses are those of the last step that both sides have, on the same batch. ``emulated``: the run's speed is
    that of an emulation, so its ratio is not a speed-up.
    """
    step = max(run.losses.keys() & fp32.losses.keys(), default=0)
    loss, loss_fp32 = run.losses.get(step, math.nan), fp32.losses.get(step, math.nan)
    same_length = run.steps == fp32.steps
    return {
        "source": fp32.source,
        "note": fp32.note,
        "speedup": math.nan if emulated else run.tokens_per_s / fp32.tokens_per_s,
        "memory_ratio": run.peak_memory_gib / fp32.peak_memory_gib,
        "loss_delta": loss - loss_fp32,
        "val_loss_delta": run.val_loss - fp32.val_loss if same_length else math.nan,
        "val_top1_delta": run.val_top1_frac - fp32.val_top1_frac if same_length else math.nan,
        "step": step,
        "loss": loss,
        "fp32_loss": loss_fp32,
        "fp32_val_loss": fp32.val_loss if same_length else math.nan,
        "fp32_val_top1_frac": fp32.val_top1_frac if same_length else math.nan,
        "tokens_per_s": run.tokens_per_s,
        "fp32_tokens_per_s": fp32.tokens_per_s,
        "fp32_peak_memory_gib": fp32.peak_memory_gib,
    }


def _differences(theirs: Any, ours: Any, where: str) -> Iterator[str]:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in sorted(theirs.keys() | ours.keys()):
            yield from _differences(theirs.get(key), ours.get(key), f"{where}.{key}")
    elif theirs != ours:
        yield f"{where} is {theirs} there and {ours} here"

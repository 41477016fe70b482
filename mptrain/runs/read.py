"""Reader of run folders in any state: finished, running, stopped, failed or damaged. A damaged run raises no error.

A value that was not a number is null in the files and NaN here, to distinguish it from one that was never written.
"""

from __future__ import annotations

import difflib
import math
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mptrain.runs.identity import FILE, HISTORY, JOB_LOCK, LOCK
from mptrain.tools.files import number, object_in, rows_in
from mptrain.tools.locks import is_held

Floats = npt.NDArray[np.float64]
MARKS = ("config.json", "metrics.jsonl", "summary.json", "error.json", "job.json")  # one of them makes a run's folder
TAIL_BYTES = 1 << 14  # of metrics.jsonl: contains the last row of metrics for intervals up to 150 steps


class Status(Enum):
    """The state of a run."""

    finished = "finished"
    running = "running"
    stopped = "stopped"  # before its last step, and no process runs it: resume=auto continues it
    failed = "failed"
    unreadable = "unreadable"


@dataclass(frozen=True)
class Run:
    """The contents of a run's folder. ``losses``, ``scales``: training loss (nats) and loss scale by step."""

    folder: Path
    status: Status
    why: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    losses: dict[int, float] = field(default_factory=dict)
    scales: dict[int, float] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    attempts: list[dict[str, Any]] = field(default_factory=list)

    @property
    def mixed(self) -> str:
        """The changes of precision during the run; empty if there were none."""
        parts = []
        for attempt in self.attempts:
            changes = attempt.get("changes", {})
            changed = [name for name in attempt.get("mixed", ()) if name in changes]
            described = [f"{name} {' -> '.join(map(str, changes[name]))}" for name in changed]
            parts += [f"{', '.join(described)} at step {attempt.get('step')}"] if described else []
        return f"mixed: {'; '.join(parts)}" if parts else ""

    @property
    def elsewhere(self) -> bool:
        """Whether it was resumed on another machine, torch or number of ranks: its speed is then not comparable."""
        return any(attempt.get("elsewhere") for attempt in self.attempts)

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def seed(self) -> int | None:
        seed: int | None = self.config.get("seed")
        return seed

    @property
    def max_steps(self) -> int | None:
        max_steps: int | None = self.config.get("trainer", {}).get("max_steps")
        return max_steps

    @property
    def steps(self) -> int:
        return max(self.losses, default=0)

    def figure(self, name: str) -> float:
        """Return a number of the summary; NaN where there is none."""
        return number(self.summary.get(name))

    def curve(self) -> Floats:
        """Return the training loss of steps 1 to ``max_steps``, NaN where none was read."""
        curve = np.full(self.max_steps or self.steps, math.nan)
        for step, loss in self.losses.items():
            if 1 <= step <= len(curve):
                curve[step - 1] = loss
        return curve


def expand(paths: Iterable[Path]) -> list[Path]:
    """Run folders: those given, and those inside a given folder of runs (a sweep). ValueError for anything else."""
    folders: dict[Path, Path] = {}  # by resolved path: a run given twice counts once
    for path in paths:
        if is_run(path):
            folders.setdefault(path.resolve(), path)
            continue
        inside = [inner for inner in path.iterdir() if is_run(inner)] if path.is_dir() else []
        if not inside:
            raise ValueError(f"{path} is not a run and holds none{_nearest(path)}")
        for folder in sorted(inside, key=lambda inner: natural(inner.name)):
            folders.setdefault(folder.resolve(), folder)
    return list(folders.values())


def natural(name: str) -> list[tuple[int, str]]:
    """Return a sort key that orders numbers in a name by size: history=16 before history=1024."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def is_run(folder: Path) -> bool:
    return any((folder / mark).is_file() for mark in MARKS)


def _nearest(path: Path) -> str:
    siblings = [inner.name for inner in path.parent.glob("*") if inner.is_dir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, siblings, n=1)
    return f": did you mean {path.parent / near[0]}?" if near else ": give the folder of a run or of a sweep"


def read(folder: Path) -> Run:
    """Read everything in the folder of one run."""
    config, about, summary = settings_in(folder), object_in(folder / FILE), object_in(folder / "summary.json")
    losses: dict[int, float] = {}
    scales: dict[int, float] = {}
    for row in rows_in(folder / "metrics.jsonl"):
        step = row.get("step")
        if isinstance(step, int):
            if "train/loss_step" in row:
                losses[step] = number(row["train/loss_step"])
            if "scale/value" in row:
                scales[step] = number(row["scale/value"])
    status, why = _status(folder, config, summary, max(losses, default=0))
    events = list(rows_in(folder / "events.jsonl"))
    attempts = object_in(folder / HISTORY).get("attempts", [])
    return Run(folder, status, why, config, about, summary, losses, scales, events, attempts)


def glance(folder: Path) -> Run:
    """Read the same from the end of ``metrics.jsonl`` only: fast enough for a table redrawn every second."""
    config, summary = settings_in(folder), object_in(folder / "summary.json")
    rows = [row for row in rows_in(folder / "metrics.jsonl", TAIL_BYTES) if isinstance(row.get("step"), int)]
    losses = {row["step"]: number(row["train/loss_step"]) for row in rows if "train/loss_step" in row}
    if isinstance(summary.get("steps"), int):  # the last row may be longer than the part read
        losses[summary["steps"]] = number(summary.get("train_loss"))
    status, why = _status(folder, config, summary, max(losses, default=0))
    speeds = [row["speed/tokens_per_s"] for row in rows if "speed/tokens_per_s" in row]
    skipped = [row["scale/skipped_total"] for row in rows if "scale/skipped_total" in row]
    latest = {"tokens_per_s": speeds[-1:], "skipped_steps": skipped[-1:]}
    summary = {key: values[0] for key, values in latest.items() if values} | summary
    return Run(folder, status, why, config, {}, summary, losses)


def _status(folder: Path, config: dict[str, Any], summary: dict[str, Any], step: int) -> tuple[Status, str]:
    failed = object_in(folder / "error.json").get("error")
    whole = config.get("trainer", {}).get("max_steps")
    if whole and number(summary.get("steps")) >= whole:
        return Status.finished, ""
    if in_use(folder):
        return Status.running, f"at step {step} of {whole or '?'}{_age(folder)}"
    if failed:
        return Status.failed, str(failed)
    if [mark for mark in MARKS if (folder / mark).exists()] == ["job.json"]:
        return Status.stopped, "never began: start the sweep again"
    if not whole:
        return Status.unreadable, _damage(folder)
    if (folder / "summary.json").exists() and not summary:
        return Status.unreadable, "summary.json is incomplete or corrupt"
    going_on = f"python train.py run_dir={folder} resume=auto continues it"
    continued = going_on if (folder / "checkpoints").exists() else "start it again"
    return Status.stopped, f"stopped at step {step} of {whole}: {continued}"


def settings_in(folder: Path) -> dict[str, Any]:
    """Return ``config.json`` if it holds the settings of a run, else an empty dict."""
    settings = object_in(folder / "config.json")
    groups = all(isinstance(settings.get(name), dict) for name in ("model", "data", "optim", "trainer", "precision"))
    policy = settings.get("precision", {}) if groups else {}
    parts = all(isinstance(policy.get(name), dict) for name in ("quantization", "loss_scale"))
    return settings if groups and parts and isinstance(settings.get("seed"), int) else {}


def _damage(folder: Path) -> str:
    there = (folder / "config.json").exists()
    return "config.json is incomplete or corrupt" if there else "no config.json: its settings are unknown"


def _age(folder: Path) -> str:
    try:
        return f", last heard of {max(0, time.time() - (folder / 'metrics.jsonl').stat().st_mtime):.0f} s ago"
    except OSError:
        return ""


def in_use(folder: Path) -> bool:
    """Return whether a process is running or preparing the run in ``folder``."""
    return is_held(folder / LOCK) or is_held(folder / JOB_LOCK)


def leaf_names(keys: Iterable[str]) -> dict[str, str]:
    """Map dotted settings to their last part, or to as many parts as distinguish them."""
    keys = list(keys)
    names = {}
    for key in keys:
        parts = key.split(".")
        tails = (".".join(parts[-n:]) for n in range(1, len(parts) + 1))
        others = [other for other in keys if other != key]
        pattern = "(^|.*\\.){}$"
        names[key] = next((t for t in tails if not any(re.match(pattern.format(re.escape(t)), o) for o in others)), key)
    return names

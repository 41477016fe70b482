"""Resuming a run: its own settings are the base, the command line overrides them, and changes are recorded.

    python train.py run_dir=runs/a resume=auto                     as it was begun
    python train.py run_dir=runs/a resume=auto precision=bf16      the rest of it in another precision: a mixed run

The folder keeps ``config.json`` of every attempt (``config.1.json`` is the first one) and ``history.json``: for
each attempt after the first its step, the changes, and whether the run is mixed since: trained in parts by other
numerics, so that no verdict counts it.
"""

from __future__ import annotations

import copy
import json
import os
import shlex
import shutil
import sys
from dataclasses import asdict, dataclass, field
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from mptrain import config as configuration
from mptrain.config import RunConfig
from mptrain.runs.identity import ASIDE, FILE, HISTORY, numerics
from mptrain.tools.files import object_in, write_whole
from mptrain.tools.settings import from_plain, to_plain

OWN = ("run_dir", "resume", "resume_anyway")  # taken from the command, never from the resumed run
MEANT_ELSEWHERE = ("seed", "data")  # changing these would change the batches
NUMERICS = ("model", "optim", "trainer", "debug")  # in addition to precision
HARMLESS = (  # of trainer: change when something is done, not what is computed
    "trainer.eval_every", "trainer.eval_batches", "trainer.max_skips_in_a_row", "trainer.on_spike",
    "trainer.checkpointing",
)  # fmt: skip
PLACES = ("machine", "torch", "ranks", "layout", "fp32_gemm")  # of run.json: where it ran, which determines speed
CODE = ("mptrain", "commit")


@dataclass(frozen=True)
class Resumed:
    """An attempt after the first.

    ``changes``: setting or property -> [before, now]; ``mixed``: those that change numerics; ``elsewhere``: those
    that change the machine, so that speeds are not comparable.
    """

    step: int
    source: str = ""
    changes: dict[str, list[Any]] = field(default_factory=dict)
    mixed: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)

    def brief(self) -> dict[str, list[Any]]:
        """List the changes; for another precision only its name, which implies the rest."""
        renamed = "precision.name" in self.changes
        return {
            name: both
            for name, both in self.changes.items()
            if not (renamed and name.startswith("precision.") and name != "precision.name")
        }

    def lines(self) -> list[str]:
        """List the messages for the user."""
        lines = [f"resuming at step {self.step}: {name} was {a}, is {b}" for name, (a, b) in self.brief().items()]
        if self.mixed:
            lines.append(f"mixed run from here on ({', '.join(self.mixed)}): shown by compare, excluded from verdicts")
        if self.elsewhere:
            lines.append("on another machine than before: its speed is excluded from comparisons")
        return lines


def settings(composed: DictConfig, typed: list[str]) -> RunConfig:
    """Return the settings of a command: Hydra's composition, based on the run to resume if there is one.

    ``typed``: the overrides of the command line. ValueError if the run's settings cannot be read, or do not fit.
    """
    plain = configuration.plain(composed)
    folder = _base(str(plain["run_dir"]), str(plain["resume"]))
    if folder is None:
        return configuration.parse(composed)
    saved = object_in(folder / "config.json")
    if not saved:
        there = "is damaged" if (folder / "config.json").exists() else "is missing"
        raise ValueError(
            f"{folder}/config.json {there}, so the run's settings are unknown: restore it, or give all of them, with "
            f"resume={folder}/checkpoints/NAME and a new run_dir"
        )
    merged = copy.deepcopy(saved)
    for path, deleted in configuration.typed_paths(typed):
        _put(merged, path, None if deleted else reduce(getitem, path.split("."), plain), deleted=deleted)
    merged |= {name: plain[name] for name in OWN}
    try:
        resumed: RunConfig = from_plain(RunConfig, merged, "")
    except ValueError as error:
        raise ValueError(f"with the settings of {folder}/config.json: {error}") from error
    configuration.check_open(resumed)
    return resumed


def _base(run_dir: str, resume: str) -> Path | None:
    """Return the folder of the run to resume; None for a new run."""
    if resume == "auto":
        folder = Path(run_dir)
        began = any((folder / name).exists() for name in ("config.json", "metrics.jsonl", "checkpoints"))
        return folder if run_dir and began else None
    folder = Path(resume).parent.parent
    return folder if resume != "none" and (folder / "config.json").exists() else None


def _put(values: dict[str, Any], path: str, value: Any, *, deleted: bool) -> None:
    *parents, leaf = path.split(".")
    for part in parents:
        values = values.setdefault(part, {})
    if deleted:
        values.pop(leaf, None)
    else:
        values[leaf] = value


@dataclass(frozen=True)
class Earlier:
    """The run so far, from the folder of a checkpoint; empty if it is not in a run's folder."""

    checkpoint: Path
    step: int
    config: dict[str, Any]
    about: dict[str, Any]
    history: list[dict[str, Any]]

    @staticmethod
    def of(checkpoint: Path, step: int) -> Earlier:
        folder = checkpoint.resolve().parent.parent
        history = object_in(folder / HISTORY).get("attempts", [])
        return Earlier(checkpoint, step, object_in(folder / "config.json"), object_in(folder / FILE), history)

    def require_meant(self, config: RunConfig, corpus: str) -> None:
        """Raise ValueError for another seed or other data, unless ``resume_anyway`` is set."""
        if config.resume_anyway or not self.config:
            return
        before, now = self.config.get("seed"), config.seed
        if before != now:
            raise ValueError(
                f"{self.checkpoint} belongs to a run with seed={before}, and seed={now} would continue with other "
                "batches: leave it out, or set resume_anyway=true"
            )
        if self.about.get("corpus", corpus) != corpus:
            corpus_before, kind = self.about.get("corpus_name"), config.data.get("kind")
            raise ValueError(
                f"{self.checkpoint} belongs to a run on {corpus_before}, and data={kind} has other content now: use "
                "its data, or set resume_anyway=true"
            )

    def finished(self, max_steps: int) -> str:
        """Return a message if the run is complete; empty while steps are left."""
        folder = self.checkpoint.resolve().parent.parent
        done = object_in(folder / "summary.json").get("steps")
        if not isinstance(done, int) or done < max_steps or self.step < max_steps:
            return ""
        status = f"{folder} is finished ({done} of {max_steps} steps) and stays as it is"
        return f"{status}: trainer.max_steps={2 * done} continues it"

    def resumed(self, config: RunConfig, about: dict[str, Any]) -> Resumed:
        """Compare with the present settings. ``about``: ``run.json`` as this attempt would write it."""
        if not self.config:
            return Resumed(self.step, str(self.checkpoint))
        changes = _differences(self.config, to_plain(config))
        mixed = [name for name in changes if name.partition(".")[0] in (*NUMERICS, *MEANT_ELSEWHERE)]
        mixed = [name for name in mixed if name not in HARMLESS]
        if _numerics(self.config) != _numerics(to_plain(config)):
            inside = [name for name in changes if name.startswith("precision.")]
            mixed += ["precision.name"] if "precision.name" in inside else inside
        known = {name: [self.about[name], about[name]] for name in (*PLACES, *CODE, "backend") if name in self.about}
        moved = {name: both for name, both in known.items() if both[0] != both[1]}
        mixed += [name for name in moved if name == "backend"]
        return Resumed(self.step, str(self.checkpoint), changes | moved, mixed, [n for n in moved if n in PLACES])


def _numerics(plain: dict[str, Any]) -> Any:
    try:
        return numerics(plain["precision"])
    except (KeyError, TypeError):
        return None


def _differences(before: Any, now: Any, where: str = "") -> dict[str, list[Any]]:
    """Map dotted settings that differ to [before, now]; those that change no number of a run are ignored."""
    if not isinstance(before, dict) or not isinstance(now, dict):
        return {where: [before, now]} if before != now else {}
    changes: dict[str, list[Any]] = {}
    for name in [*before, *(name for name in now if name not in before)]:
        if where or name not in (*ASIDE, *OWN):
            inner = f"{where}.{name}" if where else name
            if name in before and name in now:
                changes |= _differences(before[name], now[name], inner)
    return changes


def remember(folder: Path, earlier: Earlier, resumed: Resumed) -> None:
    """Add the attempt to ``history.json``."""
    attempts = [*earlier.history, asdict(resumed)]
    write_whole(folder / HISTORY, json.dumps({"attempts": attempts}, indent=2) + "\n")


def command(folder: Path) -> str:
    """Write the whole command that resumes the run in ``folder``, for a shell."""
    each = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    script = sys.argv[0] if sys.argv[0].endswith(".py") else "train.py"
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        nodes = int(os.environ["WORLD_SIZE"]) // each
        start = ["torchrun", *([f"--nnodes={nodes}"] if nodes > 1 else []), f"--nproc-per-node={each}", script]
    else:
        python = shutil.which("python")
        start = ["python" if python and Path(python).samefile(sys.executable) else sys.executable, script]
    return shlex.join([*start, configuration.readable([f"run_dir={folder}"])[0], "resume=auto"])

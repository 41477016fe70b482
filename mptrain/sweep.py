"""Sweeps: ``python train.py -m precision=fp32,fp8 seed=0,1,2``, by Hydra's launchers, in one folder, with one report.

Hydra composes the jobs and starts them, here, in other processes or on a cluster. What this module adds lives in files
of the sweep's folder alone, so that every launcher can share it: ``sweep.json`` (what the sweep varies), a folder for
each run with ``job.json`` (its settings), ``error.json`` if it failed and ``console.log`` with its output.

A job is known by its settings, not by its number: the same sweep started again finishes what is missing, a larger one
in the same folder adds to it, and jobs that would compute the same (FP32 at three amax histories) are run once.
A job that fails leaves its error; the others continue.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from rich.console import Console

from mptrain import build, config
from mptrain.checkpoint.checkpoints import Checkpoints
from mptrain.cli.errors import explain
from mptrain.config import RunConfig
from mptrain.distributed import ALONE, Ranks, Told
from mptrain.distributed.joining import join
from mptrain.loggers.wandb import log_comparison
from mptrain.report.compare import seeds, watch
from mptrain.report.compare.compare import compare
from mptrain.report.compare.files import write_all
from mptrain.report.compare.terminal import print_comparison_table
from mptrain.runs import read as runs
from mptrain.runs.baseline import FEW_STEPS
from mptrain.runs.folder import claim
from mptrain.runs.identity import JOB_LOCK, job_mark, short_hash
from mptrain.runs.read import Status
from mptrain.tools import machine
from mptrain.tools.files import object_in, write_whole
from mptrain.tools.launcher import rank, world_size
from mptrain.tools.locks import locked
from mptrain.tools.settings import to_plain

PLAN, JOB, ERROR = "sweep.json", "job.json", "error.json"
WORST = math.inf  # reported to a minimizing search by a job that failed or has no finite loss
UNNAMED = (  # not part of a folder's name
    "sweep_dir", "sweep_seeds", "runs_dir", "logger", "logger.wandb", "logger.project", "device",
)  # fmt: skip

_watch: watch.Watch | None = None  # of the sweep started by this process
_held: TextIO | None = None  # its lock on the sweep's folder


class Sweep(Callback):
    """Hydra callback at the start of a sweep (see conf/config.yaml); :func:`reported` ends it."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Choose the sweep's folder, write its plan and start the live table."""
        global _watch, _held
        if world_size() > 1:
            print(
                "error: a sweep starts its own processes: use hydra/launcher=submitit_slurm, not torchrun",
                file=sys.stderr,
            )
            raise SystemExit(2)
        try:
            folder = _plan(config)
            _held = claim(folder)
        except (OSError, ValueError) as error:  # Hydra would only warn and continue
            print(f"error: sweep_dir={config.sweep_dir} cannot be used: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        console = Console()
        given_steps = [word.partition("=")[2] for word in _given(config) if word.startswith("trainer.max_steps=")]
        if given_steps and given_steps[-1].isdigit() and int(given_steps[-1]) < FEW_STEPS:
            few = f"{given_steps[-1]} steps per run are too few for a verdict"
            console.print(f"{few}: use trainer.max_steps={FEW_STEPS} or more", highlight=False)
        _watch = watch.Watch(folder, console)
        _watch.start()


def _plan(composed: DictConfig) -> Path:
    """Write ``sweep.json``; pass the folder to every job as an override like any other."""
    given = _given(composed)
    varied = _varied(given)
    if not composed.sweep_dir:
        same = [word for word in given if not (composed.sweep_seeds and word.startswith("seed="))]  # more may follow
        what = "-".join(key.rpartition(".")[2].rpartition("/")[2] for key in _varied(same)) or "jobs"
        name = f"sweep-{what}-{short_hash(sorted(same))[:6]}"
        with read_write(composed), open_dict(composed), read_write(composed.hydra):
            composed.sweep_dir = str(Path(composed.runs_dir) / name)
            composed.hydra.overrides.task.append(f"sweep_dir='{composed.sweep_dir}'")  # quoted: it may hold a comma
    folder = Path(composed.sweep_dir)
    folder.mkdir(parents=True, exist_ok=True)
    counts = [len(values) for values in varied.values()]
    given_seeds = _seeds(composed, varied)
    named = seeds.named(folder, given_seeds, composed.sweep_seeds)
    for seed in given_seeds or ():
        if named.uncounted(seed):
            Console().print(f"seed={seed} will not count: {named.uncounted(seed)}", highlight=False, soft_wrap=True)
    plan = {
        "overrides": given,
        "varied": list(varied),
        "jobs": math.prod(counts) if all(counts) else None,  # None: a search, or a pattern that Hydra expands
        "seeds": [*named.seeds],
        "last_seeds": named.last,
        "holds_fp32": "fp32" in varied.get("precision", []),
        "wandb_project": composed.logger.project if composed.logger.wandb else None,
    }
    _write(folder / PLAN, plan)
    return folder


def _seeds(composed: DictConfig, varied: dict[str, list[str]]) -> list[int] | None:
    """Return the seeds in the order they are given; None if a search or a pattern chooses them."""
    given = varied.get("seed", [str(composed.seed)])
    return [int(seed) for seed in given if seed.isdigit()] or None


def _given(composed: DictConfig) -> list[str]:
    """Return the overrides of the sweep: the configuration's, then the command line's, which take precedence."""
    params = OmegaConf.select(composed, "hydra.sweeper.params") or {}
    return [*(f"{key}={value}" for key, value in params.items()), *composed.hydra.overrides.task]


def _varied(overrides: Sequence[str]) -> dict[str, list[str]]:
    """Return the settings that a sweep varies, with their values if they are a list; the last of a setting given
    twice."""
    varied: dict[str, list[str]] = {}
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        key = override.get_key_element()
        varied.pop(key, None)
        if override.is_discrete_sweep():
            varied[key] = [str(value) for value in override.sweep_string_iterator()]
        elif override.is_sweep_override():
            varied[key] = []
    return varied


@contextmanager
def reported() -> Iterator[None]:
    """Wrap ``main()``: at the end of a sweep print the table and verdicts, write the report; nothing for a single
    run."""
    global _watch, _held
    failed = 0
    try:
        yield
    finally:
        if _watch is not None and _held is not None:
            _watch.stop()
            _held.close()
            failed = report(_watch.folder, _watch.console)
            _watch = _held = None
    if failed:
        raise SystemExit(1)


def report(folder: Path, console: Console) -> int:
    """Compare the runs of a sweep: print, write report.html, report.md and report.json, log to W&B.

    Returns the number of jobs that failed.
    """
    all_runs = [runs.glance(path) for path in sorted(folder.iterdir()) if runs.is_run(path)]
    failed = [run for run in all_runs if run.status is Status.failed]
    try:
        comparison = compare([folder])
    except ValueError as error:
        console.print(str(error), highlight=False, soft_wrap=True)
        return len(failed)
    print_comparison_table(console, comparison)
    written = write_all(comparison, folder)
    project = json.loads((folder / PLAN).read_text())["wandb_project"]
    if project is not None:
        log_comparison(comparison, folder, console, project)
    for run in failed:
        console.print(f"{run.name} failed: {run.why} ({folder / run.name / ERROR})", highlight=False, soft_wrap=True)
    if any(run.status is not Status.finished for run in all_runs):
        console.print("some runs are unfinished; rerun the same command to complete them", highlight=False)
    others = ", ".join(path.name for path in written[1:])
    console.print(f"report: {written[0]} (and {others})", highlight=False, soft_wrap=True)
    return len(failed)


def is_job() -> bool:
    """Return whether this is one of a sweep's jobs. (A job's own mode says RUN; only sweeps number their jobs.)"""
    return not OmegaConf.is_missing(HydraConfig.get().job, "num")


def require_single(composed: DictConfig) -> None:
    """Raise ValueError for a single run with settings that only sweeps have."""
    ablation = HydraConfig.get().runtime.choices.get("ablation")
    given = {"sweep_dir": composed.sweep_dir, "sweep_seeds": composed.sweep_seeds, "ablation": ablation}
    for name in (name for name, value in given.items() if value):
        raise ValueError(f"{name} is for sweeps: add -m (python train.py -m ...)")


def job(composed: DictConfig) -> float:
    """Run one job of a sweep, unless it is finished; return the validation loss (nats), inf if there is none.

    submitit may start it as several tasks (``hydra.launcher.tasks_per_node``): they are the ranks of one run.
    """
    as_ranks()
    if rank() > 0:
        return _follow(composed)
    sweep = Path(composed.sweep_dir)
    plan = json.loads((sweep / PLAN).read_text())
    name = folder_name(list(HydraConfig.get().overrides.task), plan["varied"])
    try:
        settings = config.parse(composed)
    except Exception as error:
        _fail(_folder(sweep, name, short_hash(name)), error)
        return WORST
    folder = _folder(sweep, name, job_mark(to_plain(settings)))
    with _alone(folder):
        missing = runs.glance(folder).status is not Status.finished
        if _joined(settings).share(missing):
            _train(settings, folder, plan)
    loss = runs.glance(folder).figure("val_loss")
    return loss if math.isfinite(loss) else WORST


def as_ranks() -> None:
    """Export the rank of this task to torch, if submitit starts several."""
    if "SUBMITIT_EXECUTOR" in os.environ:
        from submitit.helpers import TorchDistributedEnvironment

        job = TorchDistributedEnvironment()
        if job.world_size > 1:
            job.export(set_cuda_visible_devices=False)


def _follow(composed: DictConfig) -> float:
    """Train as one of the other ranks of a job, which write none of the sweep's files."""
    settings = config.parse(composed)
    with contextlib.suppress(Told):
        if _joined(settings).share(False):  # rank 0 decides
            run = build.build(settings)
            if run is not None:
                run.train()
    return WORST


def _joined(settings: RunConfig) -> Ranks:
    return join(settings.dist, machine.pick_device(settings.device)) if world_size() > 1 else ALONE


def folder_name(overrides: list[str], varied: list[str]) -> str:
    """Name a job's folder by its distinguishing settings (all given ones, if they are unknown):
    ``precision=fp8,seed=1``."""
    pairs = [override.partition("=") for override in overrides]
    shown = [(key, value) for key, _, value in pairs if key in varied] or [
        (key, value) for key, _, value in pairs if key not in UNNAMED
    ]
    words = [f"{key.rpartition('.')[2]}={re.sub(r'[^a-zA-Z0-9.+-]+', '_', value).strip('_')}" for key, value in shown]
    name = ",".join(words).replace("/", "_") or "run"
    return name if len(name) <= 100 else f"{name[:90]}-{short_hash(name)[:8]}"


def _folder(sweep: Path, name: str, mark: str) -> Path:
    """Return the folder of the job with these settings: an existing one, or a new one."""
    with locked(sweep / ".jobs.lock"):
        for path in sweep.glob(f"*/{JOB}"):
            known = object_in(path)
            if known.get("mark") == mark:
                names = dict.fromkeys([*known["names"], name])
                _write(path, {"mark": mark, "names": [*names]})
                return path.parent
        folder, number = sweep / name, 2
        while folder.exists():  # exists for other settings: an edited YAML, or another model
            folder, number = sweep / f"{name}-{number}", number + 1
        folder.mkdir()
        _write(folder / JOB, {"mark": mark, "names": [name]})
        return folder


def _train(settings: RunConfig, folder: Path, plan: dict[str, Any]) -> None:
    """Begin the run in ``folder``, or continue it from its newest checkpoint."""
    checkpoint = Checkpoints(folder / "checkpoints", settings.checkpoint.keep).newest()
    if checkpoint is None:
        _set_aside(folder)
    (folder / ERROR).unlink(missing_ok=True)
    known = plan["holds_fp32"] and settings.baseline == "auto"
    settings = replace(
        settings,
        run_dir=str(folder),
        resume="none" if checkpoint is None else str(checkpoint),
        baseline="none" if known else settings.baseline,
        logger=replace(settings.logger, group=settings.logger.group or folder.parent.name),
    )
    _write(folder / "config.json", to_plain(settings))  # written even if the run cannot begin
    with (folder / "console.log").open("a") as log:
        try:
            run = build.build(settings, Console(file=log, width=120))
            if run is None:
                return
            run.train()
        except Exception as error:
            _fail(folder, error)
            return
    stopped = run.trainer.interrupts.stopped_by
    del run
    gc.collect()  # free this job's tensors before the next one of this process
    if stopped is not None:
        raise SystemExit(128 + stopped)


def _set_aside(folder: Path) -> None:
    """Move the files of an attempt without a checkpoint out of the way of the next one."""
    left = [path for path in folder.iterdir() if path.name != JOB and not path.name.startswith((".", "attempt-"))]
    if not left:
        return
    number = 1 + sum(1 for _ in folder.glob("attempt-*"))
    attempt = folder / f"attempt-{number}"
    attempt.mkdir()
    for path in left:
        path.rename(attempt / path.name)


def _fail(folder: Path, error: Exception) -> None:
    """Write the error where the report finds it."""
    text = "".join(traceback.format_exception(error))
    _write(folder / ERROR, {"error": explain(error), "traceback": text})


def _write(path: Path, value: Any) -> None:
    write_whole(path, json.dumps(value, indent=2) + "\n")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Lock a job: a second process with the same settings waits and finds it finished."""
    with locked(folder / JOB_LOCK):
        yield

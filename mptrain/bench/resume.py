"""End-to-end resume check: kill real runs with SIGKILL and verify that the resumed run is bit-identical.

A whole run saves at the same steps as the one that is killed. It compares the last checkpoints, tensor by tensor
(weights, moments, loss scale, FP8 scales and histories, totals of the telemetry, residuals of compression), their
other state (ledger, trackers, the losses that detect spikes), and every number of every step in ``metrics.jsonl``
and ``events.jsonl``, except speeds and the event of the resumption itself. The order of data and random numbers
are functions of (seed, step): a wrong one shows in the losses.

If the number of processes changes in between, sums are in another order: then the training losses must agree
within :data:`TOLERANCE`, 3 times the measured effect of a change of layout in 100 steps.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mptrain.checkpoint import storage
from mptrain.checkpoint.checkpoints import Checkpoints
from mptrain.config import RunConfig, composed
from mptrain.precision.policy import PrecisionPolicy
from mptrain.tools.files import rows_in
from mptrain.tools.settings import to_plain

UNTIMED = ("speed/", "memory/")  # metrics that differ from run to run
TOLERANCE = {"fp32": 3e-6, "tf32": 1e-3}  # nats; COARSE for precisions that round to 8 bits and less
COARSE = 4e-2
LIMIT_S = 600.0
ENDLESS = 1_000_000
Say = Callable[[str], None]


@dataclass(frozen=True)
class Verdict:
    """``differences``: those between the two runs, empty for an exact resumption.

    ``worst``: largest difference of a loss (nats).
    """

    what: str
    kills: int
    differences: list[str]
    worst: float = 0.0
    seconds: float = 0.0


def verify(config: RunConfig, ranks: int, folder: Path, say: Say, *, steps: int, then: int = 0) -> Verdict:
    """Compare ``steps`` steps on ``ranks`` processes with half of them, a SIGKILL, and the rest.

    ``then``: number of processes for the rest, whose losses are compared instead of bits; 0: the same number.
    """
    began = time.monotonic()
    config = _cadence(config, steps, every=max(1, steps // 4))
    whole, parts = folder / "whole", folder / ("changed" if then else "killed")
    _finish(config, whole, ranks, say)
    _half(config, parts, ranks, steps)
    _finish(_laid_out(config, then) if then else config, parts, then or ranks, say)
    if not then:
        return Verdict(_name(config, ranks), 1, differences(whole, parts), 0.0, time.monotonic() - began)
    worst = _worst_loss(whole, parts)
    limit = TOLERANCE.get(config.precision.name, COARSE)
    above = [] if worst <= limit else [f"a loss differs by {worst:.2g} nats, where {limit:g} is the most"]
    return Verdict(f"{_name(config, ranks)}, then {then}", 1, above, worst, time.monotonic() - began)


def verify_kills(
    config: RunConfig, ranks: int, folder: Path, say: Say, *, steps: int, kills: int, seed: int = 0
) -> Verdict:
    """Compare a run that is killed ``kills`` times under torchrun with one that is not.

    The SIGKILLs come at random moments, a third of them while a checkpoint is written; torchrun restarts the processes.
    The run must finish on its own and equal the run without kills.
    """
    began = time.monotonic()
    config = _cadence(config, steps, every=2)
    whole, parts = folder / "whole", folder / "killed"
    _finish(config, whole, ranks, say)
    chance = random.Random(seed)
    running = _start(config, parts, ranks, restarts=ENDLESS)
    done = 0
    while done < kills and running.poll() is None:
        if not _hit(running, parts, chance):
            continue
        done += 1
        if done % 10 == 0 or done == kills:
            say(f"{done} kills; saved up to step {_saved(parts)}, after {time.monotonic() - began:.0f} s")
    if done < kills:
        raise ValueError(f"the run ended after {done} kills: set --steps higher")
    code = running.wait(timeout=LIMIT_S)
    failed = [f"torchrun ended with status {code}"] if code else []
    return Verdict(_name(config, ranks), done, failed + differences(whole, parts), 0.0, time.monotonic() - began)


def _hit(running: subprocess.Popen[Any], folder: Path, chance: random.Random) -> bool:
    """Kill one worker during start-up, training or a save; return False if no worker was running."""
    moment = chance.choice(("starting", "training", "saving"))
    if moment == "starting":
        _wait(running, chance.uniform(0.0, 8.0), lambda: False)
    elif moment == "training":
        before = _saved(folder)
        _wait(running, 60.0, lambda: _saved(folder) > before)
        _wait(running, chance.uniform(0.0, 1.0), lambda: False)
    else:
        _wait(running, 60.0, lambda: any((folder / "checkpoints").glob("partial-*")))
        _wait(running, chance.uniform(0.0, 0.03), lambda: False)
    workers = _children(running.pid)
    if not workers:
        return False
    os.kill(chance.choice(workers), signal.SIGKILL)
    _wait(running, 60.0, lambda: not set(workers) & set(_children(running.pid)))  # torchrun terminates the others
    return True


def _wait(running: subprocess.Popen[Any], most_s: float, happened: Callable[[], bool]) -> None:
    until = time.monotonic() + most_s
    while time.monotonic() < until and running.poll() is None and not happened():
        time.sleep(0.002)


def differences(whole: Path, parts: Path) -> list[str]:
    """Describe what differs between two finished runs, bit for bit."""
    first, second = _last(whole), _last(parts)
    if first.name != second.name:
        return [f"one ended at {first.name}, the other at {second.name}"]
    different = []
    heads = [storage.read_head(path) for path in (first, second)]
    for key in ("tree", "ranks"):
        if heads[0][key] != heads[1][key]:
            different.append(f"{key} of the checkpoint: {_first_difference(heads[0][key], heads[1][key])}")
    tensors = [{name: tensor for name, _, tensor in storage.whole_tensors(path)} for path in (first, second)]
    different += [f"{name} is in one checkpoint only" for name in tensors[0].keys() ^ tensors[1].keys()]
    for name in tensors[0].keys() & tensors[1].keys():
        if not _same_bits(tensors[0][name], tensors[1][name]):
            different.append(f"{name} differs")
    for file in ("metrics.jsonl", "events.jsonl"):
        one, other = (_untimed(path / file) for path in (whole, parts))
        if one != other:
            different.append(f"{file}: {_first_difference(one, other)}")
    return different


def _untimed(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a run's file without what depends on the clock, and without the news that it was resumed."""
    rows = (row for row in rows_in(path) if row.get("event") != "resumed")
    return [{key: v for key, v in row.items() if not key.startswith(UNTIMED)} for row in rows]


def _first_difference(one: Any, other: Any, where: str = "") -> str:
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        key = next(key for key in one if one[key] != other[key])
        return _first_difference(one[key], other[key], f"{where}/{key}")
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        index = next(index for index, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1])
        return _first_difference(one[index], other[index], f"{where}[{index}]")
    sizes = f" ({len(one)} and {len(other)})" if isinstance(one, list) and isinstance(other, list) else ""
    return f"{where} {str(one)[:80]} and {str(other)[:80]}{sizes}"


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    flat = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return torch.equal(*flat)


def _worst_loss(whole: Path, parts: Path) -> float:
    """Return the largest difference of a training loss, in nats; inf if a step is missing in one."""
    losses = [
        {row["step"]: row["train/loss_step"] for row in rows_in(path / "metrics.jsonl") if "train/loss_step" in row}
        for path in (whole, parts)
    ]
    if losses[0].keys() != losses[1].keys():
        return math.inf
    return max(abs(float(loss) - float(losses[1][step])) for step, loss in losses[0].items())


def _cadence(config: RunConfig, steps: int, every: int) -> RunConfig:
    trainer = replace(config.trainer, max_steps=steps)
    quiet = replace(config.logger, wandb=False)
    checkpoint = replace(config.checkpoint, every=every)
    return replace(config, trainer=trainer, logger=quiet, checkpoint=checkpoint, baseline="none", resume="auto")


def _name(config: RunConfig, ranks: int) -> str:
    return f"{config.precision.name}, {ranks} process{'es' if ranks > 1 else ''}"


def _start(config: RunConfig, folder: Path, ranks: int, restarts: int = 0) -> subprocess.Popen[Any]:
    folder.mkdir(parents=True, exist_ok=True)
    config = replace(config, run_dir=str(folder), runs_dir=str(folder.parent / "runs"))
    settings_file = folder.parent / f"{folder.name}.json"
    settings_file.write_text(json.dumps(to_plain(config)))
    program = ["-m", "mptrain.cli.subprocesses", "run", str(settings_file)]
    if ranks > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        program = [*launcher, f"--max-restarts={restarts}", "--monitor-interval=0.1", *program]
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    environment = {**os.environ, "OMP_NUM_THREADS": threads}  # the same for one process and several: sums depend on it
    with (folder.parent / f"{folder.name}.log").open("ab") as log:
        return subprocess.Popen([sys.executable, *program], stdout=log, stderr=log, env=environment)


def _finish(config: RunConfig, folder: Path, ranks: int, say: Say) -> None:
    say(f"{_name(config, ranks)}: {folder.name}")
    code = _start(config, folder, ranks).wait(timeout=LIMIT_S)
    if code:
        log = folder.parent / f"{folder.name}.log"
        errors = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("error:")]
        raise ValueError(f"a run ended with status {code}: {errors[-1] if errors else f'see {log}'}")


def _saved(folder: Path) -> int:
    paths = list((folder / "checkpoints").glob("step-*"))
    return max((int(path.name.removeprefix("step-")) for path in paths), default=0)


def _half(config: RunConfig, folder: Path, ranks: int, steps: int) -> None:
    """Start a run and kill it, launcher and all, when half of its steps are saved."""
    running = _start(config, folder, ranks)
    _wait(running, LIMIT_S, lambda: _saved(folder) >= steps // 2)
    _kill(running)
    if _saved(folder) >= steps:
        raise ValueError("the run was over before it could be killed: set --steps higher")


def _kill(running: subprocess.Popen[Any]) -> None:
    """Kill the launcher and all its workers, at once."""
    for pid in [*_children(running.pid), running.pid]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    running.wait()


def _children(pid: int) -> list[int]:
    pids = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            words = stat.read_text().rpartition(")")[2].split()
        except OSError:  # the process has just ended
            continue
        if int(words[1]) == pid and words[0] != "Z":
            pids.append(int(stat.parent.name))
    return pids


def _last(folder: Path) -> Path:
    path = Checkpoints(folder / "checkpoints", 1).newest()
    if path is None:
        raise ValueError(f"no checkpoint in {folder}")
    return path


def main(
    overrides: list[str],
    folder: Path,
    say: Say,
    *,
    ranks: Sequence[int],
    precisions: Sequence[str],
    steps: int,
    kills: int,
) -> list[Verdict]:
    """Verify every precision at every number of processes, then the change of that number; or the kills."""
    config = composed(overrides)
    cases = [(number, 0) for number in ranks]
    if not kills and len(ranks) > 1:
        cases.append((ranks[-1], ranks[0]))
    verdicts = []
    for policy in map(PrecisionPolicy.named, precisions):
        for number, then in cases:
            case_folder = folder / "-".join(map(str, (policy.name, number, *([then] if then else []))))
            shutil.rmtree(case_folder, ignore_errors=True)
            laid_out = _laid_out(replace(config, precision=policy), number)
            if kills:
                verdicts.append(verify_kills(laid_out, number, case_folder, say, steps=steps, kills=kills))
            else:
                verdicts.append(verify(laid_out, number, case_folder, say, steps=steps, then=then))
    return verdicts


def _laid_out(config: RunConfig, ranks: int) -> RunConfig:
    """Set ``dist`` for ``ranks`` processes: single for one; for several what was set, or ddp instead of single."""
    kind = "single" if ranks == 1 else config.dist.kind
    if ranks > 1 and kind == "single" and config.dist.tp == 1:
        kind = "ddp"
    return replace(config, dist=replace(config.dist, kind=kind))

"""The checkpoints' part of ``mptrain bench dist``: how long training stalls when it saves."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from mptrain.bench.ranked import WRAPPERS, Row, Sizes, settings, timed, trainer_of
from mptrain.bench.rows import TWIN, paired_median
from mptrain.build.preflight import prepare
from mptrain.checkpoint.checkpoints import Checkpoints
from mptrain.telemetry.monitor import TelemetryConfig
from mptrain.training.trainer import Trainer

STALL = 0.10  # upper bound of a background save's stall over a synchronous one's
REPEATS = 4  # upper limit: each takes 15 s with 124 M parameters
MOST_STEPS = 100  # while a checkpoint is written; a failed one never appears


def measure_checkpoints(sizes: Sizes, device: str, folder: Path) -> Iterator[Row]:
    """Measure the stall of training when it saves, by wrapper."""
    small = replace(sizes, batch=1, micro_batches=1)
    for wrapper in reversed(WRAPPERS):
        prepared = prepare(settings(wrapper, small, device, sizes.saved, TelemetryConfig(record_every=0)))
        saving = Saving(trainer_of(prepared), folder / wrapper)
        first = saving.background()
        for _ in range(min(REPEATS, sizes.repeats)):
            saving.repeat()
        millions = sum(p.numel() for p in prepared.shell.parameters()) / 1e6
        yield from saving.rows(f"checkpoint of {millions:.3g} M, {wrapper}", first)
        del saving
        if prepared.ranks.first:
            shutil.rmtree(folder / wrapper)
        prepared.ranks.barrier()


class Saving:
    """A trainer that saves synchronously and in the background in turns, one step further each time."""

    def __init__(self, trainer: Trainer, folder: Path) -> None:
        self.trainer = trainer
        self.kinds = {
            background: Checkpoints(folder / str(background), 1, trainer.ranks, background=background)
            for background in (False, True)
        }
        self.samples: dict[str, list[float]] = {}
        for _ in range(3):
            trainer.step()

    def save(self, background: bool) -> float:
        """Save and return the seconds that training waits."""
        return timed(lambda: self.trainer.save(self.kinds[background]))[0]

    def repeat(self) -> None:
        """Measure everything once."""
        for twin in ("", TWIN):
            self.add("step" + twin, timed(self.trainer.step)[0])
            self.add("synchronous" + twin, self.save(background=False))
        timed(self.trainer.step)
        self.add("stall", self.background())

    def background(self) -> float:
        """Return the stall of a background save; keep stepping until it is on disk."""
        stall, path = self.save(background=True), self.kinds[True].path(self.trainer.step_number)
        steps: list[float] = []
        while len(steps) < MOST_STEPS and self.trainer.ranks.share(not path.exists()):
            steps.append(timed(self.trainer.step)[0])
        if steps:  # the last one may overlap the end of the write
            self.add("step while writing", statistics.median(steps))
        self.kinds[True].wait()
        return stall

    def add(self, name: str, seconds: float) -> None:
        self.samples.setdefault(name, []).append(seconds)

    def rows(self, title: str, first: float) -> Iterator[Row]:
        samples = self.samples
        noise, step_noise = (paired_median(samples[name + TWIN], samples[name]) for name in ("synchronous", "step"))
        synchronous, step = (statistics.median(samples[name]) for name in ("synchronous", "step"))
        stall = paired_median(samples["stall"], samples["synchronous"])
        yield Row(f"{title}: stall of a background save / synchronous save", STALL, measured=stall, noise=noise)
        yield Row(f"{title}: the first one's, which allocates the copies", measured=first / synchronous)
        yield Row(f"{title}: synchronous save", unit="s", measured=synchronous)
        row = Row(f"{title}: step while it is written / step", noise=step_noise)
        if "step while writing" in samples:
            yield replace(row, measured=statistics.median(samples["step while writing"]) / step)
        else:
            yield replace(row, reason="it was written before a step could begin")

"""Sinks: where metrics, events and the summary go. Console and JSONL always, W&B (:mod:`mptrain.wandb_logger`) when
configured. Metrics are one flat dict with ``/`` names and units.
"""

from __future__ import annotations

import json
import math
import os
import socket
import time
from collections import Counter
from pathlib import Path
from typing import Any, Protocol, TextIO

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mptrain.telemetry import record as records
from mptrain.telemetry.record import Record
from mptrain.tools.files import json_text, write_whole

Metrics = dict[str, float]
Event = dict[str, Any]


SHORT_UNITS = {"tokens": "tok", "images": "img"}
SCALE_EVENTS = {"scale_grew": "loss scale grew to {scale:g}", "scale_backed_off": "loss scale fell to {scale:g}"}


class Sink(Protocol):
    """Receives what a run has to tell. ``tick`` comes every step and carries nothing."""

    def tick(self, step: int) -> None: ...
    def metrics(self, step: int, values: Metrics) -> None: ...
    def event(self, event: Event) -> None: ...
    def record(self, record: Record) -> None: ...
    def summary(self, values: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


class NullSink:
    """Receives and forgets."""

    def tick(self, step: int) -> None:
        pass

    def metrics(self, step: int, values: Metrics) -> None:
        pass

    def event(self, event: Event) -> None:
        pass

    def record(self, record: Record) -> None:
        pass

    def summary(self, values: dict[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass


class Sinks(NullSink):
    """Several sinks as one."""

    def __init__(self, sinks: list[Sink]) -> None:
        self.sinks = sinks

    def tick(self, step: int) -> None:
        for sink in self.sinks:
            sink.tick(step)

    def metrics(self, step: int, values: Metrics) -> None:
        for sink in self.sinks:
            sink.metrics(step, values)

    def event(self, event: Event) -> None:
        for sink in self.sinks:
            sink.event(event)

    def record(self, record: Record) -> None:
        for sink in self.sinks:
            sink.record(record)

    def summary(self, values: dict[str, Any]) -> None:
        for sink in self.sinks:
            sink.summary(values)

    def close(self) -> None:
        for sink in self.sinks:
            sink.close()


class JsonLines(NullSink):
    """``metrics.jsonl``, ``events.jsonl`` and ``histograms.bin``, appended to, so that a resumed run goes on in them;
    ``summary.json``.

    ``since``: the step the run goes on from. What was told of later ones, which will be done again, is moved to
    ``undone.jsonl``: each step is in the metrics once.
    """

    def __init__(self, folder: Path, since: int = 0) -> None:
        self._folder = folder
        for name in ("metrics.jsonl", "events.jsonl"):
            _undo(folder / name, since)
        self._metrics: TextIO = (folder / "metrics.jsonl").open("a", buffering=1)
        self._events: TextIO = (folder / "events.jsonl").open("a", buffering=1)

    def metrics(self, step: int, values: Metrics) -> None:
        self._metrics.write(json_text({"step": step, **values}) + "\n")

    def event(self, event: Event) -> None:
        self._events.write(json_text(event) + "\n")

    def record(self, record: Record) -> None:
        records.append(self._folder / records.FILE, record)

    def summary(self, values: dict[str, Any]) -> None:
        write_whole(self._folder / "summary.json", json_text(values, indent=2) + "\n")

    def close(self) -> None:
        self._metrics.close()
        self._events.close()


def _undo(path: Path, since: int) -> None:
    """Move the rows of steps after ``since``, and a torn last line, out of the way."""
    if not path.exists():
        return
    lines = path.read_text(errors="replace").splitlines(keepends=True)
    kept: list[str] = []
    undone: list[str] = []
    for line in lines:
        try:
            early = line.endswith("\n") and int(json.loads(line)["step"]) <= since
        except (ValueError, KeyError, TypeError):
            early = False
        (kept if early else undone).append(line)
    if undone:
        with path.with_name("undone.jsonl").open("a") as file:
            file.writelines(f"{line.rstrip()}\n" for line in undone)
        write_whole(path, "".join(kept))


class RankLog(NullSink):
    """``ranks/rank1.jsonl``: what one rank knows of itself, a line each time metrics are written."""

    def __init__(self, folder: Path, rank: int, device: torch.device) -> None:
        (folder / "ranks").mkdir(parents=True, exist_ok=True)
        self._file: TextIO = (folder / "ranks" / f"rank{rank}.jsonl").open("a", buffering=1)
        self._device, self._began, self._last = device, time.monotonic(), 0
        self._tell("began", 0, host=socket.gethostname(), pid=os.getpid(), device=str(device))

    def _tell(self, what: str, step: int, **more: Any) -> None:
        row = {"event": what, "step": step, "seconds": round(time.monotonic() - self._began, 3), **more}
        self._file.write(json_text(row) + "\n")

    def metrics(self, step: int, values: Metrics) -> None:
        if step > self._last and "train/loss" in values:
            held = torch.cuda.max_memory_allocated(self._device) / 2**30 if self._device.type == "cuda" else math.nan
            self._tell("reached", step, peak_memory_gib=held)
            self._last = step

    def event(self, event: Event) -> None:
        self._file.write(json_text(event) + "\n")

    def close(self) -> None:
        self._tell("ended", self._last)
        self._file.close()


class ConsoleSink(NullSink):
    """A live progress line in a terminal, plain lines elsewhere; events in a line each. ``unit``: of throughput.

    An event that comes again (same kind, layer and role) is told at its 2nd, 4th, 8th ... time with its number.
    """

    def __init__(self, console: Console, max_steps: int, start: int, unit: str = "tokens") -> None:
        self._console = console
        self._unit = unit
        self._max_steps = max_steps
        self._told: Counter[tuple[str, str, str]] = Counter()
        self._progress: Progress | None = None
        if console.is_terminal:
            columns = (
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(20),
                TextColumn("{task.fields[line]}"),
                TextColumn("ETA"),
                TimeRemainingColumn(),
            )
            self._progress = Progress(*columns, console=console)
            self._task = self._progress.add_task("train", total=max_steps, completed=start, line="")
            self._progress.start()

    def tick(self, step: int) -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def metrics(self, step: int, values: Metrics) -> None:
        line = progress_line(values, self._unit)
        if not line:
            return
        if self._progress is not None:
            self._progress.update(self._task, line=line)
        if self._progress is None or "val/loss" in values:
            self._console.print(f"step {step}/{self._max_steps}  {line}", highlight=False)

    def event(self, event: Event) -> None:
        key = (event["event"], str(event.get("layer", "")), str(event.get("role", "")))
        self._told[key] += 1
        times = self._told[key]
        if times & (times - 1):  # not a power of two
            return
        where = f" in {event['layer']}" if event.get("layer") else ""
        what = f"{event['event']}: {event['reason']}" if "reason" in event else SCALE_EVENTS[event["event"]]
        again = f" ({times} times so far)" if times > 1 else ""
        text = what.format(scale=event.get("scale", 0.0))
        self._console.print(f"step {event['step']}: {text}{where}{again}", highlight=False)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()


def progress_line(values: Metrics, unit: str = "tokens") -> str:
    """The parts of a metric dict that a person watching wants, in order."""
    wanted = (
        ("train/loss", "loss {:.4f}"),
        ("val/loss", "val {:.4f}"),
        ("val/top1_frac", "top-1 {:.1%}"),
        ("speed/tokens_per_s", f"{{:,.0f}} {SHORT_UNITS[unit]}/s"),
        ("speed/mfu_frac", "MFU {:.1%}"),
        ("scale/value", "scale {:g}"),
        ("scale/skipped_total", "skipped {:.0f}"),
    )
    if "train/loss" not in values and "val/loss" not in values:
        return ""
    return "  ".join(text.format(values[name]) for name, text in wanted if name in values)

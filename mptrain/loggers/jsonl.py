"""Metrics and events as lines of JSON, in the run folder."""

from __future__ import annotations

import json
import math
import os
import socket
import time
from pathlib import Path
from typing import Any, TextIO

import torch

from mptrain.loggers.base import Event, Metrics, NullSink
from mptrain.telemetry import record as records
from mptrain.telemetry.record import Record
from mptrain.tools.files import json_text, write_whole


class JsonLines(NullSink):
    """``metrics.jsonl``, ``events.jsonl`` and ``histograms.bin``, appended to, so that a resumed run continues them;
    ``summary.json``.

    ``since``: the step that the run is resumed from. What was told of later ones, which will be done again, is moved to
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

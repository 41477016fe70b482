"""A log of each rank of several, in the run folder."""

from __future__ import annotations

import math
import os
import socket
import time
from pathlib import Path
from typing import Any, TextIO

import torch

from mptrain.loggers._base import Event, Metrics, NullSink, Start
from mptrain.tools.files import json_text


def open_sink(start: Start) -> RankLog | None:
    """Open this rank's log, where there are several ranks."""
    return RankLog(start.folder, start.rank, start.device) if start.ranks > 1 else None


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

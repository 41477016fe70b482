"""Metrics and events as lines of JSON, in the run folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TextIO

from mptrain.loggers._base import Event, Metrics, NullSink, Start
from mptrain.telemetry import record as records
from mptrain.telemetry.record import Record
from mptrain.tools.files import json_text, write_whole


def open_sink(start: Start) -> JsonLines | None:
    """Open the files of the run's folder, on the first rank."""
    return JsonLines(start.folder, start.since) if start.first else None


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

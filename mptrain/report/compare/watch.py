"""The live table of a sweep: a row for each run, read from the runs' folders."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from mptrain.report.compare.compare import NothingToCompare
from mptrain.report.tables import table_of
from mptrain.runs.read import Run, Status, expand, glance, in_use, is_run
from mptrain.tools.files import object_in

EVERY_S = 1.0
FOLLOW_S = 5.0  # a comparison reads every row of every run
DONE = (Status.finished, Status.failed)
MARKS = {  # a sign and a word in addition to the colour
    Status.finished: ("✓", "green"),
    Status.running: ("▶", "bold"),
    Status.stopped: ("■", "yellow"),
    Status.failed: ("✗", "red"),
    Status.unreadable: ("?", "red"),
}


class Watch:
    """A table that is redrawn every second in a terminal; elsewhere a line for each run that ends.

    A separate thread reads the folders; a finished run is not read again, a failed one is: it may be retried.
    """

    def __init__(self, folder: Path, console: Console) -> None:
        self.folder, self.console = folder, console
        self._finished: dict[Path, Run] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def runs(self) -> list[Run]:
        """Return all runs so far, in the order in which they were begun."""
        runs = []
        for folder in _folders(self.folder):
            run = self._finished.get(folder) or glance(folder)
            if run.status is Status.finished:
                self._finished[folder] = run
            runs.append(run)
        return runs

    def table(self) -> Table:
        return table(self.runs(), jobs(self.folder), self.folder)

    def _follow(self) -> None:
        if self.console.is_terminal:
            with Live(self.table(), console=self.console, auto_refresh=False) as live:
                while not self._stop.wait(EVERY_S):
                    live.update(self.table(), refresh=True)
                live.update(self.table(), refresh=True)
            return
        self.console.print(f"sweep in {self.folder}", highlight=False, soft_wrap=True)
        printed = {end for run in self.runs() if (end := _end(run))}
        if printed:
            self.console.print(f"{len(printed)} runs already finished", highlight=False)
        while True:
            last = self._stop.wait(EVERY_S)
            for run in self.runs():
                end = _end(run)
                if end and end not in printed:
                    printed.add(end)
                    self.console.print(line(run), highlight=False, soft_wrap=True)
            if last:
                return


def follow(paths: Sequence[Path], console: Console, once: Callable[[Console], None]) -> None:
    """Print the table of runs with the comparison (``once``) below, repeatedly until no run is in progress.

    In a terminal the screen is redrawn; elsewhere the comparison is printed when a run ends, and at the end.
    """
    shown: list[Status] = []
    while True:
        runs = [glance(folder) for folder in expand(paths)]
        busy = any(run.status is Status.running for run in runs) or any(in_use(path) for path in paths)
        states = [run.status for run in runs]
        if console.is_terminal or states != shown or not busy:
            if console.is_terminal:
                console.clear()
            console.print(table(runs, None, paths[0] if len(paths) == 1 else Path(f"{len(runs)} runs")))
            try:
                once(console)
            except NothingToCompare as error:
                console.print(str(error), highlight=False, soft_wrap=True)
        if not busy:
            return
        shown = states
        try:
            time.sleep(FOLLOW_S)
        except KeyboardInterrupt:
            return


def _end(run: Run) -> tuple[Path, int] | None:
    """Identify this end of a run, to distinguish it from that of an earlier attempt: its file and when it was
    written (ns)."""
    if run.status not in DONE:
        return None
    path = run.folder / ("summary.json" if run.status is Status.finished else "error.json")
    try:
        return path, path.stat().st_mtime_ns
    except OSError:  # moved since: the run has begun again
        return None


def _folders(sweep: Path) -> list[Path]:
    folders = [path for path in sweep.iterdir() if is_run(path)]
    return sorted(
        folders, key=lambda path: (path / "job.json").stat().st_mtime if (path / "job.json").exists() else 0.0
    )


def jobs(sweep: Path) -> int | None:
    """Return the number of the sweep's jobs, where it is known beforehand."""
    count = object_in(sweep / "sweep.json").get("jobs")
    return count if isinstance(count, int) else None


def _jobs_of(run: Run) -> int:
    """Count the jobs of a sweep that this run stands for: they would compute the same."""
    return len(object_in(run.folder / "job.json").get("names", [run.name]))


def table(runs: list[Run], whole: int | None, folder: Path) -> Table:
    """Return the state of each run as a table; ``whole``: the number of jobs of the sweep."""
    over = sum(_jobs_of(run) for run in runs if run.status in DONE)
    title = f"{folder}: {over}{f' of {whole}' if whole else ''} done"
    shown = table_of(["run", ""], ("step", "loss", "val loss", "per s", "skipped"), title=title, folded=True)
    for run in runs:
        mark, style = MARKS[run.status]
        status = Text(f"{mark} {run.status.value}", style)
        if run.status is Status.failed:
            shown.add_row(Text.assemble(run.name, "\n", (run.why, "red")), status)
            continue
        shown.add_row(run.name, status, f"{run.steps}/{run.max_steps or '?'}", *cells(run))
    left = (whole or 0) - sum(map(_jobs_of, runs))
    if left > 0:
        shown.add_row(Text(f"{left} jobs queued", "dim"))
    return shown


def cells(run: Run) -> list[str]:
    """Return the loss, validation loss, tokens per second and skipped steps as text."""
    loss = run.losses.get(run.steps, math.nan)
    forms = ((loss, ".4f"), (run.figure("val_loss"), ".4f"), (run.figure("tokens_per_s"), ",.0f"))
    shown = ["-" if math.isnan(value) else format(value, form) for value, form in forms]
    skipped = run.figure("skipped_steps")
    return [*shown, "-" if math.isnan(skipped) else f"{skipped:.0f}"]


def line(run: Run) -> str:
    """Return the same in one line."""
    if run.status is Status.failed:
        return f"{run.name}: failed: {run.why}"
    loss, val, speed, skipped = cells(run)
    return f"{run.name}: {run.status.value}, loss {loss}, val {val}, {speed} tokens/s, {skipped} skipped"

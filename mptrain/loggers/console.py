"""The terminal: a line every few steps, events as they come."""

from __future__ import annotations

from collections import Counter

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mptrain.loggers._base import Event, Metrics, NullSink, Start

SHORT_UNITS = {"tokens": "tok", "images": "img"}
SCALE_EVENTS = {"scale_grew": "loss scale grew to {scale:g}", "scale_backed_off": "loss scale fell to {scale:g}"}


def open_sink(start: Start) -> ConsoleSink | None:
    """Open the terminal, on the first rank."""
    steps = int(start.config["trainer"]["max_steps"])
    return ConsoleSink(start.console, steps, start.since, start.unit) if start.first else None


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

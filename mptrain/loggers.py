"""Sinks: where metrics, events and the summary go. Console and JSONL always; W&B when configured.

Metrics are one flat dict with ``/`` names and units. A sink that fails must not fail the run: W&B's errors turn into
one warning and the JSONL file, which is always written, goes on.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from pathlib import Path
from typing import Any, Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mptrain.report.drawing import heat_map_svg
from mptrain.telemetry import record as records
from mptrain.telemetry.histogram import Histograms
from mptrain.telemetry.record import Record

Metrics = dict[str, float]
Event = dict[str, Any]


PICTURED = ("input", "weight", "output", "grad_output")  # roles with a histogram a layer: 4 panels are enough
PICTURED_OCTAVES = (-64, 32)  # log2 of the magnitudes in it
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
    ``summary.json``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._metrics: TextIO = (folder / "metrics.jsonl").open("a", buffering=1)
        self._events: TextIO = (folder / "events.jsonl").open("a", buffering=1)

    def metrics(self, step: int, values: Metrics) -> None:
        self._metrics.write(_json({"step": step, **values}) + "\n")

    def event(self, event: Event) -> None:
        self._events.write(_json(event) + "\n")

    def record(self, record: Record) -> None:
        records.append(self._folder / records.FILE, record)

    def summary(self, values: dict[str, Any]) -> None:
        partial = self._folder / "summary.json.partial"
        partial.write_text(_json(values, indent=2) + "\n")
        os.replace(partial, self._folder / "summary.json")

    def close(self) -> None:
        self._metrics.close()
        self._events.close()


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


class WandbSink(NullSink):
    """Weights & Biases: online when logged in, offline when not; never a prompt, never a failed run.

    Beside the metrics: ``magnitude/LAYER/ROLE`` (a histogram by exponent, which W&B draws as a heat map over time),
    ``heatmap/ROLE`` (layer by exponent at one step), the table ``events``, and an alert for every alarm.
    """

    TIMEOUT_S = 20
    ALERT_EVERY_S = 300

    def __init__(self, folder: Path, project: str, config: dict[str, Any], console: Console) -> None:
        self._console = console
        self._run: Any = None
        self._events: list[Event] = []
        try:
            self._run = self._start(folder, project, config)
        except Exception as error:
            self._give_up(error)

    def _start(self, folder: Path, project: str, config: dict[str, Any]) -> Any:
        import wandb

        asked = os.environ.get("WANDB_MODE")
        mode = asked or ("online" if wandb_key_present() else "offline")
        settings = wandb.Settings(silent=True, init_timeout=self.TIMEOUT_S, console="off", x_disable_stats=True)
        keywords = {"project": project, "dir": str(folder), "name": folder.name, "config": config, "settings": settings}
        try:
            run = wandb.init(mode=mode, **keywords)  # type: ignore[arg-type]
        except Exception as error:
            if mode != "online":
                raise
            self._console.print(f"W&B is not reachable ({type(error).__name__}): logging offline", highlight=False)
            run = wandb.init(mode="offline", **keywords)
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        return run

    def _give_up(self, error: Exception) -> None:
        self._run = None
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        self._console.print(f"W&B is off for this run: {reason} (logger=jsonl silences this)", highlight=False)

    def metrics(self, step: int, values: Metrics) -> None:
        self._send(lambda run: run.log({"step": step, **values}))

    def event(self, event: Event) -> None:
        self._events.append(event)
        fields = {f"event/{event['event']}": 1, "event/reason": str(event.get("reason", ""))}
        self._send(lambda run: run.log({"step": event["step"], **fields}))
        if event["event"] == "alarm":
            text = f"step {event['step']}: {event['reason']}" + (f" in {event['layer']}" if event.get("layer") else "")
            self._send(lambda run: run.alert("numerics", text, level="WARN", wait_duration=self.ALERT_EVERY_S))

    def record(self, record: Record) -> None:
        self._send(lambda run: run.log({"step": record.step, **self._pictures(record)}))

    def _pictures(self, record: Record) -> dict[str, Any]:
        import wandb

        tables = Histograms(record.tables["histogram"], record.tables["amax"].double())
        octaves = tables.octaves()
        rows: dict[str, list[int]] = {}
        pictures: dict[str, Any] = {}
        for index, (layer, role, _) in enumerate(record.rows):
            if int(octaves[index].sum()) == 0:
                continue
            rows.setdefault(role, []).append(index)
            if role in PICTURED:
                counts = octaves[index, PICTURED_OCTAVES[0] + 127 : PICTURED_OCTAVES[1] + 127].tolist()
                edges = list(range(PICTURED_OCTAVES[0], PICTURED_OCTAVES[1] + 1))
                pictures[f"magnitude/{layer}/{role}"] = wandb.Histogram(np_histogram=(counts, edges))
        for role, found in rows.items():
            labels = [record.rows[index][0] for index in found]
            drawn = heat_map_svg(labels, Histograms(tables.counts[found], tables.amax[found]))
            pictures[f"heatmap/{role}"] = wandb.Html(drawn, inject=False, data_is_not_path=True)
        return pictures

    def _event_table(self) -> Any:
        import wandb

        columns = ["step", "event", "layer", "role", "reason", "kind", "phase", "micro_batch", "rank", "scale"]
        return wandb.Table(columns=columns, data=[[event.get(name) for name in columns] for event in self._events])

    def summary(self, values: dict[str, Any]) -> None:
        self._send(lambda run: run.summary.update(flatten(values)))

    def close(self) -> None:
        if self._events:
            self._send(lambda run: run.log({"events": self._event_table()}))
        self._send(lambda run: run.finish())

    def _send(self, act: Any) -> None:
        if self._run is None:
            return
        try:
            act(self._run)
        except Exception as error:
            self._give_up(error)


def wandb_key_present() -> bool:
    """Is there a W&B key, in the environment or in netrc? Without one wandb would prompt."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    netrc = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    try:
        return "wandb" in netrc.read_text()
    except OSError:
        return False


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one flat dict with ``/`` names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}/")
        else:
            flat[prefix + key] = value
    return flat


def _json(values: dict[str, Any], indent: int | None = None) -> str:
    """JSON proper: NaN and Inf, which it has no words for, become null and strings."""
    return json.dumps(_plain(values), indent=indent)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value

"""Weights & Biases, the only module that imports it. What fails there must not fail the run: the first error turns into
one line, and the JSONL files, which are always written, go on.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rich.console import Console

from mptrain.loggers._base import Event, Metrics, NullSink, Start
from mptrain.report.compare.comparison import Comparison, Group, Interval, Variant
from mptrain.report.draw.magnitudes import heat_map_svg
from mptrain.telemetry.histogram import Histograms
from mptrain.telemetry.record import Record

TIMEOUT_S = 20
PICTURED = ("input", "weight", "output", "grad_output")  # roles with a histogram a layer: 4 panels are enough
PICTURED_OCTAVES = (-64, 32)  # log2 of the magnitudes in it


def open_sink(start: Start) -> WandbSink | None:
    """Open W&B, on the first rank, unless ``logger.wandb=false``."""
    settings = start.config["logger"]
    if not (start.first and settings["wandb"]):
        return None
    return WandbSink(start.folder, settings["project"], start.config, start.console, settings["group"])


class WandbSink(NullSink):
    """Weights & Biases: online when logged in, offline when not; never a prompt, never a failed run.

    Beside the metrics: ``magnitude/LAYER/ROLE`` (a histogram by exponent, which W&B draws as a heat map over time),
    ``heatmap/ROLE`` (layer by exponent at one step), the table ``events``, and an alert for every alarm.
    """

    ALERT_EVERY_S = 300

    def __init__(self, folder: Path, project: str, config: dict[str, Any], console: Console, group: str = "") -> None:
        self._console = console
        self._run: Any = None
        self._events: list[Event] = []
        try:
            self._run = self._start(folder, project, config, group)
        except Exception as error:
            self._give_up(error)

    def _start(self, folder: Path, project: str, config: dict[str, Any], group: str) -> Any:
        run = begin(folder, self._console, project=project, name=folder.name, config=config, group=group or None)
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


def begin(folder: Path, console: Console, **about: Any) -> Any:
    """``wandb.init``: online when there is a key, offline otherwise or when it cannot be reached."""
    import wandb

    asked = os.environ.get("WANDB_MODE")
    mode = asked or ("online" if wandb_key_present() else "offline")
    settings = wandb.Settings(silent=True, init_timeout=TIMEOUT_S, console="off", x_disable_stats=True)
    try:
        return wandb.init(mode=mode, dir=str(folder), settings=settings, **about)  # type: ignore[arg-type]
    except Exception as error:
        if mode != "online":
            raise
        console.print(f"W&B is not reachable ({type(error).__name__}): logging offline", highlight=False)
        return wandb.init(mode="offline", dir=str(folder), settings=settings, **about)


def log_comparison(comparison: Comparison, folder: Path, console: Console, project: str) -> None:
    """The table ``comparison``, the report as HTML and the figures in the summary, as one run of the sweep's group."""
    rows = [(group, variant) for group in comparison.groups for variant in group.variants]
    figures = [_figures(group, variant) for group, variant in rows]
    columns = [*dict.fromkeys(name for row in figures for name in row)]
    try:
        import wandb

        run = begin(folder, console, project=project, name="report", group=folder.name, job_type="report")
        table = wandb.Table(columns=columns, data=[[row.get(name) for name in columns] for row in figures])
        run.log({"comparison": table, "report": wandb.Html((folder / "report.html").read_text(), inject=False)})
        for (group, variant), row in zip(rows, figures, strict=True):
            place = "/".join(filter(None, (group.label, variant.label)))
            run.summary.update({f"{place}/{name}": value for name, value in row.items() if value is not None})
        run.finish()
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        console.print(f"the report is not in W&B: {reason} (logger=jsonl silences this)", highlight=False)


def _figures(group: Group, variant: Variant) -> dict[str, Any]:
    """One row of the table: the figures of the report under the same names."""
    loss, speed, memory, health = variant.loss, variant.speed, variant.memory, variant.health
    return {
        "group": group.label,
        "variant": variant.label,
        "verdict": variant.verdict.text,
        "why": variant.verdict.why,
        "val_loss": loss.val,
        **_interval("val_delta", loss.val_delta),
        "train_loss": loss.train,
        "val_loss_masters": loss.masters,
        "top1_frac": loss.top1_frac,
        **_interval("top1_delta", loss.top1_delta),
        "outside_step": loss.outside_step,
        "tokens_ratio": loss.tokens_ratio,
        "emulated": variant.emulated,
        "tokens_per_s": speed.tokens_per_s,
        "speed_ratio": speed.ratio,
        "mfu_frac": speed.mfu_frac,
        "peak_memory_gib": memory.peak_gib,
        "memory_ratio": memory.ratio,
        "overflow_events": health.overflow_events,
        "underflow_frac": health.underflow_frac,
        "skipped_steps": health.skipped_steps,
    }


def _interval(name: str, interval: Interval | None) -> dict[str, float | None]:
    parts = (None, None, None) if interval is None else (interval.mean, interval.low, interval.high)
    return dict(zip((name, f"{name}_low", f"{name}_high"), parts, strict=True))


def wandb_key_present() -> bool:
    """Tell whether there is a W&B key, in the environment or in netrc. Without one wandb would prompt."""
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

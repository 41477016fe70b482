"""Sinks: where a run's metrics, events, records and summary go, one file each.

Such a file has ``open_sink(start)``, which returns the sink, or None where it is not asked for. JSON lines and the
terminal always are; W&B by ``logger.wandb``; any other file here by its name in ``logger.also``.
"""

from __future__ import annotations

from mptrain.loggers._base import Event, Metrics, NullSink, Sink, Sinks, Start
from mptrain.tools import registry

__all__ = ["Event", "Metrics", "NullSink", "Sink", "Sinks", "Start", "kinds", "open_sinks"]


def kinds() -> list[str]:
    """List the sinks by name."""
    return registry.kinds(__name__)


def open_sinks(sinks: Sinks, start: Start) -> None:
    """Open what this rank writes to and add it to ``sinks``, one by one: what is open when one fails can be closed."""
    for kind in kinds():
        sink = registry.load(__name__, kind).open_sink(start)
        if sink is not None:
            sinks.sinks.append(sink)

"""The sinks of a run: every rank's own log; on the first rank the files of the folder, W&B and the terminal."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from mptrain import loggers
from mptrain.build.preflight import Prepared
from mptrain.loggers import Sinks, Start
from mptrain.runs.resumption import Earlier, Resumed
from mptrain.runs.resumption import remember as remember_attempt
from mptrain.tools.settings import to_plain


def open_sinks(sinks: Sinks, prepared: Prepared, folder: Path, console: Console, since: int) -> None:
    """Open what this rank writes to. ``since``: the step that the run is resumed from."""
    config, ranks = to_plain(prepared.config), prepared.ranks
    unit = prepared.data.unit
    loggers.open_sinks(sinks, Start(folder, config, console, prepared.device, ranks.rank, ranks.size, since, unit))


def tell_resumed(folder: Path, earlier: Earlier, resumed: Resumed, sinks: Sinks, console: Console) -> None:
    """Tell what is different from the attempt before, in the terminal, as an event, in the folder's history."""
    remember_attempt(folder, earlier, resumed)
    for line in resumed.lines():
        console.print(line, highlight=False, soft_wrap=True)
    reason = "; ".join(f"{name}: {before} -> {now}" for name, (before, now) in resumed.brief().items())
    sinks.event({"step": resumed.step, "event": "resumed", "reason": reason, "mixed": bool(resumed.mixed)})

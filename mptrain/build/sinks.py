"""The sinks of a run: every rank's own log; on the first rank the files of the folder, W&B and the terminal."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from mptrain.build.preflight import Prepared
from mptrain.loggers.base import Sinks
from mptrain.loggers.console import ConsoleSink
from mptrain.loggers.jsonl import JsonLines, RankLog
from mptrain.loggers.wandb import WandbSink
from mptrain.runs.resumption import Earlier, Resumed
from mptrain.runs.resumption import remember as remember_attempt
from mptrain.tools.settings import to_plain


def open_sinks(sinks: Sinks, prepared: Prepared, folder: Path, console: Console, since: int) -> None:
    """Open what this rank writes to. ``since``: the step that the run is resumed from."""
    config, ranks = prepared.config, prepared.ranks
    if ranks.size > 1:
        sinks.sinks.append(RankLog(folder, ranks.rank, prepared.device))
    if ranks.first:
        sinks.sinks.append(JsonLines(folder, since))
        if config.logger.wandb:
            sinks.sinks.append(WandbSink(folder, config.logger.project, to_plain(config), console, config.logger.group))
        sinks.sinks.append(ConsoleSink(console, config.trainer.max_steps, since, prepared.data.unit))


def tell_resumed(folder: Path, earlier: Earlier, resumed: Resumed, sinks: Sinks, console: Console) -> None:
    """Tell what is different from the attempt before, in the terminal, as an event, in the folder's history."""
    remember_attempt(folder, earlier, resumed)
    for line in resumed.lines():
        console.print(line, highlight=False, soft_wrap=True)
    reason = "; ".join(f"{name}: {before} -> {now}" for name, (before, now) in resumed.brief().items())
    sinks.event({"step": resumed.step, "event": "resumed", "reason": reason, "mixed": bool(resumed.mixed)})

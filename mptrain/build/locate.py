"""Where a run starts: at its beginning, or from a checkpoint that it is meant to continue and that fits it."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from mptrain.build.preflight import Prepared
from mptrain.checkpoint.checkpoints import Checkpoints, read_about, require_fit
from mptrain.config import RunConfig
from mptrain.distributed import Ranks
from mptrain.runs.resumption import Earlier


class Finished(Exception):
    """The run that would be resumed is at its end."""


def asked_checkpoint(config: RunConfig) -> Path | None:
    """Find the checkpoint that ``resume`` names. ValueError if it is none, or nothing says which run to go on with."""
    if config.resume == "auto" and not config.run_dir:
        raise ValueError("resume=auto needs run_dir=FOLDER, the run to continue")
    if config.resume in ("none", "auto"):
        return None
    read_about(Path(config.resume))
    return Path(config.resume)


def locate(prepared: Prepared, asked: Path | None, console: Console) -> Earlier | None:
    """Find the run so far, on all ranks; ``asked``: the checkpoint that ``resume`` names. None: there is none.

    ValueError if this run is not meant to continue it, or the checkpoint does not fit. Finished if nothing is left.
    """
    config, ranks = prepared.config, prepared.ranks
    start = _newest(config, ranks, console) if config.resume == "auto" else asked
    earlier = ranks.by_first(lambda: _earlier(start, prepared))
    if earlier is None:
        return None
    over = earlier.finished(config.trainer.max_steps)
    if over and config.resume == "auto":
        raise Finished(over)
    ranks.by_first(lambda: require_fit(earlier.checkpoint, prepared.shell))
    if config.resume != "auto" and earlier.step >= config.trainer.max_steps:
        raise ValueError(
            f"{earlier.checkpoint} is of step {earlier.step}, and trainer.max_steps={config.trainer.max_steps} "
            f"leaves nothing to do: set trainer.max_steps={2 * earlier.step}"
        )
    return earlier


def _newest(config: RunConfig, ranks: Ranks, console: Console) -> Path | None:
    """Find the newest whole checkpoint of the run; those that are damaged are named."""
    checkpoints = Checkpoints(Path(config.run_dir) / "checkpoints", config.checkpoint.keep, ranks)
    path = checkpoints.newest()
    for fault in checkpoints.passed_over:
        console.print(f"passed over: {fault}", highlight=False, soft_wrap=True)
    return path


def _earlier(start: Path | None, prepared: Prepared) -> Earlier | None:
    """Read the run so far. ValueError if this one is not meant to continue it."""
    if start is None:
        return None
    config, earlier = prepared.config, Earlier.of(start, int(read_about(start)["step"]))
    earlier.require_meant(config, prepared.data.fingerprint)
    return earlier

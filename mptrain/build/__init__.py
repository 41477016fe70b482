"""The composition root: the only place that knows every concrete class. Settings in, a run ready to fit out.

One way down, in the order of cost: settings, device and backend are checked, then the data is read, the checkpoint
looked for and the folder claimed; FP32 is probed in a process of its own; only then is a model on the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TextIO

from rich.console import Console

from mptrain.build import fp32
from mptrain.build.announce import announce
from mptrain.build.assemble import assemble
from mptrain.build.locate import Finished, asked_checkpoint, locate
from mptrain.build.preflight import Prepared, prepare
from mptrain.build.run import Run, about
from mptrain.build.sinks import open_sinks, tell_resumed
from mptrain.checkpoint.checkpoints import Checkpoints
from mptrain.config import RunConfig
from mptrain.loggers import Sinks
from mptrain.memory.training.plan import TrainingPlan, plan, rank_job
from mptrain.runs.folder import describe, discard, folder_of, remember, remembered
from mptrain.runs.identity import job_mark
from mptrain.runs.resumption import Earlier
from mptrain.tools.launcher import rank, world_size
from mptrain.tools.settings import to_plain


def build(config: RunConfig, console: Console | None = None) -> Run | None:
    """Make everything a run needs; None for one that is finished, which is told and left alone.

    With several ranks all of them call it; the first one alone reads and writes the run's folder, and speaks.
    ValueError or OSError, naming the setting to change, if it cannot be made.
    """
    console = (console or Console()) if rank() == 0 else Console(quiet=True)
    config = _resumed_by_torchrun(config, console)
    asked = asked_checkpoint(config) if world_size() == 1 else None  # what is quick to refuse comes first
    prepared = _agreed(prepare(config, lambda text: console.print(text, highlight=False)))
    ranks = prepared.ranks
    asked = asked or ranks.by_first(lambda: asked_checkpoint(prepared.config))
    try:
        earlier = locate(prepared, asked, console)
    except Finished as over:
        console.print(str(over), highlight=False, soft_wrap=True)
        return None
    figures = ranks.by_first(lambda: fp32.known(prepared))
    with _claimed(prepared, resumed=earlier is not None) as (folder, held):
        planned = _planned(prepared, console)
        if ranks.first:
            announce(console, prepared, folder, figures, planned)
        if figures is None:
            figures = fp32.probed(prepared, lambda text: console.print(text))
        kept = prepared.config.checkpoint
        checkpoints = Checkpoints(folder / "checkpoints", kept.keep, ranks, background=kept.background)
        sinks = Sinks([])
        trainer = assemble(prepared, sinks, checkpoints, audited=True)
        if prepared.config.precision.quantized:
            console.print(f"{trainer.precision.report}; {trainer.precision.backend.carrier}", highlight=False)
        if earlier is not None:
            trainer.resume(earlier.checkpoint)
        if prepared.config.run_dir:
            checkpoints.set_aside(trainer.step_number)
        open_sinks(sinks, prepared, folder, console, trainer.step_number)
        run = Run(prepared, trainer, sinks, console, folder, held, figures, planned)
        if ranks.first:
            _describe(run, earlier)
        return run


def _resumed_by_torchrun(config: RunConfig, console: Console) -> RunConfig:
    """The settings of torchrun's next attempt: it starts the processes again, and they continue the run they began."""
    again = remembered(Path(config.runs_dir)) if rank() == 0 else None
    if again is None:
        return config
    console.print(f"torchrun's next attempt: resuming {again}", highlight=False, soft_wrap=True)
    return replace(config, run_dir=str(again), resume="auto")


def _agreed(prepared: Prepared) -> Prepared:
    """The same, with the first rank's settings. ValueError if a rank has others: each would train a run of its own."""
    config, ranks = prepared.config, prepared.ranks
    if len(set(ranks.gather(job_mark(to_plain(config))))) > 1:
        raise ValueError(
            f"not every rank has the same settings: run_dir={config.run_dir} must be in a folder that all of them see"
        )
    return replace(prepared, config=ranks.share(config))


@contextmanager
def _claimed(prepared: Prepared, *, resumed: bool) -> Iterator[tuple[Path, list[TextIO]]]:
    """The run's folder, with the lock on it, which the run will hold. Discarded if nothing begins in it."""
    config, held = prepared.config, list[TextIO]()

    def claim() -> Path:
        folder, lock = folder_of(config, resumed=resumed)
        held.append(lock)
        remember(Path(config.runs_dir), folder)
        return folder

    folder = prepared.ranks.by_first(claim)
    try:
        yield folder, held
    except BaseException:
        if prepared.ranks.first:
            discard(folder)
            held[0].close()
        raise


def _planned(prepared: Prepared, console: Console) -> TrainingPlan | None:
    """The memory of a step; None, with a line, for a model that cannot be traced. Nothing is sent between ranks."""
    config, gpu = prepared.config, prepared.device.type == "cuda"
    try:
        return plan(rank_job(prepared.model_module, prepared.model_config, config, prepared.layout, gpu=gpu))
    except (ValueError, RuntimeError) as error:  # a plan that fails must not cost the run
        console.print(f"memory is not planned: {str(error).splitlines()[0]}", highlight=False, soft_wrap=True)
        return None


def _describe(run: Run, earlier: Earlier | None) -> None:
    """Write ``run.json``; of a resumed run also what is different from the attempt before."""
    facts = about(run.prepared, run.trainer)
    if earlier is not None:
        resumed = earlier.resumed(run.prepared.config, facts)
        tell_resumed(run.folder, earlier, resumed, run.sinks, run.console)
    describe(run.folder, facts)

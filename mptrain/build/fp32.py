"""The FP32 figures that a run is compared with: known already, or measured over a few steps before it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from mptrain.build.assemble import assemble
from mptrain.build.preflight import Prepared, prepare
from mptrain.config import RunConfig
from mptrain.loggers import NullSink
from mptrain.precision.policy import PrecisionPolicy
from mptrain.runs import baseline
from mptrain.runs.baseline import Figures
from mptrain.telemetry.drill import DebugConfig


def known(prepared: Prepared) -> Figures | None:
    """Find the FP32 figures that are there without a measurement; None if they must be probed."""
    config, wanted = prepared.config, prepared.fingerprint
    if config.baseline not in ("auto", "none"):
        return baseline.named(Path(config.baseline), config, wanted)
    if config.baseline == "none":
        return Figures(note="baseline=none")
    if config.precision.name == "fp32":
        return Figures(note="this is an FP32 run: later runs of these settings are compared with it")
    beside = [Path(config.run_dir).parent] if config.run_dir else []
    return baseline.find([Path(config.runs_dir), *beside], wanted)


def probed(prepared: Prepared, say: Callable[[str], None]) -> Figures:
    """Measure FP32 for a few steps: one process has another do it; several do it themselves, in the same layout."""
    config, ranks = prepared.config, prepared.ranks
    wanted, runs = prepared.fingerprint, Path(config.runs_dir)
    if ranks.size == 1:
        return baseline.probe(config, wanted, runs, say)
    kept = ranks.by_first(lambda: baseline.kept(wanted, runs))
    if kept is None:
        say(f"FP32 probe: {baseline.PROBE_STEPS} steps in the same layout")
        kept = probe(config)
        gc.collect()
        if prepared.device.type == "cuda":
            torch.cuda.empty_cache()
        if ranks.first:
            baseline.keep(kept, wanted, runs)
    return kept


def probe(config: RunConfig) -> Figures:
    """Train the first steps of the run that ``config`` describes in FP32: what the probe's process does."""
    quiet = replace(config.telemetry, record_every=0)
    masters = replace(config.optim, weights="fp32", moments="fp32")
    policy = PrecisionPolicy.named("fp32")
    fp32 = replace(config, precision=policy, optim=masters, telemetry=quiet, debug=DebugConfig())
    prepared = prepare(fp32)
    trainer = assemble(prepared, NullSink())
    trainer.fit(until=baseline.PROBE_STEPS)
    return Figures("probe", trainer.losses, trainer.throughput.tokens_per_s(), trainer.memory.peak_gib)

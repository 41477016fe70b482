"""Run folders written by hand, in the layout of a real run, with losses that a test chooses."""

import dataclasses
import json
import math

import numpy as np

from mptrain.config import RunConfig
from mptrain.optim import OptimConfig
from mptrain.precision.policy import PrecisionPolicy
from mptrain.tools.settings import to_plain
from mptrain.training.config import TrainerConfig


def settings(precision="fp32", seed=0, steps=200, lr=1e-3, weights="fp32", **policy):
    made = PrecisionPolicy.named(precision)
    quantization = policy.pop("quantization", None)
    if quantization:
        made = dataclasses.replace(made, quantization=dataclasses.replace(made.quantization, **quantization))
    return RunConfig(
        precision=dataclasses.replace(made, **policy),
        model={"kind": "gpt", "n_layer": 2},
        data={"kind": "stdlib"},
        optim=OptimConfig(lr=lr, weights=weights),
        trainer=TrainerConfig(max_steps=steps),
        seed=seed,
    )


def falling(steps=200, level=2.4, noise=0.03, seed=0):
    """A loss that falls from 5.5 towards ``level``; the noise of a batch depends on the seed and the step alone."""
    t = np.arange(1, steps + 1)
    return level + (5.5 - level) * np.exp(-t / (steps / 6)) + noise * np.random.default_rng(seed).standard_normal(steps)


def write(folder, config, losses=None, *, val=None, about=None, summary=None, events=(), finished=True):
    """One run; ``losses``: [steps], ``val``: validation loss (default: the mean of the last tenth)."""
    folder.mkdir(parents=True)
    losses = falling(config.trainer.max_steps, seed=config.seed) if losses is None else np.asarray(losses)
    rows = [{"step": step, "train/loss_step": plain(loss), "train/lr": 1e-3} for step, loss in enumerate(losses, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (folder / "config.json").write_text(json.dumps(to_plain(config)))
    told = {"corpus": "c0ffee", "corpus_name": "stdlib", "initial_weights": f"w{config.seed}", "host": "h"}
    told |= {"machine": "m", "torch": "2.13.0", "tokens_per_step": 1024, "parameters": 3_200_000, "backend": "autocast"}
    told |= {"emulated": False, "flops_per_token": 1e6, "gemm_tflops": {"fp32": 0.1, "bf16": 0.4}}
    (folder / "run.json").write_text(json.dumps(told | (about or {})))
    if finished:
        last = float(np.mean(losses[-max(1, len(losses) // 10) :]))
        said = {"precision": config.precision.name, "steps": len(losses), "skipped_steps": 0}
        said |= {"train_loss": plain(losses[-1]), "val_loss": plain(last if val is None else val)}
        said |= {"tokens_per_s": 1000.0, "peak_memory_gib": 2.0, "overflow_events": 0, "underflow_frac": 1e-4}
        said |= {"gemm_coverage": {config.precision.compute.name: 1.0}}
        (folder / "summary.json").write_text(json.dumps(said | (summary or {})))
    return folder


def plain(value):
    """As the sinks write a number: null for NaN, text for infinities."""
    value = float(value)
    return None if math.isnan(value) else value if math.isfinite(value) else str(value)

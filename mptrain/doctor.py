"""One audited training step on this machine, without a run: ``mptrain doctor --audit precision=fp8 model=gpt-nano``."""

from __future__ import annotations

import torch

from mptrain.config import RunConfig, parse_open
from mptrain.precision import Precision
from mptrain.precision.backends.base import resolve
from mptrain.telemetry.audit import StepAudit
from mptrain.telemetry.coverage import Audit
from mptrain.tools import machine

ROWS = 128  # of every matrix product: enough for every FP8 GEMM
SIZES = {"vocab_size": 256, "image_size": 8, "channels": 1, "classes": 10}  # where neither model nor data names one


def audited_step(config: RunConfig) -> tuple[Audit, str]:
    """The audit of one step on random samples, and what was run in a few words. No data, no run folder, no compiler.

    ValueError names the setting that cannot work here.
    """
    device = machine.pick_device(config.device)
    resolve(config.precision, device)
    sizes = {name: int(config.data.get(name) or size) for name, size in SIZES.items()}
    module, settings = parse_open("mptrain.models", "model", config.model, **sizes)
    torch.manual_seed(config.seed)
    model = module.build(settings).to(device)
    precision = Precision(config.precision).prepare(model)
    if config.trainer.checkpointing:
        model.recompute = precision.recompute
    batch = model.example(ROWS)
    step = StepAudit(model, precision)
    with step:
        with precision.forward():
            loss = model(**batch)
        precision.backward(loss)
    assert step.result is not None
    shape = " x ".join(str(size) for size in next(iter(batch.values())).shape)
    said = f"random {module.INPUT} ({shape}), backend {precision.backend.name} ({precision.backend.carrier})"
    return step.result, f"{machine.describe(device)}: {said}"

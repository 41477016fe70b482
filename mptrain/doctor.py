"""One audited training step on this machine, without a run: ``mptrain doctor --audit precision=fp8 model=gpt-nano``."""

from __future__ import annotations

import torch

from mptrain import machine
from mptrain.backends.base import resolve
from mptrain.config import RunConfig, parse_open
from mptrain.precision import Precision
from mptrain.telemetry.audit import StepAudit
from mptrain.telemetry.coverage import Audit

SEQUENCES, TOKENS = 2, 64  # enough rows for every FP8 GEMM
BYTES = 256  # the vocabulary where neither model nor data names one


def audited_step(config: RunConfig) -> tuple[Audit, str]:
    """The audit of one step on random tokens, and what was run in a few words. No data, no run folder, no compiler.

    ValueError names the setting that cannot work here.
    """
    device = machine.pick_device(config.device)
    resolve(config.precision, device)
    vocabulary = int(config.data.get("vocab_size") or BYTES)
    module, settings = parse_open("mptrain.models", "model", config.model, vocab_size=vocabulary)
    length = min(TOKENS, settings.block_size)
    torch.manual_seed(config.seed)
    model = module.build(settings).to(device)
    precision = Precision(config.precision).prepare(model)
    if config.trainer.checkpointing:
        model.recompute = precision.recompute
    tokens = torch.randint(settings.vocab_size, (SEQUENCES, length), device=device)
    step = StepAudit(model, precision)
    with step:
        with precision.forward():
            loss = model(tokens=tokens, targets=tokens)
        precision.backward(loss)
    assert step.result is not None
    said = f"{SEQUENCES} x {length} random tokens, backend {precision.backend.name} ({precision.backend.carrier})"
    return step.result, f"{machine.describe(device)}: {said}"

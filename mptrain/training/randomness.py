"""Random numbers as a function of (seed, step, turn), as the data is: a checkpoint need not hold generators."""

from __future__ import annotations

import zlib

import torch


def seed_generators(device: torch.device, seed: int, step: int, turn: int) -> None:
    """Seed torch's generators for one ``turn`` of a step.

    A turn is a micro-batch, for dropout, on whichever rank it runs; or the optimizer's rounding, on all ranks alike.
    """
    number = zlib.crc32(f"{seed} {step} {turn}".encode())
    if device.type == "cuda":
        torch.cuda.default_generators[torch.cuda.current_device()].manual_seed(number)
    torch.default_generator.manual_seed(number)

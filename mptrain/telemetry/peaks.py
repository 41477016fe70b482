"""Dense peak rates of GPUs by format, and the rate of a step that runs in several."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mptrain.memory import gpus

if TYPE_CHECKING:
    import torch


def peaks(device: torch.device) -> dict[str, float]:
    """The device's dense peaks in TFLOP/s by GEMM format (fp8, bf16, ...); empty where none are known.

    MFU is against the peak of the format that the GEMMs really ran in.
    """
    if device.type != "cuda":
        return {}
    import torch

    return gpus.dense_tflops(torch.cuda.get_device_name(device))


def peak_tflops(device: torch.device, fmt: str) -> float | None:
    """The device's dense peak for a GEMM format, None where none is known."""
    return peaks(device).get(fmt)


def weighted_rate(rates: Mapping[str, float], coverage: Mapping[str, float]) -> float | None:
    """The rate of a step whose GEMM FLOPs ran in several formats: 1 / sum(share / rate), None if a rate is unknown.

    ``coverage``: format -> share, as :attr:`mptrain.telemetry.coverage.Audit.coverage`; claimed shares count as theirs.
    """
    seconds = 0.0  # per FLOP, in the unit of the rates
    for name, share in coverage.items():
        rate = rates.get(name.removesuffix(" claimed"))
        if rate is None:
            return None
        seconds += share / rate
    return 1.0 / seconds if seconds else None

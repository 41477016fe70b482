"""GPUs known by name, a YAML each with the source of its figures: the one place for facts of a card.

``memory`` is the vendor's figure. ``dense_tflops`` (peak TFLOP/s by GEMM format, without sparsity) stands where it is
known, with ``device``, a regular expression for the names that the driver gives to cards with these peaks.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from mptrain.memory.units import parse_bytes
from mptrain.tools.settings import did_you_mean

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Gpu:
    """``memory``: bytes of the vendor's figure, ``stated``; drivers report 0.6 to 7.4 % more, some of it reserved."""

    name: str
    memory: int
    stated: str
    source: str
    device: str = ""
    dense_tflops: dict[str, float] = field(default_factory=dict)


@cache
def named(name: str) -> Gpu:
    """Return the GPU of that name, in any case. ValueError with the nearest one."""
    known = {path.stem.lower(): path for path in sorted(HERE.glob("*.yaml"))}
    if name.lower() not in known:
        names = [path.stem for path in known.values()]
        raise ValueError(f"--gpu={name} is unknown{did_you_mean(name, names)}; or set --fit=80GiB")
    path = known[name.lower()]
    values: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    stated = values.pop("memory")
    return Gpu(path.stem, parse_bytes(stated, f"{path.name}: memory"), stated, **values)


def by_memory() -> list[Gpu]:
    """Return every GPU, the smallest memory first."""
    return sorted((named(path.stem) for path in HERE.glob("*.yaml")), key=lambda gpu: (gpu.memory, gpu.name))


def dense_tflops(device_name: str) -> dict[str, float]:
    """Return the dense peaks of the card that the driver calls ``device_name``, empty where none are known."""
    known = (gpu for gpu in by_memory() if gpu.device and re.search(rf"\b{gpu.device}\b", device_name))
    return next((gpu.dense_tflops for gpu in known), {})

"""Ranks, and what all of them must agree on."""

from __future__ import annotations

import os
from collections.abc import Callable

from torch import Tensor

Agree = Callable[[Tensor], Tensor]  # elementwise MAX over all ranks


def world_size() -> int:
    """Processes in this run, as torchrun announces them; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's place among them, from 0."""
    return int(os.environ.get("RANK", "0"))


def alone(value: Tensor) -> Tensor:
    """The agreement of a single process: its own value."""
    return value

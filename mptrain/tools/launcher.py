"""The rank that torchrun announces to a process; one process alone without it."""

from __future__ import annotations

import os


def world_size() -> int:
    """Processes in this run, as torchrun announces them; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's place among them, from 0."""
    return int(os.environ.get("RANK", "0"))

"""Checkpoints of a small part, and the names of their files."""

from __future__ import annotations

from pathlib import Path

import pytest

BOTH = pytest.mark.parametrize("background", [False, True], ids=["at once", "in the background"])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())

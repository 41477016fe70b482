"""The rounding mode of this thread, and how a region suspends it. The mode itself is of the emulated backend."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from mptrain.formats import Format

KEY = "mptrain.emulation"  # in torch's own thread state: autograd's threads get that of the one that called backward


class Rounding(Protocol):
    """A dispatch mode that rounds to ``fmt``; None while it is suspended."""

    fmt: Format | None


def current() -> Any:
    """Return the mode of this thread, suspended or not; None if it has none."""
    return torch._C._get_obj_in_tls(KEY) if torch._C._is_key_in_tls(KEY) else None


def make_current(mode: Rounding | None) -> None:
    torch._C._stash_obj_in_tls(KEY, mode)


class Suspended:
    """A context in which the rounding of outer ones has no effect."""

    def __init__(self) -> None:
        self._before: list[tuple[Rounding, Format | None] | None] = []

    def __enter__(self) -> None:
        mode = current()
        self._before.append(None if mode is None else (mode, mode.fmt))
        if mode is not None:
            mode.fmt = None

    def __exit__(self, *_: Any) -> None:
        before = self._before.pop()
        if before is not None:
            before[0].fmt = before[1]

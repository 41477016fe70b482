"""Emulate FP16 and TF32 where no unit for them exists: below autograd, where every multiplication is seen.

    with Rounded(Format.fp16, "cpu"): ...                    # a forward
    with Rounded(Format.fp16, "cpu", casting=False): ...     # its backward, where autocast is off

FP16 is torch's own autocast with CUDA's lists (:mod:`mptrain.precision.backends.emulated.autocast_lists`), so tensors
are real float16, and beneath it a dispatch mode that multiplies them in FP32. TF32 is a dispatch mode alone. A dispatch
mode sees what composites, autograd's formulas and a checkpoint's recomputation come to, at 2 to 4 us an operator. A
thread has one at most, however contexts are nested, with the format of the innermost.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from mptrain.formats import Format
from mptrain.precision.backends.emulated.autocast_lists import CudaLists
from mptrain.precision.backends.emulated.thread import Mode
from mptrain.precision.suspension import current, make_current

Leave = Callable[..., Any]


class Rounded:
    """Casts of FP16 or TF32 (``fmt``) on ``device_type``. ``casting=False``: FP16 without autocast, as in a backward,
    where only what is Half already is multiplied as FP16 units do."""

    def __init__(self, fmt: Format, device_type: str, *, casting: bool = True) -> None:
        self._fmt, self._device_type = fmt, device_type
        self._casting = casting and fmt is Format.fp16
        self._left: list[list[Leave]] = []

    def __enter__(self) -> None:
        leave: list[Leave] = []
        mode = current()
        if mode is None:
            leave += _begun(Mode(self._fmt), self._device_type)
        else:
            before = mode.fmt
            mode.fmt = self._fmt
            leave.append(lambda *_: setattr(mode, "fmt", before))
        if self._casting or torch.is_autocast_enabled(self._device_type):
            casts = torch.autocast(self._device_type, dtype=torch.float16, enabled=self._casting)
            casts.__enter__()  # type: ignore[no-untyped-call]
            leave.append(casts.__exit__)
        self._left.append(leave)

    def __exit__(self, *raised: Any) -> None:
        for leave in reversed(self._left.pop()):
            leave(*raised)


def _begun(mode: Mode, device_type: str) -> list[Leave]:
    """Make ``mode`` this thread's. Returns what undoes it, to be called from the end."""
    leave: list[Leave] = []
    if device_type == "cpu":  # other devices have these lists of their own
        lists = CudaLists()
        lists.__enter__()
        leave.append(lists.__exit__)
    _FAST_PATH.close()
    leave.append(_FAST_PATH.reopen)
    mode.__enter__()  # type: ignore[no-untyped-call]
    leave.append(mode.__exit__)
    make_current(mode)
    leave.append(lambda *_: make_current(None))
    return leave


class _FastPath:
    """torch's fused encoder layer of evaluations multiplies out of sight; CUDA's autocast turns it off as well. Its
    switch is the process's: it is off while any thread rounds."""

    def __init__(self) -> None:
        self._lock, self._closed, self._was = threading.Lock(), 0, True

    def close(self) -> None:
        with self._lock:
            if not self._closed:
                self._was = torch.backends.mha.get_fastpath_enabled()
                torch.backends.mha.set_fastpath_enabled(False)
            self._closed += 1

    def reopen(self, *_: Any) -> None:
        with self._lock:
            self._closed -= 1
            if not self._closed:
                torch.backends.mha.set_fastpath_enabled(self._was)


_FAST_PATH = _FastPath()

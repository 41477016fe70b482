"""Which implementation serves a device: decided once per process, by what is asked for and what is available."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from mptrain.formats import Format
from mptrain.kernels.statistics import Statistics

IMPLEMENTATIONS = ("c", "eager", "triton")


class Kernels(Protocol):
    """The functions that a module of this folder offers.

    Outputs are preallocated, contiguous, and of the input's shape.
    """

    def missing(self, device: torch.device) -> str: ...
    def amax(self, x: Tensor, out: Tensor) -> None: ...
    def observe(self, x: Tensor, scale: Tensor | None, fmt: Format | None, statistics: Statistics) -> None: ...
    def quantize(
        self, x: Tensor, scale: Tensor, fmt: Format, q: Tensor, carried: Tensor | None, statistics: Statistics
    ) -> None: ...
    def fake_quantize(self, x: Tensor, scale: Tensor, fmt: Format, out: Tensor, statistics: Statistics) -> None: ...
    def decode(self, q: Tensor, out: Tensor) -> None: ...
    def column_sums(self, x: Tensor, out: Tensor) -> None: ...
    def current_scale(self, amax: Tensor, maximum: float, divisor: float, out: Tensor) -> None: ...


_forced: str | None = None
_chosen: dict[str, tuple[str, Kernels]] = {}
_fallbacks: dict[str, str] = {}  # device type -> why its eager kernels are in use


def implementation(device: torch.device) -> str:
    """Name of the implementation in use for tensors on ``device``: c, eager or triton."""
    return _choose(torch.device(device))[0]


def described(device: torch.device) -> str:
    """Name the implementation in use, and where it is not the one meant for ``device``, say why."""
    name = implementation(device)
    reason = _fallbacks.get(torch.device(device).type, "")
    return f"{name} quantizer" + (f" (many times slower than compiled ones: {reason})" if reason else "")


def why_not() -> dict[str, str]:
    """Implementation -> why it is not available on this machine; empty if it is."""
    cuda = torch.device("cuda")
    devices = {name: torch.device("cpu") for name in IMPLEMENTATIONS} | {"triton": cuda}
    return {name: _missing(name, device) for name, device in devices.items()}


@contextmanager
def use(name: str) -> Iterator[None]:
    """Run the kernels with the implementation ``name``, for tests and benchmarks. Holds for the whole process."""
    global _forced
    before, kept = _forced, dict(_chosen)
    _forced = _known(name, "use()")
    _chosen.clear()
    try:
        yield
    finally:
        _forced = before
        _chosen.clear()
        _chosen.update(kept)


def kernels_on(device: torch.device) -> Kernels:
    """The implementation in use for tensors on ``device``."""
    chosen = _chosen.get(device.type)
    return (chosen or _choose(device))[1]


def module(name: str) -> Any:
    """The implementation's module, with what it offers beside :class:`Kernels`."""
    return importlib.import_module(f"{__package__}.{name}")


def _choose(device: torch.device) -> tuple[str, Kernels]:
    """Decide once for a device type: the one forced by ``use`` or MPTRAIN_KERNELS, else the fastest available."""
    if device.type in _chosen:
        return _chosen[device.type]
    asked = _forced or _known(os.environ.get("MPTRAIN_KERNELS"), "MPTRAIN_KERNELS")
    fastest = {"cpu": "c", "cuda": "triton"}.get(device.type, "eager")
    name = asked or fastest
    reason = _missing(name, device)
    if reason and asked:
        raise ValueError(f"the {asked} kernels were asked for but cannot serve {device.type}: {reason}")
    name = "eager" if reason else name
    _fallbacks[device.type] = reason
    _chosen[device.type] = name, cast(Kernels, module(name))
    return _chosen[device.type]


def _known(name: str | None, where: str) -> str | None:
    if name and name not in IMPLEMENTATIONS:
        raise ValueError(f"{where}: unknown kernels {name!r}; choose one of {', '.join(IMPLEMENTATIONS)}")
    return name or None


def _missing(name: str, device: torch.device) -> str:
    try:
        return str(module(name).missing(device))
    except ImportError as error:
        return f"import failed: {error}"

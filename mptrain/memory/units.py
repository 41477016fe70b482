"""Sizes with explicit units: GB is 10^9 bytes, GiB is 2^30, and a bare number is neither."""

from __future__ import annotations

import re
from decimal import Decimal

GIB, GB = 2**30, 10**9
MOST = 2**60  # bytes; one EiB is a typing error
DECIMAL = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": GB, "TB": 10**12}
BINARY = {"KiB": 2**10, "MiB": 2**20, "GiB": GIB, "TiB": 2**40}
UNITS = {**DECIMAL, **BINARY, "KB": 10**3}
SIZE = re.compile(r"(-?\d{1,20}(?:\.\d{1,20})?) ?([A-Za-z]*)")


def parse_bytes(text: str, setting: str = "the size") -> int:
    """``80GiB``, ``80 GB``, ``1.5TiB``, ``512MiB`` as whole bytes (a fraction of one is dropped).

    ValueError, which names ``setting``, for a bare number (80 what?), an unknown unit (``Gb`` is gigabits), a negative
    size or one over an EiB.
    """
    match = SIZE.fullmatch(str(text).strip())
    if match is None:
        raise ValueError(f"{setting}={text} is not a size: write a number and its unit, e.g. 80GiB or 80GB")
    number, unit = match.groups()
    if not unit:
        raise ValueError(f"{setting}={text} has no unit: write {number}GiB (2^30 bytes) or {number}GB (10^9 bytes)")
    if unit not in UNITS:
        raise ValueError(f"{setting}={text} has an unknown unit: known: {', '.join([*DECIMAL, *BINARY])}")
    size = int(Decimal(number) * UNITS[unit])
    if number.startswith("-") or size > MOST:
        raise ValueError(f"{setting}={text} cannot work: it must be from 0 B to 2^60 B")
    return size


def gib(size: int) -> str:
    """``624.93 GiB``: the exact bytes over 2^30, three significant digits at least."""
    return f"{in_gib(size)} GiB"


def gb(size: int) -> str:
    """``671.00 GB``: the exact bytes over 10^9, three significant digits at least."""
    return f"{in_gb(size)} GB"


def in_gib(size: int) -> str:
    """The number of :func:`gib`, for a column whose head names the unit."""
    return _short(Decimal(size) / GIB)


def in_gb(size: int) -> str:
    """The number of :func:`gb`."""
    return _short(Decimal(size) / GB)


def _short(value: Decimal) -> str:
    return f"{value:,.2f}" if abs(value) >= 10 else f"{value:.3f}"

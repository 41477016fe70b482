"""``mptrain formats`` in the terminal: the range of each format, and how it represents a given number."""

from __future__ import annotations

import math
import re

from rich.table import Table

from mptrain.formats import Format, FormatSpec
from mptrain.report.tables import table_of

POWER = re.compile(r"([+-]?)(\d+(?:\.\d+)?)\^([+-]?\d+)")


def parse_number(text: str) -> float:
    """Parse ``1e-3``, ``0x1p-10``, ``2^-10``, ``inf``, ``nan``. ValueError for other texts."""
    word = text.strip().lower()
    power = POWER.fullmatch(word)
    try:
        if power:
            sign, base, exponent = power.groups()
            return math.copysign(float(base) ** int(exponent), -1.0 if sign == "-" else 1.0)
        return float.fromhex(word) if "0x" in word else float(word)
    except (ValueError, ArithmeticError) as error:
        raise ValueError(f"{text!r} is not a number that FP64 holds: write 0.001, 1e-3, 2^-10, 0x1p-10, inf") from error


def overview() -> Table:
    """Return a table of every format: bits, range, resolution, and its special values."""
    heads = ("bits", "exponent", "mantissa", "max", "min normal", "smallest", "step at 1", "Inf", "NaN")
    table = table_of(["format"], heads)
    for fmt in Format:
        spec = fmt.value
        numbers = [f"{number:.6g}" for number in (spec.max, spec.min_normal, spec.min_subnormal, spec.eps)]
        special = ["yes" if has else "no" for has in (spec.has_inf, spec.has_nan)]
        bits = [str(count) for count in (spec.bits, exponent_bits(spec), spec.mantissa_bits)]
        table.add_row(str(fmt), *bits, *numbers, *special)
    return table


def fate(value: float) -> Table:
    """Return a table with a line per format: ``value`` rounded, the relative error, and a note."""
    title = f"{value!r} = {value.hex()}" if math.isfinite(value) else repr(value)
    table = table_of(["format"], ("becomes", "relative error"), title=title, title_style="bold", padding=(0, 1))
    table.add_column("")
    for fmt in Format:
        if fmt is not Format.e8m0:  # powers of two without sign or zero: the scales of other formats' blocks
            table.add_row(str(fmt), *becomes(value, fmt))
    return table


def becomes(value: float, fmt: Format) -> tuple[str, str, str]:
    """Return (rounded value, relative error, note) of one number in one format, as texts."""
    spec = fmt.value
    if math.isnan(value):
        return ("nan", "-", "NaN") if spec.has_nan else ("-", "-", "has no NaN")
    if math.isinf(value):
        return (f"{value}", "-", "Inf") if spec.has_inf else ("-", "-", "has no Inf: a cast that saturates hides it")
    rounded = rounded_to(value, spec)
    error = "exact" if rounded == value else f"{abs(rounded - value) / abs(value):.2%}"
    if error == "0.00%":
        error = f"{abs(rounded - value) / abs(value):.1e}"
    note = ""
    magnitude = abs(value)
    if magnitude > spec.overflow_at or (magnitude == spec.overflow_at and spec.tie_overflows):
        note = "saturates" + (" (Inf where the cast does not clamp)" if spec.has_inf else "")
    elif 0 < magnitude <= spec.underflow_at:
        note = "flushed to 0"
    elif 0 < abs(rounded) < spec.min_normal:
        note = f"subnormal: a multiple of {spec.min_subnormal:.6g}"
    return (f"{rounded:.9g}", error, note)


def rounded_to(value: float, spec: FormatSpec) -> float:
    """Round a finite number as :func:`mptrain.formats.round_to` does, without torch, whose import takes two
    seconds."""
    if spec.integer:
        rounded = float(round(value))
    else:
        exponent = max(math.frexp(value)[1], math.frexp(spec.min_normal)[1]) - 1
        step = math.ldexp(1.0, exponent - spec.mantissa_bits)
        rounded = round(value / step) * step
    return math.copysign(min(abs(rounded), spec.max), value)


def exponent_bits(spec: FormatSpec) -> int:
    """Count the bits besides sign and mantissa; E8M0 has no sign."""
    return 0 if spec.integer else spec.bits - spec.mantissa_bits - (0 if spec is Format.e8m0.value else 1)

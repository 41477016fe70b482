"""Figures in words, the same in the terminal, in Markdown and in HTML; ``-``: unknown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TypeGuard

from mptrain.report.compare.comparison import Interval, Kind

UNKNOWN = "-"
LAYER_WIDTH = 22
SIGNS = {
    Kind.baseline: "■",
    Kind.equivalent: "✓",
    Kind.worse: "▼",
    Kind.undecided: "?",
    Kind.diverged: "✗",
    Kind.none: "–",
}


def known(value: float | None) -> TypeGuard[float]:
    return value is not None and not math.isnan(value)


def put(form: str, value: float | None, times: float = 1.0) -> str:
    """Write ``times`` the value; ``-`` if it is unknown."""
    return form.format(times * value) if known(value) else UNKNOWN


loss = partial(put, "{:.4f}")
ratio = partial(put, "{:.2f}x")
gib = partial(put, "{:.3f}")
count = partial(put, "{:,.0f}")
top1 = partial(put, "{:.2f} %", times=100.0)  # the two decimals that results are quoted with


def share(value: float | None) -> str:
    """Write a share as ``0.03 %``: two figures are enough for a symptom."""
    return f"{percent(value)} %" if known(value) else UNKNOWN


def delta(interval: Interval | None, unit: str = "%") -> str:
    """Write ``+0.21 % [-0.05, +0.47]``; no interval for a single seed. ``unit``: ``pt`` for accuracies."""
    if interval is None or math.isnan(interval.mean):
        return UNKNOWN
    mean = f"{signed(100 * interval.mean)} {unit}"
    if math.isnan(interval.low) or math.isnan(interval.high):
        return mean
    return f"{mean} [{signed(100 * interval.low)}, {signed(100 * interval.high)}]"


def interval(mean: Interval, form: str, ending: str = "") -> str:
    """Write ``2.31 [2.28, 2.34]`` by a format of numbers; no ends for a single value."""
    ends = "" if math.isnan(mean.low) else f" [{mean.low:{form}}, {mean.high:{form}}]"
    return f"{mean.mean:{form}}{ending}{ends}"


def signed(value: float) -> str:
    """Write two decimals with a sign; never ``-0.00``."""
    return f"{round(value, 2) + 0.0:+.2f}"


def span(low: float | None, high: float | None) -> str:
    """Write the ends of a range of ratios in brackets; empty if they are unknown or equal."""
    if not known(low) or not known(high) or ratio(low) == ratio(high):
        return ""
    return f" [{low:.2f}, {high:.2f}]"


def coverage(shares: Mapping[str, float]) -> str:
    """Write ``fp8_e4m3 92 %, bf16 8 %``, the largest first."""
    ordered = sorted(shares.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {percent(part)} %" for name, part in ordered) or UNKNOWN


def brief(labels: Sequence[str], width: int) -> list[str]:
    """Shorten labels to ``width`` characters; those that would become equal are numbered."""
    cut = [short(label, width) for label in labels]
    if len(set(cut)) == len(set(labels)):
        return cut
    digits = len(str(len(labels)))
    return [f"{number}:{short(label, width - digits - 1)}" for number, label in enumerate(labels, 1)]


def percent(share: float) -> str:
    """Write a share in percent with at most two figures: 0, <0.01, 0.03, 1.2, 34."""
    value = 100 * share
    if value == 0:
        return "0"
    if value < 0.005:
        return "<0.01"
    if value < 0.995:
        return f"{value:.2f}".rstrip("0")
    return f"{value:.1f}" if value < 9.95 else f"{value:.0f}"


def scale_text(scale: float) -> str:
    """Write ``2^-12`` for powers of two, else three figures."""
    mantissa, exponent = math.frexp(scale)
    return f"2^{exponent - 1}" if mantissa == 0.5 else f"{scale:.3g}".replace("e+0", "e").replace("e-0", "e-")


def short(layer: str, width: int = LAYER_WIDTH) -> str:
    """Shorten a layer's name: keep its end, which identifies it, and its first letters if there is room."""
    if len(layer) <= width:
        return layer
    head = width // 4 if width > 16 else 0
    return f"{layer[:head]}…{layer[len(layer) - (width - head - 1) :]}"

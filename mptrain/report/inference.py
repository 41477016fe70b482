"""Differences between runs, with what chance alone would make of them.

Seeds are few (3 is usual), so intervals are Student's t and not a bootstrap: resampling 3 pairs has 10 outcomes and
covers the truth in some 75 % of cases instead of 95. Sources: Student (1908); Welch (1947); sample sizes by iterating
the same condition over n, with the t quantile of the wanted power added to that of the interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.special import betaincinv, ndtri, stdtrit  # scipy.stats has them too, and takes a second to import

from mptrain.report.comparison import Interval
from mptrain.report.runs import Floats

CONFIDENCE, POWER = 0.95, 0.80
MOST_SEEDS = 1000
TAIL = (1 + CONFIDENCE) / 2


def quantile(probability: float, freedom: float) -> float:
    """Of Student's t with that many degrees of freedom."""
    return float(stdtrit(freedom, probability))


def paired(differences: Sequence[float]) -> Interval | None:
    """Of the mean of paired differences. None with fewer than two."""
    n = len(differences)
    if n < 2:
        return None
    return _around(float(np.mean(differences)), _spread(differences) / math.sqrt(n), n - 1, n, "paired t")


def welch(ours: Sequence[float], theirs: Sequence[float]) -> Interval | None:
    """Of the difference of two means whose samples have nothing in common. None with fewer than two in either."""
    n, m = len(ours), len(theirs)
    if min(n, m) < 2:
        return None
    parts = (_spread(ours) ** 2 / n, _spread(theirs) ** 2 / m)
    error = sum(parts)
    freedom = error**2 / (parts[0] ** 2 / (n - 1) + parts[1] ** 2 / (m - 1)) if error else n + m - 2
    return _around(float(np.mean(ours) - np.mean(theirs)), math.sqrt(error), freedom, min(n, m), "Welch t")


def mean_of(values: Sequence[float], method: str) -> Interval:
    """Of the mean of independent values, by Student's t; without ends (NaN) for a single one."""
    n = len(values)
    if n < 2:
        return Interval(float(np.mean(values)) if n else math.nan, math.nan, math.nan, n, method)
    return _around(float(np.mean(values)), _spread(values) / math.sqrt(n), n - 1, n, method)


def proportion(successes: int, n: int) -> Interval:
    """Of a share, by Clopper and Pearson (1934): exact, so it covers the truth in at least 95 % of cases at any n."""
    tail = (1 - CONFIDENCE) / 2
    low = float(betaincinv(successes, n - successes + 1, tail)) if successes else 0.0
    high = float(betaincinv(successes + 1, n - successes, 1 - tail)) if successes < n else 1.0
    return Interval(successes / n, low, high, n, "Clopper-Pearson")


def paired_proportions(gained: int, lost: int, n: int) -> Interval:
    """Of the difference of two shares of the same n cases; ``gained``: right in ours alone, ``lost``: in theirs alone.

    Agresti and Min (2005): Wald's interval with half a case more in each of the four cells. Wald's own is of no width
    where no case changed, and too narrow where few did, which is the rule among good models.
    """
    cases, up, down = n + 2, gained + 0.5, lost + 0.5
    middle = (up - down) / cases
    half = float(-ndtri((1 - CONFIDENCE) / 2)) * math.sqrt(up + down - (up - down) ** 2 / cases) / cases
    return Interval((gained - lost) / n, middle - half, middle + half, n, "Agresti-Min")


def perplexity(loss: Interval) -> Interval:
    """From a loss in nats a prediction; from a difference of losses: the ratio of perplexities."""
    mean, low, high = (math.exp(min(nats, 700.0)) for nats in (loss.mean, loss.low, loss.high))  # a float64 ends there
    return Interval(mean, low, high, loss.n, loss.method)


def _around(mean: float, error: float, freedom: float, n: int, method: str) -> Interval:
    half = quantile(TAIL, freedom) * error
    return Interval(mean, mean - half, mean + half, n, method)


def _spread(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1))


def deviation(interval: Interval) -> float:
    """The standard deviation of one seed's difference that the interval was made from (for Welch, equivalent)."""
    half = interval.high - interval.mean
    return half / quantile(TAIL, interval.n - 1) * math.sqrt(interval.n)


def seeds_needed(interval: Interval, margin: float) -> int | None:
    """How many seeds in all would decide, if mean and spread are what they seem; None beyond ``MOST_SEEDS``.

    Decided is: the interval lies below ``margin``, or it lies above 0. n seeds do so with a probability of ``POWER``
    if (t(97.5 %) + t(80 %)) * deviation / sqrt(n) is at most the distance of the mean from that end.
    """
    distance = max(margin - interval.mean, interval.mean)
    wanted = distance / max(deviation(interval), 1e-300)
    for n in range(2, MOST_SEEDS + 1):
        if (quantile(TAIL, n - 1) + quantile(POWER, n - 1)) / math.sqrt(n) <= wanted:
            return n
    return None


def smooth(curves: Floats, window: int) -> Floats:
    """Mean over the last ``window`` steps, along the last axis; steps without a value are left out of it."""
    known = np.isfinite(curves)
    sums = np.cumsum(np.where(known, curves, 0.0), axis=-1)
    counts = np.cumsum(known, axis=-1)
    lagged = [np.concatenate((np.zeros_like(x[..., :window]), x[..., :-window]), axis=-1) for x in (sums, counts)]
    if curves.shape[-1] <= window:
        lagged = [np.zeros_like(sums), np.zeros_like(counts)]
    with np.errstate(invalid="ignore", divide="ignore"):
        means: Floats = (sums - lagged[0]) / (counts - lagged[1])
    return means


def prediction_half_width(curves: Floats, window: int) -> Floats | None:
    """[steps]: half of the 95 % band in which a further seed lies, by the spread of these [seeds, steps] at each step.

    The spread is averaged over ``window`` steps (variances), for that of 3 seeds at one step is itself mostly chance.
    None with fewer than two seeds.
    """
    n = len(curves)
    if n < 2:
        return None
    variance = smooth(np.var(curves, axis=0, ddof=1), window)
    half: Floats = quantile(TAIL, n - 1) * np.sqrt(variance * (1 + 1 / n))
    return half


def first_lasting(flags: npt.NDArray[np.bool_], length: int) -> int | None:
    """Index of the first True that begins a row of ``length`` of them, or one that lasts to the end."""
    start = None
    for index, flag in enumerate(flags.tolist()):
        if not flag:
            start = None
        elif start is None:
            start = index
        if start is not None and index - start + 1 >= length:
            return start
    return start

"""Confidence intervals of differences between runs, and the number of seeds that would decide a verdict.

Seeds are few (3 is usual), so intervals are Student's t and not a bootstrap: resampling 3 pairs has 10 outcomes
and covers the truth in some 75 % of cases instead of 95. The quantile is multiplied by a factor that holds 2.5 %
on either side for every distribution of :data:`FAMILY`, not for the normal one alone. Only seeds are replicates,
so only intervals over seeds have the factor. Sources: Student (1908); Welch (1947); Lan and DeMets (1983) for
several looks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

import numpy as np
import numpy.typing as npt
from scipy.special import betaincinv, nctdtr, ndtri, stdtrit  # scipy.stats has them too, but takes a second to import

from mptrain.report.compare.comparison import Interval
from mptrain.runs.read import Floats

CONFIDENCE, POWER = 0.95, 0.80
MOST_SEEDS = 1000
TAIL = (1 + CONFIDENCE) / 2
FAMILY = (
    "normal, or skewed up to 0.5 either way (as gamma, lognormal, Weibull and skew-normal distributions are), or "
    "symmetric with heavy tails (Student's t with 3 degrees of freedom; one seed in ten with 5 times the spread)"
)
# Factors by the number of pairs, and of the smaller side's seeds at any ratio of spreads and any number on the other
# side; beyond 10 they fall to 1 with the square root. `mptrain bench verdict --constants` makes these tables (4 min),
# but for 2 unpaired seeds: 2.47 there, and 2 % more for the larger error of the draws in so long a tail.
PAIRED = {2: 1.37, 3: 1.30, 4: 1.27, 5: 1.24, 6: 1.22, 7: 1.20, 8: 1.18, 9: 1.17, 10: 1.16}
UNPAIRED = {2: 2.52, 3: 1.54, 4: 1.35, 5: 1.27, 6: 1.23, 7: 1.21, 8: 1.20, 9: 1.18, 10: 1.17}
# Last number of seeds, named before the first look -> look -> half width of the interval in standard errors. The error
# is spent in proportion to the number of seeds; all looks together keep 2.5 % on either side, for the same family.
LOOKS = {
    4: {3: 6.56, 4: 5.34},
    5: {3: 7.53, 4: 6.00, 5: 4.79},
    6: {3: 8.27, 4: 6.50, 5: 5.13, 6: 4.35},
    8: {3: 9.60, 4: 7.33, 5: 5.71, 6: 4.81, 8: 3.67},
    10: {3: 10.87, 4: 8.14, 5: 6.21, 6: 5.16, 8: 3.91, 10: 3.45},
}


def quantile(probability: float, freedom: float) -> float:
    """Return Student's t quantile with ``freedom`` degrees of freedom."""
    return float(stdtrit(freedom, probability))


def factor(n: int, table: dict[int, float]) -> float:
    """Return the factor on the t quantile of ``n`` seeds; ``table``: :data:`PAIRED` or :data:`UNPAIRED`."""
    last = max(table)
    return table[n] if n <= last else 1 + (table[last] - 1) * math.sqrt(last / n)


def paired(differences: Sequence[float], last: int = 0) -> Interval | None:
    """Return the interval of the mean of paired differences; None with fewer than two.

    ``last``: the last number of seeds of a sweep with several looks (a key of :data:`LOOKS`); only its looks have
    an interval. 0: one look at a number of seeds fixed beforehand.
    """
    n = len(differences)
    if n < 2 or (last and n not in LOOKS[last]):
        return None
    width = LOOKS[last][n] if last else factor(n, PAIRED) * quantile(TAIL, n - 1)
    spread = _spread(differences)
    method = f"paired t, look {n} of {last}" if last else "paired t"
    return _around(float(np.mean(differences)), width * spread / math.sqrt(n), n, method, (spread,))


def welch(ours: Sequence[float], theirs: Sequence[float]) -> Interval | None:
    """Return the interval of the difference of two means that share no seeds; None with fewer than two in either.

    The degrees of freedom are Welch's, but at most twice those of the smaller side: where that side spreads most and
    by chance shows little of it, Welch's own estimate is that of the other (2 against 5 seeds at 3:1 missed in 5.4 %).
    """
    n = min(len(ours), len(theirs))
    if n < 2:
        return None
    spreads = _spread(ours), _spread(theirs)
    parts = [spread**2 / len(side) for spread, side in zip(spreads, (ours, theirs), strict=True)]
    error = sum(parts)
    shares = [part**2 / (len(side) - 1) for part, side in zip(parts, (ours, theirs), strict=True)]
    freedom = min(error**2 / sum(shares) if error else math.inf, 2 * (n - 1))
    half = factor(n, UNPAIRED) * quantile(TAIL, freedom) * math.sqrt(error)
    return _around(float(np.mean(ours) - np.mean(theirs)), half, n, "Welch t", spreads)


def mean_of(values: Sequence[float], method: str, *, seeds: bool = False) -> Interval:
    """Return the interval of the mean of independent values, by Student's t; without ends (NaN) for a single one.

    ``seeds``: each value is of one seed, so the quantile has its factor; samples are many, and need none.
    """
    n = len(values)
    if n < 2:
        return Interval(float(np.mean(values)) if n else math.nan, math.nan, math.nan, n, method)
    width = quantile(TAIL, n - 1) * (factor(n, PAIRED) if seeds else 1.0)
    return _around(float(np.mean(values)), width * _spread(values) / math.sqrt(n), n, method)


def proportion(successes: int, n: int) -> Interval:
    """Bound a share by Clopper and Pearson (1934): exact, so it covers the truth in at least 95 % of cases at any n."""
    tail = (1 - CONFIDENCE) / 2
    low = float(betaincinv(successes, n - successes + 1, tail)) if successes else 0.0
    high = float(betaincinv(successes + 1, n - successes, 1 - tail)) if successes < n else 1.0
    return Interval(successes / n, low, high, n, "Clopper-Pearson")


def paired_proportions(gained: int, lost: int, n: int) -> Interval:
    """Bound the difference of two shares of the same n cases; ``gained``: right in ours alone, ``lost``: in theirs
    alone.

    Agresti and Min (2005): Wald's interval with half a case added to each of the four cells. Wald's own has no
    width if no case changed, and is too narrow if few did, as is usual for good models.
    """
    cases, up, down = n + 2, gained + 0.5, lost + 0.5
    middle = (up - down) / cases
    half = float(-ndtri((1 - CONFIDENCE) / 2)) * math.sqrt(up + down - (up - down) ** 2 / cases) / cases
    return Interval((gained - lost) / n, middle - half, middle + half, n, "Agresti-Min")


def perplexity(loss: Interval) -> Interval:
    """Turn a loss in nats into a perplexity, a difference of losses into the ratio of perplexities."""
    mean, low, high = (math.exp(min(nats, 700.0)) for nats in (loss.mean, loss.low, loss.high))  # the limit of float64
    return Interval(mean, low, high, loss.n, loss.method)


def _around(mean: float, half: float, n: int, method: str, spreads: tuple[float, ...] = ()) -> Interval:
    return Interval(mean, mean - half, mean + half, n, method, spreads)


def _spread(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1))


def seeds_needed(interval: Interval, margin: float) -> int | None:
    """Return how many seeds (of each side, where unpaired) would decide with a probability of :data:`POWER`.

    Mean and spreads are taken at face value. Decided means: the interval lies below ``margin``, or above 0. None
    beyond :data:`MOST_SEEDS`.
    """
    distance, variances = _distance(interval, margin), [spread**2 for spread in _spreads(interval)]
    total, table, ratio = sum(variances), PAIRED, 1.0
    if len(variances) == 2:  # Welch's degrees of freedom are n - 1 times a ratio between 1 and 2
        table, ratio = UNPAIRED, total**2 / max(sum(variance**2 for variance in variances), 1e-300)
    for n in range(2, MOST_SEEDS + 1):
        freedom = ratio * (n - 1)
        estimated = freedom if table is PAIRED else max(1.0, freedom * n / (n + 1))  # harmonic mean of equal spreads
        width = factor(n, table) * quantile(TAIL, estimated)
        if power(distance, math.sqrt(total / n), freedom, width) >= POWER:
            return n
    return None


def next_look(interval: Interval, margin: float, last: int) -> int | None:
    """Return the number of seeds at which a verdict is expected with probability :data:`POWER`, or the last look.

    None if ``interval`` is of the last look already.
    """
    later = [n for n in LOOKS[last] if n > interval.n]
    distance, (spread,) = _distance(interval, margin), _spreads(interval)
    for n in later:
        if power(distance, spread / math.sqrt(n), n - 1.0, LOOKS[last][n]) >= POWER:
            return n
    return later[-1] if later else None


def _spreads(interval: Interval) -> tuple[float, ...]:
    """Return the interval's spreads; without them, the spread that its width implies for paired seeds."""
    half = interval.high - interval.mean
    implied = half / (factor(interval.n, PAIRED) * quantile(TAIL, interval.n - 1)) * math.sqrt(interval.n)
    return interval.spreads or (implied,)


def _distance(interval: Interval, margin: float) -> float:
    """Return the larger distance of the mean: below the margin (to be equivalent) or above 0 (to be worse)."""
    return max(margin - interval.mean, interval.mean)


def power(distance: float, error: float, freedom: float, width: float) -> float:
    """Return the probability that an interval of ``width`` standard errors lies within ``distance`` of its mean.

    ``error``: of the mean. Of normal values with these parameters: the noncentral t.
    """
    return 1 - float(nctdtr(freedom, min(distance / max(error, 1e-300), 1e4), width))


def smooth(curves: Floats, window: int) -> Floats:
    """Return the mean over the last ``window`` steps, along the last axis; steps without a value are ignored."""
    known = np.isfinite(curves)
    sums = np.cumsum(np.where(known, curves, 0.0), axis=-1)
    counts = np.cumsum(known, axis=-1)
    none = np.zeros((*curves.shape[:-1], window))
    lagged = [np.concatenate((none, x), axis=-1)[..., : curves.shape[-1]] for x in (sums, counts)]
    with np.errstate(invalid="ignore", divide="ignore"):
        means: Floats = (sums - lagged[0]) / (counts - lagged[1])
    return means


def prediction_half_width(curves: Floats, window: int) -> Floats | None:
    """Return half of the 95 % band in which a further seed lies, by the spread of these [seeds, steps] at each
    step.

    The spread is averaged over ``window`` steps (variances), because that of 3 seeds at one step is itself mostly
    chance. None with fewer than two seeds.
    """
    n = len(curves)
    if n < 2:
        return None
    variance = smooth(np.var(curves, axis=0, ddof=1), window)
    half: Floats = quantile(TAIL, n - 1) * np.sqrt(variance * (1 + 1 / n))
    return half


def first_lasting(flags: npt.NDArray[np.bool_], length: int) -> int | None:
    """Return the index of the first True that starts a run of ``length``, or one that lasts to the end."""
    start = 0
    for flag, group in groupby(flags.tolist()):
        size = sum(1 for _ in group)
        if flag and (size >= length or start + size == len(flags)):
            return start
        start += size
    return None

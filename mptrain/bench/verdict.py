"""``mptrain bench verdict``: error rates and power of the verdicts of ``mptrain compare``, by simulation.

Simulated seeds, drawn from every distribution of the stated family and from some outside it, are judged by the
rules of ``mptrain.report.compare.intervals``. A rate is the share of verdicts that are wrong where the truth is
on the border: called worse at a difference of 0, called equivalent at the margin; the worse of the two, because
skew makes them unequal. ``--constants`` computes the tables of that module from the same draws. One process, no
training.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from scipy.special import stdtrit

from mptrain.report.compare.comparison import Interval
from mptrain.report.compare.intervals import LOOKS, PAIRED, POWER, TAIL, UNPAIRED, factor, quantile, seeds_needed
from mptrain.runs.read import Floats
from mptrain.tools.files import json_text, write_whole

SKEW = 0.5
LOGNORMAL_S, WEIBULL_K = 0.164055, 2.215598  # for a skewness of 0.5
_ROOT = (2 * SKEW / (4 - math.pi)) ** (2 / 3)
SKEW_NORMAL_D = math.sqrt(math.pi / 2 * _ROOT / (1 + _ROOT))
ALPHA = 1 - TAIL
SEEDS = (2, 3, 4, 5, 6, 8, 10, 20)
SIZES = (0, 1, 2, 5, 10, 30)  # additional seeds of the other side, if unpaired
RATIOS = (0.1, 1 / 3, 1.0, 2.0, 3.0, 5.0, 10.0)  # spread of the smaller side over the other's
Draw = Callable[[np.random.Generator, tuple[int, ...]], Floats]


def lognormal(s: float) -> Draw:
    """Return a sampler of exp(s z), shifted and scaled to mean 0 and variance 1."""
    mean, ratio = math.exp(s * s / 2), math.exp(s * s)
    return lambda rng, shape: (np.exp(s * rng.standard_normal(shape)) - mean) / (mean * math.sqrt(ratio - 1))


def _gamma(rng: np.random.Generator, shape: tuple[int, ...]) -> Floats:
    k = 4 / SKEW**2
    return (rng.standard_gamma(k, shape) - k) / math.sqrt(k)


def _weibull(rng: np.random.Generator, shape: tuple[int, ...]) -> Floats:
    mean, square = math.gamma(1 + 1 / WEIBULL_K), math.gamma(1 + 2 / WEIBULL_K)
    return (rng.weibull(WEIBULL_K, shape) - mean) / math.sqrt(square - mean**2)


def _skew_normal(rng: np.random.Generator, shape: tuple[int, ...]) -> Floats:
    d = SKEW_NORMAL_D
    values = d * np.abs(rng.standard_normal(shape)) + math.sqrt(1 - d * d) * rng.standard_normal(shape)
    return (values - d * math.sqrt(2 / math.pi)) / math.sqrt(1 - 2 * d * d / math.pi)


def _outliers(rng: np.random.Generator, shape: tuple[int, ...]) -> Floats:
    return rng.standard_normal(shape) * np.where(rng.random(shape) < 0.1, 5.0, 1.0)


SKEWED: dict[str, Draw] = {
    "gamma": _gamma,
    "lognormal": lognormal(LOGNORMAL_S),
    "Weibull": _weibull,
    "skew-normal": _skew_normal,
}
FAMILY: dict[str, Draw] = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    **SKEWED,
    "Student's t, 3 degrees": lambda rng, shape: rng.standard_t(3, shape),
    "one in ten 5 times as wide": _outliers,
}
WORST = ("normal", "gamma", "Weibull")  # of all 49 pairs of shapes, unpaired seeds needed most with one of these
OUTSIDE: dict[str, Draw] = {
    "gamma, skewness 1": lambda rng, shape: (rng.standard_gamma(4, shape) - 4) / 2,
    "lognormal, s 0.5 (skewness 1.7)": lognormal(0.5),
    "lognormal, s 1 (skewness 6.2)": lognormal(1.0),
    "uniform": lambda rng, shape: (rng.random(shape) - 0.5) * math.sqrt(12),
}


def t_of(draws: Floats) -> Floats:
    """Return Student's t of each column of ``draws`` [seeds, runs], whose true mean is 0."""
    n = len(draws)
    t: Floats = draws.mean(0) / (draws.std(0, ddof=1) / math.sqrt(n))
    return t


def welch_t(ours: tuple[Floats, Floats], theirs: tuple[Floats, Floats], n: int, m: int, ratio: float) -> Floats:
    """Return t over its own quantile, of sides given as (mean, variance) of standardised seeds.

    ``ratio`` multiplies the spread of the side with ``n`` seeds.
    """
    parts = ours[1] * ratio**2 / n, theirs[1] / m
    error = parts[0] + parts[1]
    freedom = np.minimum(error**2 / (parts[0] ** 2 / (n - 1) + parts[1] ** 2 / (m - 1)), 2.0 * (n - 1))
    grid = np.linspace(1, 2.0 * n, 4000)  # degrees of freedom: interpolation is 10 times as fast as the quantile
    t: Floats = (ratio * ours[0] - theirs[0]) / np.sqrt(error) / np.interp(freedom, grid, stdtrit(grid, TAIL))
    return t


def unpaired_cases(rng: np.random.Generator, n: int, runs: int) -> Iterator[tuple[str, Floats]]:
    """Yield a name and :func:`welch_t` for each shape of both sides, number of seeds and ratio of spreads."""
    for more in SIZES:
        sides = []
        for size in (n, n + more):
            moments = {}
            for name in WORST:
                values = FAMILY[name](rng, (size, runs))
                moments[name] = values.mean(0), values.var(0, ddof=1)
            sides.append(moments)
        for ours, theirs in ((a, b) for a in sides[0] for b in sides[1]):
            for sign in (1, -1) if ours in SKEWED and theirs in SKEWED else (1,):
                mean, variance = sides[1][theirs]
                for ratio in RATIOS:
                    name = f"{ours} ({n} seeds, {ratio:.2g}) and {'-' * (sign < 0)}{theirs} ({n + more})"
                    yield name, welch_t(sides[0][ours], (sign * mean, variance), n, n + more, ratio)


def wrong(t: Floats, width: float) -> float:
    """Return the share of ``t`` beyond ``width``, of the worse side."""
    return max(float(np.mean(t > width)), float(np.mean(t < -width)))


def looks_wrong(draws: Floats, looks: dict[int, float]) -> float:
    """Return the share of columns of ``draws`` [seeds, runs] with t beyond the bound at any look, of the worse side."""
    ts = [(t_of(draws[:n]), width) for n, width in looks.items()]
    high, low = (np.any([sign * t > width for t, width in ts], axis=0).mean() for sign in (1, -1))
    return max(float(high), float(low))


def decided(sides: Sequence[Floats], distance: float) -> float:
    """Return the share of intervals that lie below ``distance``; ``sides``: pairs, or ours and theirs [seeds, runs]."""
    n = len(sides[0])
    if len(sides) == 1:
        return float(np.mean(t_of(sides[0] - distance) < -factor(n, PAIRED) * quantile(TAIL, n - 1)))
    ours, theirs = ((side.mean(0), side.var(0, ddof=1)) for side in (sides[0] - distance, sides[1]))
    return float(np.mean(welch_t(ours, theirs, n, n, 1.0) < -factor(n, UNPAIRED)))


# --- the tables


def up(value: float) -> float:
    """Return ``value``, with 1 % more for the error of the draws, rounded up."""
    return math.ceil(101 * value) / 100


def paired_factor(rng: np.random.Generator, n: int, runs: int) -> float:
    """Return by how much the t quantile of ``n`` pairs has to be larger, for the worst of the family."""
    worst = 0.0
    for draw in FAMILY.values():
        t = t_of(draw(rng, (n, runs)))
        worst = max(worst, -float(np.quantile(t, ALPHA)), float(np.quantile(t, TAIL)))
    return worst / quantile(TAIL, n - 1)


def unpaired_factor(rng: np.random.Generator, n: int, runs: int) -> float:
    """Return the same for unpaired seeds, ``n`` on the smaller side."""
    return max(max(-float(np.quantile(t, ALPHA)), float(np.quantile(t, TAIL))) for _, t in unpaired_cases(rng, n, runs))


def bounds(rng: np.random.Generator, last: int, runs: int) -> dict[int, float]:
    """Return the bound on t at each look up to ``last``: exact for the normal, then widened for the family.

    t_3, t_4, ... of normal seeds do not depend on their spread, so quantiles of simulated paths are exact; those that
    crossed before are out. The widening is :data:`PAIRED`'s times one number for all looks, found by bisection.
    """
    looks = [n for n in max(LOOKS.values(), key=len) if n <= last]
    draws = FAMILY["normal"](rng, (last, runs))
    ts = {n: np.concatenate((t, -t)) for n in looks for t in [t_of(draws[:n])]}
    inside, exact = np.ones(2 * runs, bool), {}
    for n in looks:
        beyond = round(ALPHA * n / last * 2 * runs) - int((~inside).sum())
        exact[n] = float(np.sort(ts[n][inside])[-beyond])
        inside &= ts[n] < exact[n]
    sets = [draw(rng, (last, runs // 4)) for draw in FAMILY.values()]
    low, high = 0.9, 1.3
    while high - low > 0.002:
        middle = (low + high) / 2
        looked = {n: middle * factor(n, PAIRED) * width for n, width in exact.items()}
        low, high = (low, middle) if max(looks_wrong(x, looked) for x in sets) <= ALPHA else (middle, high)
    return {n: up(high * factor(n, PAIRED) * width) for n, width in exact.items()}


def constants(seed: int, runs: int) -> None:
    """Print the tables of ``mptrain.report.compare.intervals``; each number has draws of its own."""
    for name, of, part in (("PAIRED", paired_factor, 10), ("UNPAIRED", unpaired_factor, 4)):
        print(name, {n: up(of(np.random.default_rng((seed, n)), n, part * runs)) for n in range(2, 11)}, flush=True)
    print("LOOKS", {last: bounds(np.random.default_rng((seed, last)), last, 10 * runs) for last in LOOKS}, flush=True)


# --- the rates


def rates(rng: np.random.Generator, runs: int) -> Iterator[tuple[str, float, float | None]]:
    """Yield (what, rate, limit) of each rule; None where nothing is promised."""
    for name, draw in {**FAMILY, **OUTSIDE}.items():
        for n in SEEDS:
            rate = wrong(t_of(draw(rng, (n, runs))), factor(n, PAIRED) * quantile(TAIL, n - 1))
            yield f"wrong, {n} pairs: {name}", rate, ALPHA if name in FAMILY else None
    for n in SEEDS:
        worst = max((wrong(t, factor(n, UNPAIRED)), name) for name, t in unpaired_cases(rng, n, runs // 4))
        yield f"wrong, unpaired, the worst: {worst[1]}", worst[0], ALPHA
    for last, looks in LOOKS.items():
        for name, draw in {**FAMILY, **OUTSIDE}.items():
            rate = looks_wrong(draw(rng, (last, runs)), looks)
            yield f"wrong at any look up to {last} pairs: {name}", rate, ALPHA if name in FAMILY else None
    for distance in (3.5, 2.5, 2.0, 1.5, 1.0, 0.7, 0.5):
        for sides, of in ((1, "pairs"), (2, "on each side")):
            needed = seeds_needed(Interval(0.0, -1.0, 1.0, 3, "", (1.0,) * sides), distance)
            assert needed is not None
            for name in ("normal", *SKEWED):
                draws = [FAMILY[name](rng, (needed, runs)) for _ in range(sides)]
                share = min(decided([sign * side for side in draws], distance) for sign in (1, -1))
                yield (
                    f"decided, {needed} {of} at {distance:g} spreads: {name}",
                    share,
                    POWER if name == "normal" else None,
                )


def run(argv: list[str]) -> int:
    """Simulate and print; return 1 if a rate is beyond what the rules promise (less what so many runs miss by
    chance)."""
    parser = argparse.ArgumentParser(prog="mptrain bench verdict", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=100_000, help="simulated comparisons of a kind (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--constants", action="store_true", help="make the tables of factors instead")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rates")
    args = parser.parse_args(argv)
    rng = np.random.default_rng(args.seed)
    if args.constants:
        constants(args.seed, args.runs)
        return 0
    rows = []
    for what, rate, limit in rates(rng, args.runs):
        bound, missed = "", False
        if limit is not None:
            sign, word = (1, "at most") if limit == ALPHA else (-1, "at least")
            missed = sign * (rate - limit) > 5 * math.sqrt(limit * (1 - limit) / (args.runs // 4))
            bound = f"{word} {limit:.1%}{'  MISSED' if missed else ''}"
        rows.append({"what": what, "rate": rate, "limit": limit, "missed": missed})
        print(f"{what:96}{rate:8.2%}  {bound}", flush=True)
    if args.json:
        command = " ".join(["mptrain bench verdict", *argv])
        write_whole(args.json, json_text({"command": command, "rows": rows}, indent=1))
    return int(any(row["missed"] for row in rows))

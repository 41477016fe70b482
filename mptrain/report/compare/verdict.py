"""The verdict on a precision, by rules that are printed next to it, and the definition of a diverged run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mptrain.report.compare.comparison import Interval, Kind, Verdict
from mptrain.report.compare.intervals import (
    FAMILY,
    LOOKS,
    MOST_SEEDS,
    PAIRED,
    POWER,
    TAIL,
    next_look,
    seeds_needed,
    smooth,
)
from mptrain.runs.baseline import FEW_STEPS
from mptrain.runs.read import Run
from mptrain.telemetry.ledger import SKIPS_ALARM

LOST_FRAC = 0.5  # share of training's improvement whose loss means divergence
EVENTS_BEFORE = 50  # steps before a divergence in which an event may be its cause


@dataclass(frozen=True)
class Divergence:
    """``step`` is where it began; ``text`` describes it, with the last event before it as a possible cause."""

    step: int
    text: str


def rules(margin: float, metric: str, last: int = 0) -> list[str]:
    """Return the rules in sentences, for ``metric`` ("validation loss", "top-1", ...).

    ``last``: the last number of seeds that a sweep named before its first verdict, 0 if it named none.
    """
    loss = metric != "top-1"
    delta = "relative difference" if loss else "difference (in points of accuracy)"
    near = f"{100 * margin:g} %" if loss else f"{100 * margin:g} points"
    widths = ", ".join(f"{PAIRED[n]:g} at {n}" for n in (2, 3, 5, 10))
    return [
        f"Compared is the final {metric}, with that of the baseline's run of the same seed. The interval is a 95 % "
        f"confidence interval of the mean {delta}, Student's t over the pairs (Welch's over the means where no seeds "
        f"are shared), its quantile times a factor for seeds that are not normally distributed ({widths} seeds).",
        f"equivalent: the whole interval lies on the good side of {near} worse.",
        "worse: not equivalent, and the whole interval lies on the bad side of 0.",
        f"undecided: neither. Also below {FEW_STEPS} steps, which say nothing about where training goes.",
        "diverged: in one seed the loss stops being a number, or ends with more than half of what training had won "
        f"given back, or the last {SKIPS_ALARM} steps or more are all skipped, and the baseline's does not.",
        f"A variant as good as the baseline is called worse, and one that is worse by {near} is called equivalent, in "
        f"at most {1 - TAIL:.1%} of comparisons each, if the differences between seeds are {FAMILY}. For normal ones "
        "it is 1.2 to 1.9 %. Outside of this family are stronger skew (lognormal with s = 0.5: 4 to 6 %; with s = 1: "
        "7 to 18 %), uniform differences of 2 or 3 seeds (2.7 %) and those of few distinct values. With many variants "
        "expect that share of them. `mptrain bench verdict` simulates the rates.",
        _several_looks(last) if last else _one_look(),
    ]


def _one_look() -> str:
    return (
        "These are the rates of one look at a number of seeds fixed before it; a verdict while runs are at work is "
        "provisional. Adding seeds to an undecided comparison until it decides makes them up to 8 %, so the number "
        f"that undecided names is one of new seeds: it decides with a probability of {POWER:.0%} (77 % for the most "
        "skewed of the family) if difference and spread are what they seem. To look more than once, name the last "
        "number before the first look: sweep_seeds=10."
    )


def _several_looks(last: int) -> str:
    looks = ", ".join(map(str, LOOKS[last]))
    return (
        f"This sweep named its last number of seeds, {last}, before the first look, so it is looked at with {looks} "
        "seeds (the first so many, in the order they were given), and these are the rates of all looks together. Each "
        f"look spends its part of the {1 - TAIL:.1%}, so its interval is wider than that of a single look. The seeds "
        f"asked for decide with a probability of {POWER:.0%} if difference and spread are what they seem, or are the "
        "last."
    )


def judge(
    delta: Interval | None, margin: float, *, steps: int, seeds: int, points: bool = False, last: int = 0
) -> Verdict:
    """Return the verdict on ``delta``, the difference from the baseline with its interval; None where there is none.

    ``points``: the difference is one of accuracy in points (below 0: worse); else of a loss (above 0: worse).
    ``last``: as in :func:`rules`; ``seeds`` counts the variant's.
    """
    unit = "points" if points else "%"
    figures = _why(delta, unit)
    if delta is not None and points:
        delta = replace(delta, mean=-delta.mean, low=-delta.high, high=-delta.low)
    if steps < FEW_STEPS:
        more = f"undecided: {steps} steps are too few, use trainer.max_steps={FEW_STEPS} or more"
        return Verdict(Kind.undecided, more, figures)
    if delta is None:
        few = min(LOOKS[last]) - seeds if last else 2 if seeds == 1 else 0
        more = f"needs {few} more seed{'s' * (few > 1)}" if few > 0 else "needs the baseline's seeds"
        why = "one seed shows no spread; three are the fewest whose interval is of use"
        return Verdict(Kind.undecided, f"undecided: {more}", why)
    if delta.high < margin:
        better = " (better)" if delta.high < 0 else ""
        return Verdict(Kind.equivalent, f"equivalent{better}", figures)
    if delta.low > 0:
        return Verdict(Kind.worse, f"worse by {100 * delta.mean:.2g} {unit}", figures)
    return Verdict(Kind.undecided, f"undecided: {_more(delta, margin, seeds, last)}", figures)


def _more(delta: Interval, margin: float, seeds: int, last: int) -> str:
    """Name what would decide: more seeds if their last number was named beforehand, else a new comparison."""
    if last:
        following = next_look(delta, margin, last)
        if following is None:
            return f"{last} seeds were to be the last"
        more = max(1, following - seeds)
        return f"needs {more} more seed{'s' * (more > 1)}"
    needed = seeds_needed(delta, margin)
    sides = " on each side" if len(delta.spreads) > 1 else ""
    return f"{delta.n} seeds are too few, plan {f'over {MOST_SEEDS}' if needed is None else needed} new ones{sides}"


def _why(delta: Interval | None, unit: str) -> str:
    if delta is None:
        return "one seed shows no spread"
    low, mean, high = (f"{100 * value:+.2f}" for value in (delta.low, delta.mean, delta.high))
    return f"{mean} {unit} [{low}, {high}] over {delta.n} seeds, {delta.method}"


def divergence(run: Run) -> Divergence | None:
    """Return where and how a finished run diverged; None if it did not."""
    for where in (_not_a_number(run), _skipped_to_the_end(run), _given_back(run)):
        if where is not None:
            step, what = where
            return Divergence(step, what + _cause(run, step))
    return None


def _not_a_number(run: Run) -> tuple[int, str] | None:
    steps = sorted(step for step, loss in run.losses.items() if not math.isfinite(loss))
    if steps:
        return steps[0], "the training loss is not a finite number"
    if "val_loss" in run.summary and not math.isfinite(run.figure("val_loss")):
        return run.steps, "the validation loss is not a finite number"
    return None


def _skipped_to_the_end(run: Run) -> tuple[int, str] | None:
    skipped = {event["step"] for event in run.events if event.get("event") == "skipped" and "step" in event}
    step = run.steps
    while step in skipped:
        step -= 1
    if run.steps - step < SKIPS_ALARM:
        return None
    return step + 1, f"the last {run.steps - step} steps were all skipped"


def _given_back(run: Run) -> tuple[int, str] | None:
    """Check whether the smoothed loss ends above the middle between its start and its minimum."""
    curve = run.curve()
    curve = curve[np.isfinite(curve)]
    window = max(1, len(curve) // 50)
    if len(curve) < 2 * window + 2:
        return None
    smoothed = smooth(curve, window)[window - 1 :]
    lowest = int(np.argmin(smoothed))
    least, start = float(smoothed[lowest]), float(smoothed[0])
    limit = least + LOST_FRAC * max(start - least, 0.05 * abs(least))  # a loss that never fell may vary by 2.5 %
    if smoothed[-1] <= limit:
        return None
    below = np.flatnonzero(smoothed <= limit)
    step = int(below[-1]) + window + 1
    return step, f"the training loss rose from {least:.3f} to {float(smoothed[-1]):.3f}"


def _cause(run: Run, step: int) -> str:
    """Return the last event in the steps up to ``step`` that may explain it."""
    explained = [e for e in run.events if e.get("reason") and isinstance(e.get("step"), int)]
    near = [e for e in explained if step - EVENTS_BEFORE <= e["step"] <= step + 1]
    if not near:
        return ", with no event before it"
    event = max(near, key=lambda e: (e["step"] <= step, e["step"]))
    layer = f" in {event['layer']}" if event.get("layer") else ""
    return f" (step {event['step']}: {event['reason']}{layer})"


def diverged(where: Sequence[tuple[int | None, Divergence]], seeds: int) -> Verdict:
    """Return the verdict on a variant with these (seed, divergence), out of ``seeds``."""
    seed, first = min(where, key=lambda pair: pair[1].step)
    which = f"seed {seed}" if len(where) == 1 else f"{len(where)} of {seeds} seeds, the first {seed}"
    return Verdict(Kind.diverged, f"diverged at step {first.step} because {first.text}", f"{which}")

"""The verdict on a precision, by rules that are printed beside it, and when a run counts as diverged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mptrain.baseline import FEW_STEPS
from mptrain.report.comparison import Interval, Kind, Verdict
from mptrain.report.inference import MOST_SEEDS, POWER, TAIL, seeds_needed, smooth
from mptrain.report.runs import Run
from mptrain.telemetry.ledger import SKIPS_ALARM

LOST_FRAC = 0.5  # of what training had won, given back: diverged
EVENTS_BEFORE = 50  # steps in which an event may be the cause of what follows


@dataclass(frozen=True)
class Divergence:
    """``step`` is where it began; ``text`` says what happened, and the last event before it that may be the cause."""

    step: int
    text: str


def rules(margin: float, metric: str) -> list[str]:
    """The rules in sentences, for ``metric`` ("validation loss", "top-1", ...)."""
    loss = metric != "top-1"
    delta = "relative difference" if loss else "difference (in points of accuracy)"
    near = f"{100 * margin:g} %" if loss else f"{100 * margin:g} points"
    return [
        f"Compared is the final {metric}, with that of the baseline's run of the same seed. The interval is a 95 % "
        f"confidence interval of the mean {delta}, Student's t over the pairs (Welch's over the means where no seeds "
        "are shared).",
        f"equivalent: the whole interval lies on the good side of {near} worse.",
        "worse: not equivalent, and the whole interval lies on the bad side of 0.",
        f"undecided: neither; the number of seeds that would decide it with a probability of {POWER:.0%} if difference "
        f"and spread are what they seem. Also below {FEW_STEPS} steps, which say nothing about where training goes.",
        "diverged: in one seed the loss stops being a number, or ends with more than half of what training had won "
        f"given back, or the last {SKIPS_ALARM} steps or more are all skipped, and the baseline's does not.",
        f"A variant as good as the baseline is called worse in at most {1 - TAIL:.1%} of comparisons; with many "
        "variants expect that share of them.",
    ]


def judge(delta: Interval | None, margin: float, *, steps: int, seeds: int, points: bool = False) -> Verdict:
    """By ``delta``, the difference from the baseline with its interval; None where one seed is all.

    ``points``: the difference is one of accuracy (below 0: worse), said in points; else of a loss (above 0: worse).
    """
    unit = "points" if points else "%"
    said = _why(delta, unit)
    if delta is not None and points:
        delta = replace(delta, mean=-delta.mean, low=-delta.high, high=-delta.low)
    if steps < FEW_STEPS:
        more = f"undecided: {steps} steps are too few, use trainer.max_steps={FEW_STEPS} or more"
        return Verdict(Kind.undecided, more, said)
    if delta is None:
        more = "needs 2 more seeds" if seeds == 1 else "needs the baseline's seeds"
        why = "one seed shows no spread; three are the fewest whose interval is of use"
        return Verdict(Kind.undecided, f"undecided: {more}", why)
    if delta.high < margin:
        better = " (better)" if delta.high < 0 else ""
        return Verdict(Kind.equivalent, f"equivalent{better}", said)
    if delta.low > 0:
        return Verdict(Kind.worse, f"worse by {100 * delta.mean:.2g} {unit}", said)
    wanted = seeds_needed(delta, margin)
    more = f"more than {MOST_SEEDS - delta.n}" if wanted is None else str(max(1, wanted - delta.n))
    return Verdict(Kind.undecided, f"undecided: needs {more} more seed{'' if more == '1' else 's'}", said)


def _why(delta: Interval | None, unit: str) -> str:
    if delta is None:
        return "one seed shows no spread"
    low, mean, high = (f"{100 * value:+.2f}" for value in (delta.low, delta.mean, delta.high))
    return f"{mean} {unit} [{low}, {high}] over {delta.n} seeds, {delta.method}"


def divergence(run: Run) -> Divergence | None:
    """Whether and where the run came off; ``run`` has finished."""
    for found in (_not_a_number(run), _skipped_to_the_end(run), _given_back(run)):
        if found is not None:
            step, what = found
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
    return step + 1, f"every one of the last {run.steps - step} steps was skipped"


def _given_back(run: Run) -> tuple[int, str] | None:
    """The smoothed loss ends above the middle between its start and its minimum."""
    curve = run.curve()
    curve = curve[np.isfinite(curve)]
    window = max(1, len(curve) // 50)
    if len(curve) < 2 * window + 2:
        return None
    smoothed = smooth(curve, window)[window - 1 :]
    lowest = int(np.argmin(smoothed))
    least, start = float(smoothed[lowest]), float(smoothed[0])
    limit = least + LOST_FRAC * max(start - least, 0.05 * abs(least))  # a loss that never fell may wander by 2.5 %
    if smoothed[-1] <= limit:
        return None
    below = np.flatnonzero(smoothed <= limit)
    step = int(below[-1]) + window + 1
    return step, f"the training loss rose from {least:.3f} to {float(smoothed[-1]):.3f}"


def _cause(run: Run, step: int) -> str:
    """The last event in the steps up to ``step`` that may explain what happened there."""
    told = [e for e in run.events if e.get("reason") and isinstance(e.get("step"), int)]
    near = [e for e in told if step - EVENTS_BEFORE <= e["step"] <= step + 1]
    if not near:
        return ", with no event before it"
    event = max(near, key=lambda e: (e["step"] <= step, e["step"]))
    layer = f" in {event['layer']}" if event.get("layer") else ""
    return f" (step {event['step']}: {event['reason']}{layer})"


def diverged(found: Sequence[tuple[int | None, Divergence]], seeds: int) -> Verdict:
    """The verdict on a variant of which these (seed, divergence) came off, out of ``seeds``."""
    seed, first = min(found, key=lambda pair: pair[1].step)
    which = f"seed {seed}" if len(found) == 1 else f"{len(found)} of {seeds} seeds, the first {seed}"
    return Verdict(Kind.diverged, f"diverged at step {first.step} because {first.text}", f"{which}")

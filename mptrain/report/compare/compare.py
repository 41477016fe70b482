"""Comparison of run folders: match, pair by seed, measure differences, judge.

All differences are relative to the baseline's run of the same seed, which saw the same batches from the same
weights, so that common effects (an easy or a hard batch) cancel out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from mptrain.report.compare import aggregates
from mptrain.report.compare.comparison import Comparison, Curve, Group, Interval, Kind, Loss, RunRow, Verdict
from mptrain.report.compare.intervals import first_lasting, paired, prediction_half_width, smooth, welch
from mptrain.report.compare.matching import Matched, MatchedGroup, difference, group_labels, groups_of, labels
from mptrain.report.compare.seeds import Planned, planned
from mptrain.report.compare.verdict import Divergence, diverged, divergence, judge, rules
from mptrain.runs.read import Floats, Run, Status, expand, read

MARGIN_FRAC = 0.005  # relative to the loss; DeepSeek-V3 reports 0.25 % between FP8 and BF16
POINTS = 240  # of a drawn curve: one per 1.5 pixels
WINDOWS = 50  # curves are averaged over a 50th of training


class NothingToCompare(ValueError):
    """No two runs are comparable; the message says why."""


def compare(paths: Sequence[Path], baseline: Path | None = None, margin: float = MARGIN_FRAC) -> Comparison:
    """Compare the runs at ``paths`` (run folders, or folders of them).

    ``baseline``: one run of the variant to compare with (default: FP32). Raises ValueError
    (:class:`NothingToCompare`) if there is nothing to compare.
    """
    folders = expand([*paths, *([baseline] if baseline else [])])
    runs = [read(folder) for folder in folders]
    groups = groups_of(runs)
    if not groups:
        raise NothingToCompare("; ".join(f"{run.folder}: {run.why}" for run in runs) or "no runs to compare")
    chosen = _chosen(groups, baseline)
    groups.sort(key=lambda group: all(variant.key != chosen for variant in group.variants))  # without a baseline: last
    _require_two(groups, chosen)
    names = labels(groups)
    compared = [
        _group(group, label, chosen, names, margin) for group, label in zip(groups, group_labels(groups), strict=True)
    ]
    notes = _notes(runs, groups, compared)
    metric = compared[0].metric
    last = max(_planned(group).last for group in groups)
    return Comparison(_title(paths), margin, compared, rules(margin, metric, last), notes)


def _title(paths: Sequence[Path]) -> str:
    return paths[0].resolve().name if len(paths) == 1 else f"{len(paths)} runs"


def _chosen(groups: list[MatchedGroup], baseline: Path | None) -> str | None:
    """Return the key of the baseline's variant; None if there is none."""
    variants = [variant for group in groups for variant in group.variants]
    if baseline is None:
        stored = {variant.key for variant in variants if variant.stored_fp32}
        alone = stored.pop() if len(stored) == 1 else None  # an ablation of weight storage, all in BF16
        return next((variant.key for variant in variants if variant.is_fp32), alone)
    for variant in variants:
        if any(run.folder.resolve() == baseline.resolve() for run in variant.runs):
            return variant.key
    raise NothingToCompare(f"baseline {baseline} has no settings that can be read: give the folder of a run")


def _require_two(groups: list[MatchedGroup], chosen: str | None) -> None:
    """Raise NothingToCompare for several groups without the baseline and another variant together in any of them."""
    together = any(len(g.variants) > 1 and any(v.key == chosen for v in g.variants) for g in groups)
    if together or len(groups) == 1:
        return
    ours, theirs = groups[1], groups[0]
    first, second = theirs.variants[0].runs[0], ours.variants[0].runs[0]
    raise NothingToCompare(
        f"{second.folder} and {first.folder} cannot be compared, they differ by more than precision: "
        f"{difference(ours, theirs)}"
    )


@dataclass(frozen=True)
class Side:
    """The finished runs of one variant that count, one per seed, and their curves; ``plan``: the seeds of their
    sweep."""

    runs: dict[int, Run]
    window: int
    plan: Planned

    @cached_property
    def curves(self) -> dict[int, Floats]:
        return {seed: smooth(run.curve(), self.window) for seed, run in self.runs.items()}

    @cached_property
    def astray(self) -> dict[int, Divergence]:
        """Seed -> where its run diverged, for those that did."""
        return {seed: where for seed, run in self.runs.items() if (where := divergence(run)) is not None}

    @property
    def sound(self) -> list[int]:
        """The seeds that did not diverge."""
        return [seed for seed in self.runs if seed not in self.astray]

    def values(self, figure: str) -> dict[int, float]:
        """Map seeds to a finite figure of the summary (``train``: mean loss of the last tenth)."""
        read = last_tenth if figure == "train" else lambda run: run.figure(figure)
        return {seed: value for seed, run in self.runs.items() if math.isfinite(value := read(run))}

    def mean(self, figure: str) -> float | None:
        values = self.values(figure)
        return float(np.mean(list(values.values()))) if values and len(values) == len(self.runs) else None


def _planned(matched: MatchedGroup) -> Planned:
    return planned(run.folder for variant in matched.variants for run in variant.runs)


def last_tenth(run: Run) -> float:
    """Return the mean training loss (nats) over the last tenth of the steps, NaN if one of them is not known."""
    curve = run.curve()
    return float(np.mean(curve[-max(1, len(curve) // 10) :])) if len(curve) else math.nan


def _group(matched: MatchedGroup, label: str, chosen: str | None, names: dict[str, str], margin: float) -> Group:
    steps = int(matched.settings["trainer.max_steps"])
    window = max(1, steps // WINDOWS)
    ordered = sorted(matched.variants, key=lambda v: v.key != chosen)
    base = ordered[0] if ordered[0].key == chosen else None
    plan = _planned(matched)
    base_side, base_rows = _side(base, None, window, plan) if base else (Side({}, window, plan), [])
    metric = _metric([run for variant in ordered for run in variant.runs])
    variants = []
    for matched_variant in ordered:
        if matched_variant is base:
            side, rows, loss = base_side, base_rows, _levels(base_side, base_side)
            verdict = Verdict(Kind.baseline, "baseline", _baseline_why(side))
        else:
            side, rows = _side(matched_variant, base_side, window, plan)
            loss = _loss(side, base_side)
            verdict = _verdict(side, base_side, loss, metric, margin, base is not None)
        variant = aggregates.variant(matched_variant, names[matched_variant.key], side.runs, base_side.runs)
        curve, apart = _curve(side), _difference(side, base_side)
        variants.append(replace(variant, verdict=verdict, loss=loss, runs=rows, curve=curve, difference=apart))
    band, noise = _band(base_side)
    any_run = ordered[0].runs[0]
    task, unit = aggregates.task(any_run, matched.settings), aggregates.unit(ordered)
    return Group(label, task, metric, unit, names[base.key] if base else None, variants, band, noise, window)


def _metric(runs: Sequence[Run]) -> str:
    finished = [run for run in runs if run.status is Status.finished]
    if any(math.isfinite(run.figure("val_top1_frac")) for run in finished):
        return "top-1"
    if any("val_loss" in run.summary for run in finished) or not finished:
        return "validation loss"
    return "training loss"


def _side(variant: Matched, base: Side | None, window: int, plan: Planned) -> tuple[Side, list[RunRow]]:
    """Return the runs that count (of each seed the last finished one), and a row for each run, with why it does not."""
    counting: dict[int, Run] = {}
    reasons: dict[Path, str] = {}
    for run in sorted(variant.runs, key=lambda run: str(run.summary.get("ended", ""))):
        if run.status is not Status.finished or run.seed is None:
            reasons[run.folder] = run.why
            continue
        foreign = run.mixed or plan.uncounted(run.seed) or (_foreign(run, base.runs.get(run.seed)) if base else "")
        if foreign:
            reasons[run.folder] = foreign
            continue
        if run.seed in counting:
            reasons[counting[run.seed].folder] = f"repeated by {run.name}, which counts"
        counting[run.seed] = run
    return Side(counting, window, plan), [aggregates.row(run, reasons.get(run.folder, "")) for run in variant.runs]


def _foreign(run: Run, base: Run | None) -> str:
    """Return why this run's initial weights differ from the baseline's despite equal seed and settings."""
    if base is None or run.about.get("initial_weights") == base.about.get("initial_weights"):
        return ""
    ours, theirs = run.about.get("torch"), base.about.get("torch")
    torch = f" (torch {ours} here, {theirs} there)" if ours != theirs else ""
    return f"excluded: initial weights differ from {base.name}, the baseline run with this seed{torch}"


def _levels(side: Side, base: Side) -> Loss:
    """Return the losses of a variant, without differences."""
    tokens, ratio = _tokens(side, base)
    return Loss(
        val=side.mean("val_loss"),
        train=side.mean("train"),
        masters=side.mean("val_loss_masters"),
        top1_frac=side.mean("val_top1_frac"),
        tokens_to_baseline=tokens,
        tokens_ratio=ratio,
    )


def _loss(side: Side, base: Side) -> Loss:
    """Return the losses of a variant and their differences from the baseline's; no difference if any seed diverged."""
    levels = _levels(side, base)
    if side.astray or not base.runs:
        return levels
    return replace(
        levels,
        val_delta=_delta(side, base, "val_loss"),
        train_delta=_delta(side, base, "train"),
        top1_delta=_delta(side, base, "val_top1_frac", relative=False),
        outside_step=_outside(side, base),
    )


def _delta(side: Side, base: Side, figure: str, *, relative: bool = True) -> Interval | None:
    ours, theirs = side.values(figure), base.values(figure)
    plan = base.plan
    shared = plan.counted(ours.keys() & theirs.keys() - base.astray.keys())
    if plan.last or ours.keys() & theirs.keys():  # several looks exist for pairs only
        return paired([(ours[s] - theirs[s]) / (theirs[s] if relative else 1.0) for s in shared], plan.last)
    sound = [value for seed, value in theirs.items() if seed not in base.astray]
    interval = welch(list(ours.values()), sound)
    if interval is None or not relative:
        return interval
    level = float(np.mean(sound))
    values = (interval.mean, interval.low, interval.high, *interval.spreads)
    mean, low, high, *spreads = (value / level for value in values)
    return replace(interval, mean=mean, low=low, high=high, spreads=tuple(spreads))


def _verdict(side: Side, base: Side, loss: Loss, metric: str, margin: float, has_base: bool) -> Verdict:
    if not has_base:
        what = "no baseline: add runs with precision=fp32 and the same settings, or name one with --baseline RUN"
        return Verdict(Kind.none, what)
    if not side.runs:
        return Verdict(Kind.none, "no finished run")
    if not base.runs:
        return Verdict(Kind.none, "the baseline has no finished run")
    if base.astray.keys() == base.runs.keys():
        return Verdict(Kind.none, f"the baseline itself diverged at step {min(d.step for d in base.astray.values())}")
    alone = [(seed, where) for seed, where in side.astray.items() if seed not in base.astray]
    if alone:
        return diverged(alone, len(side.runs))
    steps, seeds, last = next(iter(side.runs.values())).max_steps or 0, len(side.runs), base.plan.last
    if metric == "top-1":
        return judge(loss.top1_delta, margin, steps=steps, seeds=seeds, points=True, last=last)
    delta = loss.val_delta if metric == "validation loss" else loss.train_delta
    return judge(delta, margin, steps=steps, seeds=seeds, last=last)


def _baseline_why(side: Side) -> str:
    if side.astray:
        return "; ".join(f"seed {s} diverged at step {d.step}: {d.text}" for s, d in sorted(side.astray.items()))
    return f"{len(side.runs)} seed{'s' if len(side.runs) != 1 else ''}"


def _stack(side: Side, seeds: Sequence[int] | None = None) -> Floats:
    chosen = sorted(side.runs if seeds is None else seeds)
    return np.stack([side.curves[seed] for seed in chosen])


def _curve(side: Side) -> Curve | None:
    if not side.runs:
        return None
    stacked = _stack(side)
    with np.errstate(invalid="ignore"):
        return _thinned(stacked.mean(0), stacked.min(0), stacked.max(0))


def _difference(side: Side, base: Side) -> Curve | None:
    shared = sorted(side.runs.keys() & base.runs.keys())
    if side is base or not shared:
        return None
    theirs = _stack(base, shared)
    with np.errstate(invalid="ignore", divide="ignore"):
        relative = (_stack(side, shared) - theirs) / theirs
        return _thinned(relative.mean(0), relative.min(0), relative.max(0))


def _half_band(base: Side) -> Floats | None:
    return prediction_half_width(_stack(base, base.sound), base.window) if len(base.sound) > 1 else None


def _band(base: Side) -> tuple[Curve | None, Curve | None]:
    half = _half_band(base)
    if half is None:
        return None, None
    mean = _stack(base, base.sound).mean(0)
    part = half / mean
    return _thinned(mean, mean - half, mean + half), _thinned(np.zeros_like(part), -part, part)


def _outside(side: Side, base: Side) -> int | None:
    """Return the first of ``window`` steps in a row at which the mean curve is outside the baseline's band."""
    half = _half_band(base)
    if half is None or not side.runs:
        return None
    away = np.abs(_stack(side).mean(0) - _stack(base, base.sound).mean(0)) > half
    index = first_lasting(away, base.window)
    return None if index is None else index + 1


def _tokens(side: Side, base: Side) -> tuple[int | None, float | None]:
    """Return the tokens to the baseline's final training loss, and their ratio to those of the baseline."""
    target = base.mean("train")
    if target is None or not side.runs:
        return None, None
    ours, theirs = (_reached(_stack(each).mean(0), target) for each in (side, base))
    per_step = next(iter(side.runs.values())).about.get("tokens_per_step")
    if ours is None or theirs is None or not isinstance(per_step, int):
        return None, None
    return ours * per_step, ours / theirs


def _reached(curve: Floats, target: float) -> int | None:
    with np.errstate(invalid="ignore"):
        indices = np.flatnonzero(curve <= target)
    return int(indices[0]) + 1 if len(indices) else None


def _thinned(values: Floats, low: Floats, high: Floats) -> Curve:
    """Choose at most ``POINTS`` of the steps, including the last."""
    stride = max(1, math.ceil(len(values) / POINTS))
    indices = np.arange(len(values) - 1, -1, -stride)[::-1]
    return Curve(*((indices + 1).tolist(), values[indices].tolist(), low[indices].tolist(), high[indices].tolist()))


def _notes(runs: Sequence[Run], groups: list[MatchedGroup], compared: list[Group]) -> list[str]:
    notes = [f"{run.folder}: {run.why}" for run in runs if not run.config]
    notes += [f"{run.folder} counts nowhere, {run.mixed}" for run in runs if run.mixed]
    based = next((group for group, one in zip(groups, compared, strict=True) if one.baseline), None)
    for group, one in zip(groups, compared, strict=True):
        if one.baseline is None and based is not None:
            notes.append(f"{one.label}: no baseline ran with these settings ({difference(group, based)})")
    return notes

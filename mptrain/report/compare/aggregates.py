"""Speed, memory and health of a variant, from the summaries and events of its runs."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from mptrain.report.compare.comparison import Curve, Health, Kind, Memory, RunRow, Speed, Variant, Verdict
from mptrain.report.compare.matching import Matched
from mptrain.runs.read import Run
from mptrain.telemetry.peaks import weighted_rate
from mptrain.tools.files import number

MOST_EVENTS = 200


def variant(matched: Matched, label: str, runs: Mapping[int, Run], base: Mapping[int, Run]) -> Variant:
    """Return everything but losses, curves and the verdict of a variant; ``runs``: those that count, by seed."""
    any_run = next(iter(runs.values()), matched.runs[0])
    emulated = bool(any_run.about.get("emulated"))
    return Variant(
        label,
        Verdict(Kind.none, ""),
        backend=str(any_run.about.get("backend", "")),
        emulated=emulated,
        speed=speed(runs, base, emulated=emulated),
        memory=memory(runs, base),
        health=health(runs),
    )


def speed(runs: Mapping[int, Run], base: Mapping[int, Run], *, emulated: bool) -> Speed:
    """Compare speeds of runs of the same seed on the same machine; an emulated precision has no ratio."""
    rates = _figures(runs, "tokens_per_s")
    if not rates:
        return Speed()
    middle = statistics.median(rates)
    if emulated:
        return Speed(middle, note="emulated: no unit for this precision here, its speed is not meaningful")
    shared = sorted(runs.keys() & base.keys())
    alike = [seed for seed in shared if _place(runs[seed]) == _place(base[seed])]
    if not alike:
        return Speed(middle, note="the baseline ran on another machine" if shared else "")
    ratios = [runs[s].figure("tokens_per_s") / base[s].figure("tokens_per_s") for s in alike]
    ratios = [ratio for ratio in ratios if math.isfinite(ratio)]
    if not ratios:
        return Speed(middle)
    ratio = statistics.median(ratios)
    limit = _limit(runs[alike[0]], base[alike[0]])
    reached = max(0.0, (1 - 1 / ratio) / (1 - 1 / limit)) if limit is not None and limit > 1 else None
    mfus = _figures(runs, "mfu_frac")
    mfu = statistics.median(mfus) if mfus else None
    note = "measured while other runs were in progress" if _overlapping([*runs.values(), *base.values()]) else ""
    return Speed(middle, ratio, min(ratios), max(ratios), mfu, limit, reached, note)


def _place(run: Run) -> tuple[Any, ...]:
    if run.elsewhere:  # comparable with no other run
        return (run.folder,)
    return run.about.get("host"), run.about.get("machine"), run.about.get("torch")


def _limit(run: Run, base: Run) -> float | None:
    """Return Amdahl's limit: the speed-up if only the GEMMs ran as fast as the formats of this run allow.

    Both GEMM times are FLOPs over the rate of the format (a GPU's peak; on a CPU the rate of one large product).
    """
    rates = {**base.about.get("gemm_tflops", {}), **run.about.get("gemm_tflops", {})}
    ours = weighted_rate(rates, run.summary.get("gemm_coverage", {}))
    theirs = weighted_rate(rates, base.summary.get("gemm_coverage", {}))
    flops = number(base.about.get("flops_per_token"))
    step_s = 1 / base.figure("tokens_per_s")  # seconds per token
    if ours is None or theirs is None or not math.isfinite(flops * step_s):
        return None
    in_gemms = min(step_s, flops / (theirs * 1e12))
    return step_s / (step_s - in_gemms * (1 - theirs / ours))


def _overlapping(runs: Iterable[Run]) -> bool:
    """Return whether two of the runs were at work at the same time on one host."""
    spans: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for run in {run.folder: run for run in runs}.values():
        if run.about.get("started") and run.summary.get("ended"):
            spans[str(run.about.get("host"))].append((run.about["started"], run.summary["ended"]))
    return any(later[0] < earlier[1] for host in spans.values() for earlier, later in pairwise(sorted(host)))


def memory(runs: Mapping[int, Run], base: Mapping[int, Run]) -> Memory:
    """Return the medians; the ratio only of peaks measured in the same way."""
    peaks, theirs = (_figures(side, "peak_memory_gib") for side in (runs, base))
    if not peaks:
        return Memory()
    peak = statistics.median(peaks)
    machines = {str(run.about.get("machine")) for run in [*runs.values(), *base.values()]}
    ratio = peak / statistics.median(theirs) if theirs and len(machines) == 1 else None
    return Memory(peak, ratio, _shares(runs, "memory_gib"))


def health(runs: Mapping[int, Run]) -> Health:
    """Aggregate over the seeds: counts are sums, shares are means."""
    overflow = [count for run in runs.values() if (count := run.summary.get("overflow_events")) is not None]
    underflow = _figures(runs, "underflow_frac")
    events = _events(runs)
    scales = next((run.scales for run in runs.values() if run.scales), {})
    steps = sorted(scales)
    return Health(
        overflow_events=sum(overflow) if overflow else None,
        underflow_frac=statistics.fmean(underflow) if underflow else None,
        skipped_steps=sum(int(run.summary.get("skipped_steps") or 0) for run in runs.values()),
        layers=_layers(runs.values()),
        events=events[:MOST_EVENTS],
        more_events=max(0, len(events) - MOST_EVENTS),
        scale=Curve(steps, [scales[step] for step in steps]) if steps else None,
        coverage=_shares(runs, "gemm_coverage"),
    )


def _figures(runs: Mapping[int, Run], name: str) -> list[float]:
    """Return the finite figures of this name in the runs' summaries."""
    return [value for run in runs.values() if math.isfinite(value := run.figure(name))]


def _shares(runs: Mapping[int, Run], name: str) -> dict[str, float]:
    """Return a mapping in the summary of the first run that has it."""
    return dict(next((run.summary[name] for run in runs.values() if run.summary.get(name)), {}))


def _events(runs: Mapping[int, Run]) -> list[dict[str, Any]]:
    columns = ("step", "event", "reason", "layer", "scale")
    rows = [
        {"seed": seed, **{name: event.get(name) for name in columns}}
        for seed, run in runs.items()
        for event in run.events
    ]
    return sorted((row for row in rows if isinstance(row["step"], int)), key=lambda row: row["step"])


def _layers(runs: Iterable[Run]) -> list[dict[str, Any]]:
    by_place: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for run in runs:
        for row in run.summary.get("layers", []):
            by_place[row["layer"], row["role"]].append(row)
    return [
        {
            "layer": layer,
            "role": role,
            "overflow_events": sum(row["overflow_events"] for row in rows),
            "underflow_frac": statistics.fmean(row["underflow_frac"] for row in rows),
        }
        for (layer, role), rows in by_place.items()
    ]


def row(run: Run, why: str) -> RunRow:
    """Return one row of the table of runs."""

    def known(name: str) -> float | None:
        return value if math.isfinite(value := run.figure(name)) else None

    return RunRow(
        run.name,
        str(run.folder),
        run.seed,
        run.status,
        run.steps,
        run.max_steps,
        why,
        train_loss=known("train_loss"),
        val_loss=known("val_loss"),
        top1_frac=known("val_top1_frac"),
        tokens_per_s=known("tokens_per_s"),
        peak_memory_gib=known("peak_memory_gib"),
        skipped_steps=run.summary.get("skipped_steps"),
    )


def task(run: Run, settings: Mapping[str, Any]) -> str:
    """Describe what the runs of a group do: ``gpt, 3.3 M parameters, stdlib, 300 steps of 1,024 tokens``."""
    parts = [str(settings.get("model.kind"))]
    about = run.about
    if "parameters" in about:
        parts.append(f"{about['parameters'] / 1e6:.1f} M parameters")
    parts.append(str(about.get("corpus_name", run.config["data"].get("kind"))))
    size = f" of {about['tokens_per_step']:,} {about.get('unit', 'tokens')}" if "tokens_per_step" in about else ""
    parts.append(f"{settings['trainer.max_steps']} steps{size}")
    return ", ".join(parts)


def unit(variants: Sequence[Matched]) -> str:
    return next((str(run.about["unit"]) for v in variants for run in v.runs if "unit" in run.about), "tokens")

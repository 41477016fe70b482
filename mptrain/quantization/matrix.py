"""Training precision x deployment format: each run's model in each format, vs. itself in FP32 and vs. FP32 throughout.

All cells see the same validation samples. Within a run a difference is paired by sample; where a precision has
several runs (seeds), each gives one number, and the interval is over the runs, paired by seed: it covers the
variation of another training, unlike one over samples.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mptrain.data import Dataset
from mptrain.quantization.apply import quantize_model
from mptrain.quantization.evaluate import Batch, evaluate, logits_of, loss_delta, top1_delta
from mptrain.quantization.methods import named
from mptrain.quantization.report import Report
from mptrain.quantization.source import open_source
from mptrain.report.compare.comparison import Interval
from mptrain.report.compare.intervals import mean_of, perplexity
from mptrain.report.deploy.matrix import Deployed, Evaluation, Matrix
from mptrain.runs.read import expand, settings_in

ORDER = ("fp32", "tf32", "bf16", "fp16", "fp8")  # of training precisions; their variants follow them
FORMATS = ("fp32", "bf16", "int8", "int4", "fp8")
BATCHES = 32
SAMPLES = {"tokens": 8, "images": 64}  # samples per batch
REPEATS = 5  # timed forwards
REMEMBERED = 1 << 30  # bytes of the FP32 model's logits to cache, for comparison with every format
OVER_SEEDS = "t over seeds"
CPU_SPEED = "On a CPU torchao's kernels expand most formats before they multiply: a ratio below 1 is the cost of that."
Say = Callable[[str], None]


@dataclass(frozen=True)
class TrainedRun:
    """A run: its training precision and its seed."""

    folder: Path
    precision: str
    seed: int


@dataclass(frozen=True)
class Figure:
    """The figures of one run in one format."""

    seed: int
    evaluation: Evaluation
    report: Report


@dataclass
class Results:
    """(trained, deployed) -> a figure for each run; or why there is none."""

    figures: dict[tuple[str, str], list[Figure]] = field(default_factory=dict)
    why: dict[tuple[str, str], str] = field(default_factory=dict)
    fingerprint: str = ""
    left_out: list[str] = field(default_factory=list)


def deploy(
    paths: Sequence[Path],
    to: Sequence[str] = FORMATS,
    *,
    batches: int = BATCHES,
    repeats: int = REPEATS,
    group_size: int | None = None,
    keep: str = "",
    device: torch.device | None = None,
    say: Say = lambda text: None,
) -> Matrix:
    """Return the matrix of the runs at ``paths`` (run folders, or folders of them) in the formats ``to``, FP32
    included.

    ``group_size``, ``keep``: as :func:`quantize_model` takes them, where the method has groups. The cell of an
    impossible format holds the reason. ValueError if the runs are not of one model and data.
    """
    formats = list(dict.fromkeys(("fp32", *to)))
    calibrated = [name for name in formats if named(name).calibrated]
    if calibrated:
        raise ValueError(f"{calibrated[0]} must see activations first, which is not done here: leave it out of --to")
    results, chosen, runs = Results(), list[Batch](), list[TrainedRun]()
    for run in trained_at(paths):
        try:
            source = open_source(run.folder)
        except ValueError as error:  # a run of the sweep that is still in progress
            results.left_out.append(f"left out: {error}")
            continue
        data = source.dataset()
        if results.fingerprint not in ("", data.fingerprint):
            raise ValueError(f"{run.folder} was trained on other data than {runs[0].folder}: compare them separately")
        results.fingerprint, chosen = data.fingerprint, validation_batches(data, batches)
        runs.append(run)
        model = source.model.to(device or torch.device("cpu"))
        for name, figure in _formats_of(run, model, formats, chosen, repeats, group_size, keep, say):
            if isinstance(figure, str):
                results.why[run.precision, name] = figure
            else:
                results.figures.setdefault((run.precision, name), []).append(figure)
    if not runs:
        raise ValueError(results.left_out[0].removeprefix("left out: "))
    return _matrix(paths, results, formats, runs, chosen)


def trained_at(paths: Sequence[Path]) -> list[TrainedRun]:
    """Return the runs, FP32 first. ValueError if one has no settings, or two are alike in precision and seed."""
    runs: dict[tuple[str, int], TrainedRun] = {}
    first: tuple[Path, dict[str, Any]] | None = None
    for folder in expand(paths):
        settings = settings_in(folder)
        if not settings:
            raise ValueError(f"{folder}/config.json has no run settings: name other runs")
        same = {name: settings[name] for name in ("model", "data")}
        first = first or (folder, same)
        if first[1] != same:
            raise ValueError(f"{folder} and {first[0]} are of different models or data: one matrix holds one of each")
        run = TrainedRun(folder, str(settings["precision"]["name"]), int(settings["seed"]))
        other = runs.setdefault((run.precision, run.seed), run)
        if other is not run:
            raise ValueError(
                f"{other.folder} and {folder} are both {run.precision} with seed={run.seed}: name the runs to deploy"
            )
    return sorted(runs.values(), key=lambda run: [run.precision.startswith(name) for name in ORDER], reverse=True)


def validation_batches(data: Dataset, batches: int) -> list[Batch]:
    """Return evenly spaced validation samples in at most ``batches`` batches, the last smaller where the data ends."""
    if batches < 1:
        raise ValueError(f"--batches {batches} leaves no validation data: use at least 1, e.g. {BATCHES}")
    available = data.validation_samples
    size = SAMPLES[data.unit]
    count = min(batches * size, available)
    samples = [i * available // count for i in range(count)]
    return [data.validation_at(samples[first : first + size]) for first in range(0, count, size)]


def _formats_of(
    run: TrainedRun,
    reference: nn.Module,
    formats: Sequence[str],
    batches: Sequence[Batch],
    repeats: int,
    group_size: int | None,
    keep: str,
    say: Say,
) -> list[tuple[str, Figure | str]]:
    """Evaluate the model of one run in each format; a text explains where that is impossible."""
    remembered = CachedLogits(reference, batches)
    deployed: list[tuple[str, Figure | str]] = []
    for name in formats:
        say(f"{run.folder.name}: {name}")
        model, method = copy.deepcopy(reference), named(name)
        try:
            report = quantize_model(
                model,
                method,
                group_size=group_size if method.grouped else None,
                keep="" if method.cast else keep,
            )
        except ValueError as error:
            deployed.append((name, str(error)))
            continue
        weights = {layer.name: layer.sqnr_db for layer in report.quantized if layer.sqnr_db is not None}
        timed = 0 if name == "fp32" else repeats
        evaluation = evaluate(model, reference, batches, repeats=timed, weights_db=weights, reference_logits=remembered)
        deployed.append((name, Figure(run.seed, evaluation, report)))
    return deployed


class CachedLogits:
    """The reference's logits of batch i, kept for the next format as long as they fit."""

    def __init__(self, reference: nn.Module, batches: Sequence[Batch]) -> None:
        self._reference, self._batches = reference, batches
        self._known: dict[int, Tensor] = {}

    def __call__(self, index: int) -> Tensor:
        if index in self._known:
            return self._known[index]
        with torch.no_grad():
            logits = logits_of(self._reference, self._batches[index])
        if sum(tensor.nbytes for tensor in self._known.values()) + logits.nbytes <= REMEMBERED:
            self._known[index] = logits
        return logits


def _matrix(
    paths: Sequence[Path],
    results: Results,
    formats: Sequence[str],
    runs: Sequence[TrainedRun],
    batches: Sequence[Batch],
) -> Matrix:
    trained = list(dict.fromkeys(run.precision for run in runs))
    base = results.figures.get(("fp32", "fp32"), [])
    cells = [_cell(results, name, other, base) for name in trained for other in formats]
    some = next(iter(results.figures.values()))[0].evaluation
    notes = [] if base else ["No run was trained in FP32: each is compared with itself alone."]
    timed = any(cell.speed_ratio is not None for cell in cells)
    notes += [*([CPU_SPEED] if some.device == "cpu" and timed else []), *results.left_out]
    title = paths[0].resolve().name if len(paths) == 1 else f"{len(runs)} runs"
    metric = "perplexity" if some.unit == "tokens" else "top-1"
    size = len(next(iter(batches[0].values())))
    return Matrix(title, metric, some.unit, some.samples, size, some.machine, cells, notes, some.device)


def _cell(results: Results, trained: str, deployed: str, base: Sequence[Figure]) -> Deployed:
    figures = results.figures.get((trained, deployed), [])
    if not figures:
        return Deployed(trained, deployed, why=results.why[trained, deployed])
    own = results.figures[trained, "fp32"]
    first = figures[0]
    worst = next(iter(first.evaluation.layers), None)
    speeds = [figure.evaluation.latencies[-1] for figure in figures if figure.evaluation.latencies]
    ratios = [speed.speed_ratio for speed in speeds]
    ends = [(s.low, s.high) for s in speeds] if len(speeds) == 1 else [(min(ratios, default=0), max(ratios, default=0))]
    return Deployed(
        trained,
        deployed,
        runs=len(figures),
        metric=_metric(figures),
        own_delta=None if deployed == "fp32" else _delta(figures, own),
        base_delta=None if not base or trained == deployed == "fp32" else _delta(figures, base),
        kl_nats=statistics.fmean(figure.evaluation.kl_nats.mean for figure in figures),
        same_frac=statistics.fmean(figure.evaluation.same_frac for figure in figures),
        mib=first.report.bytes / 2**20,
        size_frac=first.report.frac,
        layers=0 if named(deployed).cast else len(first.report.quantized),
        worst_layer=worst.layer if worst else "",
        worst_db=worst.own_db if worst else None,
        speed_ratio=statistics.median(ratios) if ratios else None,
        speed_low=ends[0][0] if ratios else None,
        speed_high=ends[0][1] if ratios else None,
        why=results.why.get((trained, deployed), ""),
    )


def _metric(figures: Sequence[Figure]) -> Interval:
    """Return perplexity or accuracy, over the runs; of a single one over its samples."""
    only = figures[0].evaluation
    if only.unit == "images":
        assert only.top1 is not None
        return only.top1 if len(figures) == 1 else mean_of(list(_means(figures).values()), OVER_SEEDS, seeds=True)
    return perplexity(
        only.loss if len(figures) == 1 else mean_of(list(_means(figures).values()), OVER_SEEDS, seeds=True)
    )


def _delta(figures: Sequence[Figure], others: Sequence[Figure]) -> Interval | None:
    """Return the mean difference of the runs paired by seed with ``others``; None without a pair.

    The perplexity's is relative.
    """
    theirs = {figure.seed: figure.evaluation for figure in others}
    pairs = [(figure.evaluation, theirs[figure.seed]) for figure in figures if figure.seed in theirs]
    if not pairs:
        return None
    images = pairs[0][0].unit == "images"
    if len(pairs) == 1:
        ours, other = pairs[0]
        delta = top1_delta(ours.hits, other.hits) if images else loss_delta(ours.losses, other.losses)
    else:
        changes = [_mean(ours) - _mean(other) for ours, other in pairs]
        delta = mean_of(changes, f"paired {OVER_SEEDS}", seeds=True)
        if images and len(set(changes)) == 1:  # no spread between runs: use the images of all runs
            hits = [[hit for evaluation in side for hit in evaluation.hits] for side in zip(*pairs, strict=True)]
            delta = top1_delta(*hits)
    if images:
        return delta
    ratio = perplexity(delta)
    return Interval(ratio.mean - 1, ratio.low - 1, ratio.high - 1, ratio.n, ratio.method)


def _means(figures: Sequence[Figure]) -> dict[int, float]:
    return {figure.seed: _mean(figure.evaluation) for figure in figures}


def _mean(evaluation: Evaluation) -> float:
    """Return the accuracy of one run, or its loss in nats."""
    return statistics.fmean(evaluation.hits) if evaluation.unit == "images" else evaluation.loss.mean

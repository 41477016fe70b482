"""Evaluation of a quantized model against its original: loss, agreement, speed, and the error of each layer.

Both see the same validation samples, so every difference is paired: what makes a sample hard cancels out, and the
interval of the difference is some ten times narrower than that of either loss. Intervals over samples are
Student's t on the samples' mean losses: there are dozens to thousands of them, of equal length, evenly spaced
over the split; a bootstrap of as many gives the same ends and costs more. They cover other samples of this split,
but not the similarity of samples from one document. Accuracies have exact intervals (Clopper-Pearson), their
paired difference Agresti and Min's.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mptrain.report.compare.comparison import Interval
from mptrain.report.compare.intervals import mean_of, paired_proportions, proportion
from mptrain.report.deploy.matrix import Evaluation, Latency, LayerError
from mptrain.tools.machine import describe

ANSWERS = ("targets", "labels")  # keys of a batch; without them a model returns logits
AT_A_TIME = 1 << 22  # logits converted to float64 probabilities at a time: 32 MiB
OVER_SAMPLES, PAIRED = "t over samples", "paired t over samples"
Batch = Mapping[str, Tensor]


def evaluate(
    model: nn.Module,
    reference: nn.Module,
    batches: Iterable[Batch],
    *,
    repeats: int = 5,
    weights_db: Mapping[str, float] | None = None,
    reference_logits: Callable[[int], Tensor] | None = None,
) -> Evaluation:
    """Compare ``model`` with ``reference`` on validation ``batches`` with their ``targets`` or ``labels``.

    ``repeats``: timed forwards of each at one sample and at the batch, 0 for no latencies and no layers.
    ``weights_db``: SQNR of weights by layer, where known. ``reference_logits``: a cache of :func:`logits_of` for
    the reference and batch i. ValueError without a batch.
    """
    chosen = list(batches)
    if not chosen:
        raise ValueError("no validation batch to evaluate on: ask for at least one, --batches 1")
    model.eval()
    reference.eval()
    scores = Scores()
    with torch.no_grad():
        for index, batch in enumerate(chosen):
            theirs = reference_logits(index) if reference_logits else logits_of(reference, batch)
            scores.add(logits_of(model, batch), theirs, answer_of(batch))
        parts = sizes_to_time(chosen[0]) if repeats else []
        latencies = [latency(model, reference, part, repeats) for part in parts]
        layers = layer_errors(model, reference, chosen[0], weights_db or {}) if repeats else []
    return scores.evaluation(device_of(model), latencies, layers)


def logits_of(model: nn.Module, batch: Batch) -> Tensor:
    """Return [samples, predictions, choices]; a model that classifies makes one prediction a sample."""
    output = model(**inputs_of(model, batch))
    logits: Tensor = getattr(output, "logits", output)  # transformers wraps them
    return logits if logits.ndim == 3 else logits.unsqueeze(1)


def inputs_of(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Return the keyword arguments of a batch, on the model's device."""
    device = device_of(model)
    return {name: tensor.to(device) for name, tensor in batch.items() if name not in ANSWERS}


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def answer_of(batch: Batch) -> Tensor:
    """Return the right answers: int64 [samples] for images, [samples, predictions] for tokens."""
    return next(batch[name] for name in ANSWERS if name in batch)


@dataclass
class Scores:
    """Figures of each sample so far, in float64: means over its predictions."""

    losses: list[float] = field(default_factory=list)
    reference_losses: list[float] = field(default_factory=list)
    hits: list[float] = field(default_factory=list)
    reference_hits: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    same: list[float] = field(default_factory=list)
    worst: float = 0.0
    predictions: int = 0
    images: bool = False

    def add(self, logits: Tensor, theirs: Tensor, answers: Tensor) -> None:
        """Add the figures of logits [samples, predictions, choices]; ``theirs``: the reference's."""
        self.images = answers.ndim == 1
        answers = answers.to(logits.device).reshape(logits.shape[:2])
        size = max(1, AT_A_TIME // math.prod(logits.shape[1:]))
        for begin in range(0, len(logits), size):
            part = slice(begin, begin + size)
            self._add(logits[part], theirs[part].to(logits.device), answers[part])
        self.predictions += answers.numel()

    def _add(self, logits: Tensor, theirs: Tensor, answers: Tensor) -> None:
        ours, other = (F.log_softmax(x.double(), dim=-1) for x in (logits, theirs))
        losses, reference = (-x.gather(-1, answers[..., None]).squeeze(-1) for x in (ours, other))
        kl = F.kl_div(ours, other, reduction="none", log_target=True).sum(-1)
        best, best_there = ours.argmax(-1), other.argmax(-1)
        self.losses += losses.mean(1).tolist()
        self.reference_losses += reference.mean(1).tolist()
        self.hits += (best == answers).double().mean(1).tolist()
        self.reference_hits += (best_there == answers).double().mean(1).tolist()
        self.kl += kl.mean(1).tolist()
        self.same += (best == best_there).double().mean(1).tolist()
        worst = float(kl.max())
        self.worst = worst if math.isnan(worst) else max(self.worst, worst)

    def evaluation(self, device: torch.device, latencies: list[Latency], layers: list[LayerError]) -> Evaluation:
        n = len(self.losses)
        top1 = [proportion(round(sum(hits)), n) if self.images else None for hits in (self.hits, self.reference_hits)]
        return Evaluation(
            unit="images" if self.images else "tokens",
            samples=n,
            predictions=self.predictions,
            loss=mean_of(self.losses, OVER_SAMPLES),
            reference_loss=mean_of(self.reference_losses, OVER_SAMPLES),
            loss_delta=loss_delta(self.losses, self.reference_losses),
            top1=top1[0],
            reference_top1=top1[1],
            top1_delta=top1_delta(self.hits, self.reference_hits) if self.images else None,
            kl_nats=mean_of(self.kl, OVER_SAMPLES),
            kl_worst=self.worst,
            same_frac=statistics.fmean(self.same),
            machine=describe(device),
            device=device.type,
            latencies=latencies,
            layers=layers,
            losses=self.losses,
            hits=self.hits if self.images else [],
        )


def loss_delta(ours: Sequence[float], theirs: Sequence[float]) -> Interval:
    """Return the mean of the paired differences of samples' losses, nats.

    Its exponential is the ratio of perplexities.
    """
    return mean_of([a - b for a, b in zip(ours, theirs, strict=True)], PAIRED)


def top1_delta(ours: Sequence[float], theirs: Sequence[float]) -> Interval:
    """Return the difference of the accuracies (0.01 is a point) on the same images; ``ours``, ``theirs``: 1.0 for an
    image that is right.
    """
    changes = [a - b for a, b in zip(ours, theirs, strict=True)]
    return paired_proportions(sum(c > 0 for c in changes), sum(c < 0 for c in changes), len(changes))


def sizes_to_time(batch: Batch) -> list[Batch]:
    """Return the batch cut to one sample, and the whole of it."""
    one = {name: tensor[:1] for name, tensor in batch.items()}
    return [one, batch] if len(answer_of(batch)) > 1 else [one]


def latency(
    model: nn.Module,
    reference: nn.Module,
    batch: Batch,
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> Latency:
    """Time the two in turns, so that other load on the machine affects both; the first turn warms up.

    ``clock``: seconds.
    """
    ours, theirs = [], []
    for turn in range(repeats + 1):
        spent = [seconds_of(other, batch, clock) for other in (reference, model)]
        if turn:
            theirs.append(spent[0])
            ours.append(spent[1])
    ratios = [there / here for here, there in zip(ours, theirs, strict=True)]
    answers, median = answer_of(batch), statistics.median(ours)
    return Latency(
        batch=len(answers),
        ms=1e3 * median,
        reference_ms=1e3 * statistics.median(theirs),
        units_per_s=answers.numel() / median,
        speed_ratio=statistics.median(ratios),
        low=min(ratios),
        high=max(ratios),
    )


def seconds_of(model: nn.Module, batch: Batch, clock: Callable[[], float]) -> float:
    """Time one forward, up to its result."""
    inputs = inputs_of(model, batch)
    _wait(model)
    begin = clock()
    model(**inputs)
    _wait(model)
    return clock() - begin


def _wait(model: nn.Module) -> None:
    if device_of(model).type == "cuda":
        torch.cuda.synchronize()


def layer_errors(
    model: nn.Module, reference: nn.Module, batch: Batch, weights_db: Mapping[str, float] | None = None
) -> list[LayerError]:
    """Compare the linear layers of ``reference`` with those of ``model`` on one batch, the worst first.

    Worst is by ``own_db``: given the reference's input, a layer does not inherit the errors of those before it.
    """
    own: dict[str, float] = {}
    right: dict[str, Tensor] = {}
    inherited: dict[str, float] = {}

    def judge(name: str, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        twin = model.get_submodule(name)
        right[name] = out
        own[name] = sqnr_db(out, twin(inputs[0].to(_dtype(twin, inputs[0]))))

    def compare(name: str, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        inherited[name] = sqnr_db(right[name], out)

    names = [name for name, layer in reference.named_modules() if isinstance(layer, nn.Linear)]
    with torch.no_grad():
        _watched(reference, names, judge, batch)
        _watched(model, names, compare, batch)
    rows = [LayerError(name, own[name], inherited[name], (weights_db or {}).get(name)) for name in inherited]
    return sorted(rows, key=lambda row: (row.own_db, row.layer))


def _dtype(layer: nn.Module, x: Tensor) -> torch.dtype:
    """Return the dtype that the layer takes: that of its weight, as it shows it to others."""
    return next((p.dtype for p in layer.parameters() if p.is_floating_point()), x.dtype)


Watch = Callable[[str, tuple[Tensor, ...], Tensor], None]


def _watched(model: nn.Module, names: Sequence[str], watch: Watch, batch: Batch) -> None:
    """Run one forward with ``watch`` on every named layer."""
    handles = [
        model.get_submodule(name).register_forward_hook(lambda layer, inputs, out, name=name: watch(name, inputs, out))
        for name in names
    ]
    try:
        model(**inputs_of(model, batch))
    finally:
        for handle in handles:
            handle.remove()


def sqnr_db(right: Tensor, output: Tensor) -> float:
    """Return 10 log10 of the signal's power over the error's; inf if equal, -inf for an error around a signal of
    zeros."""
    signal = float(right.double().square().sum())
    error = float((output.double() - right.double()).square().sum())
    if error == 0:
        return math.inf
    return 10 * math.log10(signal / error) if signal else -math.inf

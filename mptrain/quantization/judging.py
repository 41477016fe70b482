"""The accuracy part of ``mptrain quantize``: the original model vs. the quantized one."""

from __future__ import annotations

import copy

from rich.console import Console
from torch import nn

from mptrain.quantization.apply import quantize_model
from mptrain.quantization.evaluate import evaluate, loss_delta
from mptrain.quantization.matrix import validation_batches
from mptrain.quantization.methods import Method
from mptrain.quantization.report import Report
from mptrain.quantization.source import Source
from mptrain.report import wording
from mptrain.report.deploy.matrix import Evaluation
from mptrain.report.deploy.terminal import print_evaluation

BATCHES = 8  # validation batches, by default
REPEATS = 5  # timed forwards


class Judge:
    """Compare models with the original FP32 one on ``batches`` validation batches of the run; 0: do nothing.

    ValueError if there is no data to judge by.
    """

    def __init__(self, source: Source, batches: int) -> None:
        self.evaluations: dict[str, Evaluation] = {}
        self._batches = validation_batches(source.dataset(), batches) if batches else []
        self._reference = copy.deepcopy(source.model) if batches else source.model

    def at_once(self, method: Method, group_size: int | None, keep: str) -> None:
        """Evaluate the model quantized without fine-tuning."""
        model = copy.deepcopy(self._reference)
        report = quantize_model(model, method, group_size=group_size, keep=keep)
        self.add(f"{method.name} at once", model, report, repeats=0)

    def add(self, name: str, model: nn.Module, report: Report, repeats: int = REPEATS) -> None:
        if self._batches:
            weights = {layer.name: layer.sqnr_db for layer in report.quantized if layer.sqnr_db is not None}
            reference, batches = self._reference, self._batches
            self.evaluations[name] = evaluate(model, reference, batches, repeats=repeats, weights_db=weights)

    def show(self, console: Console) -> None:
        for name, evaluation in self.evaluations.items():
            print_evaluation(console, evaluation, name)
        if len(self.evaluations) == 2:
            console.print(regained(*self.evaluations.values()), highlight=False)


def regained(at_once: Evaluation, tuned: Evaluation) -> str:
    """Describe how much of the loss fine-tuning gave back."""
    gain = loss_delta(tuned.losses, at_once.losses)
    change = f"fine-tuning changes the loss by {wording.interval(gain, '+.5f', ' nats')} on the same samples"
    lost = at_once.loss_delta
    if not lost.low > 0:
        return f"{change}; quantized at once the model loses too little to say what part of it came back"
    share = f"{-gain.mean / lost.mean:.0%} of what quantization at once loses ({lost.mean:+.5f})"
    return f"{change}, {share}; of that, further training alone gives a part"

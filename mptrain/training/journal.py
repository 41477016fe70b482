"""The telling of a run's steps: losses gather on the device, are read back together, and looked through for spikes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mptrain.precision.outcome import StepRecord
from mptrain.telemetry.ledger import Ledger, alarm
from mptrain.telemetry.monitor import Sample
from mptrain.telemetry.peaks import peaks, weighted_rate
from mptrain.training.extras import Extras
from mptrain.training.protocols import Sink
from mptrain.training.spikes import Spikes


class Journal:
    """One row of metrics a step; meters and samples stand in the last row of those that are read back together.

    ``losses``: step -> mean training loss of its micro-batches, as read back. ``unread``: (step, this rank's part of
    the loss on the device, learning rate) of the steps since. ``parts``: ranks that see the same samples; ``scaled``:
    is the loss scaled?
    """

    def __init__(self, sink: Sink, ledger: Ledger, extras: Extras, *, parts: int, scaled: bool) -> None:
        self._sink, self._ledger, self._extras, self._parts, self._scaled = sink, ledger, extras, parts, scaled
        self.losses: dict[int, float] = {}
        self.unread: list[tuple[int, Tensor, float]] = []
        self.spikes = Spikes()
        self._sampled: dict[str, float] = {}
        self._peak_flops_per_s = extras.peak_flops_per_s

    def tell(self, sample: Sample) -> None:
        """Hand on what the monitor saw. The ledger hears of it before it enters the step."""
        self._sampled = sample.metrics
        if sample.record is not None:
            self._sink.record(sample.record)
        if sample.moved is not None:
            self._ledger.observe(sample.moved)
        for event in sample.events:
            self._sink.event(event)

    def audited(self, result: Any, device: torch.device) -> None:
        """MFU goes by the formats that an audited step ran in."""
        peak = weighted_rate(peaks(device), result.coverage)
        if peak:
            self._peak_flops_per_s = peak * 1e12 * self._extras.ranks.size

    def flush(self, outcome: StepRecord | None) -> bool:
        """Read back what has gathered and write it, with the ``outcome`` of the last step. Did a loss spike?"""
        if not self.unread:
            return False
        unread = self._extras.ranks.sum(torch.stack([loss.float() for _, loss, _ in self.unread]))
        values = (unread / self._parts if self._parts > 1 else unread).tolist()
        steps, rates = [step for step, _, _ in self.unread], [rate for *_, rate in self.unread]
        self.unread.clear()
        self.losses.update(zip(steps, values, strict=True))
        for step, value, rate in zip(steps[:-1], values, rates, strict=False):
            self._sink.metrics(step, {"train/loss_step": value, "train/lr": rate})
        spike = self.spikes.first(values)
        if spike is not None:
            text = f"the loss is {values[spike]:.4g} where {self.spikes.usual:.4g} was usual"
            self._sink.event(alarm(steps[spike], text))
        row = {"train/loss": values[-1], "train/loss_step": values[-1], "train/lr": rates[-1]}
        if outcome is not None:
            row["train/grad_norm"] = outcome.grad_norm
            if self._scaled:
                row["scale/value"] = outcome.scale
        row["scale/skipped_total"] = float(self._ledger.skipped)
        if self._extras.compression is not None:
            row |= self._extras.compression.bill()
        self._sink.metrics(steps[-1], row | self._speed() | self._sampled)
        self._sampled = {}
        return spike is not None

    def _speed(self) -> dict[str, float]:
        rate = self._extras.throughput.tokens_per_s(last=self._extras.every)
        if math.isnan(rate):
            return {}
        row = {"speed/tokens_per_s": rate}
        if self._peak_flops_per_s:
            row["speed/mfu_frac"] = rate * self._extras.flops_per_token / self._peak_flops_per_s
        return row

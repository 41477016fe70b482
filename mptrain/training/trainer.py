"""The training loop, the same for every precision.

    for micro in range(accumulate):
        with precision.forward(): loss = model(**batch)
        precision.backward(loss / accumulate)
    settle the step before: scheduler and counters move only if it was applied
    outcome = precision.step(optimizer, clip=clip)

Step t's outcome stays on the device until just before the optimizer step of t+1, when its copy has long arrived, so
that schedule and ledger are exact and nothing stalls. Losses are read back every ``telemetry.every`` steps. A step
whose tensors the monitor records is read back at once, and runs the model itself where others run its compiled form.
"""

from __future__ import annotations

import math
import signal
import time
import zlib
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mptrain.checkpoint.checkpoints import Checkpoints, Stateful
from mptrain.distributed import ALONE, Ranks
from mptrain.distributed.layout import Share
from mptrain.distributed.optimizer import sharded_as
from mptrain.precision import Precision
from mptrain.precision.outcome import StepOutcome
from mptrain.telemetry.drill import Drill
from mptrain.telemetry.ledger import Ledger, alarm
from mptrain.telemetry.meters import PeakMemory, Throughput
from mptrain.telemetry.monitor import Monitor, Sample
from mptrain.telemetry.peaks import peaks, weighted_rate
from mptrain.training.config import TrainerConfig
from mptrain.training.protocols import Audits, Averaged, Compresses, Data, Rates, Sink, Watches
from mptrain.training.resume import Diverged, Keeper
from mptrain.training.signals import Interrupts
from mptrain.training.spikes import Spikes
from mptrain.training.validation import Validation, to_device

NOTHING = nullcontext()


class Trainer:
    """Everything a run needs, handed in. ``wrapped``: what is called in the model's place (its DDP), ``run_model``:
    that or its compiled form. Without ``monitor`` nobody watches the numerics. ``compression``:
    of the gradients between ranks; its state differs by rank."""

    def __init__(
        self,
        config: TrainerConfig,
        *,
        model: nn.Module,
        precision: Precision,
        optimizer: Optimizer,
        schedule: Rates,
        data: Data,
        sink: Sink,
        monitor: Monitor | None,
        throughput: Throughput,
        seed: int = 0,
        every: int = 10,
        wrapped: nn.Module | None = None,
        run_model: nn.Module | None = None,
        ranks: Ranks = ALONE,
        share: Share | None = None,
        watch: Watches | None = None,
        masters_whole: bool = True,
        compression: Compresses | None = None,
        average: Averaged | None = None,
        drill: Drill | None = None,
        checkpoints: Checkpoints | None = None,
        checkpoint_every: int = 0,
        about: dict[str, Any] | None = None,
        flops_per_token: float = 0.0,
        peak_flops_per_s: float | None = None,
        audit: Audits | None = None,
    ) -> None:
        self.config, self.model, self.precision, self.optimizer = config, model, precision, optimizer
        self.schedule, self.data, self.sink, self.monitor, self.throughput = schedule, data, sink, monitor, throughput
        self.seed, self.every, self.about = seed, every, about or {}
        self.wrapped = model if wrapped is None else wrapped
        self.run_model = self.wrapped if run_model is None else run_model
        self.ranks, self.share = ranks, share or Share(config.batch_size, config.accumulate)
        self.compression, self.watch, self.masters_whole = compression, watch, masters_whole
        self.average, self.drill = average, drill
        self.checkpoints, self.checkpoint_every = checkpoints, checkpoint_every
        self.flops_per_token, self.peak_flops_per_s = flops_per_token, peak_flops_per_s
        self.audit = audit
        self.ledger, self.spikes = Ledger(), Spikes()
        self.device = precision.device
        self.step_number = 0
        self.interrupts = Interrupts()
        self._optimizer_draws = getattr(optimizer, "weights", "") == "bf16_stochastic"
        self.stopping = False  # a rank was asked to, and all of them know
        self.losses: dict[int, float] = {}  # step -> mean training loss of its micro-batches, as read back
        self.final: dict[str, float] = {}
        self.memory = PeakMemory(self.device)
        self._pending: tuple[int, StepOutcome] | None = None
        self._unread: list[tuple[int, Tensor, float]] = []
        self._sampled: dict[str, float] = {}
        self._spiked = False

    @property
    def stopped_early(self) -> bool:
        """Did a signal end training? With several ranks, one that all of them have heard of."""
        return self.stopping if self.ranks.size > 1 else self.interrupts.stopped_by is not None

    def fit(self, until: int | None = None) -> None:
        """Train to ``max_steps`` (or ``until``), evaluate, save. SIGINT or SIGTERM: finish the step, save, return."""
        last = self.config.max_steps if until is None else min(until, self.config.max_steps)
        saved = -1
        self.model.train()
        self.memory.start()
        with self.interrupts.handled():
            while self.step_number < last and not self.stopped_early:
                self.step()
                if self._spiked:
                    self._roll_back()
                    continue
                done = self.step_number
                if self.config.eval_every and done % self.config.eval_every == 0 and done < last:
                    self._at("evaluating")
                    self.sink.metrics(done, self.evaluate())
                if self.checkpoint_every and done % self.checkpoint_every == 0:
                    self.save()
                    saved = done
            self._flush()
            self._spiked = False  # at the very end: told, and nothing to go on to
            if self.checkpoints is not None:
                if saved != self.step_number:
                    self.save()
                self.checkpoints.wait()
            if not self.stopped_early and until is None:
                self._at("evaluating")
                self.final = self.evaluate(masters=self.precision.policy.name != "fp32")
                self.sink.metrics(self.step_number, self.final)
        self.memory.end(self.model, self.optimizer)

    def step(self) -> None:
        """One optimizer step: micro-batches, the outcome of the step before, then apply or skip."""
        start = time.perf_counter()
        step, sample = self.step_number + 1, None
        watching = self.monitor if self.monitor is not None and self.monitor.due(step) else None
        if watching:
            watching.begin_step(step)
        with self.memory.due(len(self.throughput.seconds), self.model, self.optimizer):
            audited = self.audit is not None and self.audit.result is None
            seen = watching is not None and watching.recording
            if self.compression is not None:
                self.compression.sampling = seen
            with NOTHING if self.drill is None else self._drilled(self.drill, step):
                loss = self._audited() if audited else self._gradients(self.wrapped if seen else self.run_model)
            self._settle()
            rate = self.schedule.at(self.ledger.applied)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            if watching:
                watching.see_gradients()
            if self._optimizer_draws:
                self._draw(self.share.size * self.share.accumulate)
            if self.watch is not None:
                self._at("waiting for the others' gradients")
            if self.memory.measuring:
                self.memory.updating()
            stop = self.interrupts.stopped_by is not None
            outcome = self.precision.step(self.optimizer, clip=self.config.clip, stop=stop)
        if watching:
            sample = watching.end_step(step, self.optimizer, outcome)
        self.optimizer.zero_grad(set_to_none=True)
        self.step_number = step
        self._pending = (step, outcome)
        self._unread.append((step, loss, rate))
        if sample:
            self._tell(sample)
        if sample or step % self.every == 0:
            self._flush()
        self.throughput.add(time.perf_counter() - start)
        self.sink.tick(step)

    def _drilled(self, drill: Drill, step: int) -> AbstractContextManager[object]:
        """One step may be a fire drill."""
        return drill.planted(self.model) if drill.step == step else NOTHING

    def _tell(self, sample: Sample) -> None:
        """Hand on what the monitor saw. The ledger hears of it before it enters the step."""
        self._sampled = sample.metrics
        if sample.record is not None:
            self.sink.record(sample.record)
        if sample.moved is not None:
            self.ledger.observe(sample.moved)
        for event in sample.events:
            self.sink.event(event)

    def _gradients(self, model: nn.Module) -> Tensor:
        """Forward and backward of every micro-batch; this rank's part of the mean loss (0-dim, on the device)."""
        share = self.share
        n = share.accumulate
        # Of DDP: gradients are summed once, with the last micro-batch.
        alone = nullcontext if n == 1 else getattr(model, "no_sync", nullcontext)
        losses: list[Tensor] = []
        for micro in range(n):
            if self.watch is not None:
                self._at(f"in micro-batch {micro}")
            batch = self.data.batch(
                self.step_number + self.ledger.skipped_batches, micro=micro, microbatches=n,
                batch_size=share.batch_size, seed=self.seed, rank=share.rank, world_size=share.size,
            )  # fmt: skip
            self._draw(micro * share.size + share.rank)
            with alone() if micro < n - 1 else NOTHING:
                with self.precision.forward():
                    loss = model(**to_device(batch, self.device))
                if n * share.size > 1:
                    loss = loss / (n * share.size)
                self.precision.backward(loss)
            losses.append(loss.detach())
        return losses[0] if n == 1 else n * torch.stack(losses).nanmean()  # NaN: of one without a target

    def _draw(self, turn: int) -> None:
        """Random numbers are a function of (seed, step, turn), as the data is: of the micro-batch for dropout, wherever
        it runs, of the step for the optimizer's rounding, on all ranks alike. A checkpoint need not hold them."""
        number = zlib.crc32(f"{self.seed} {self.step_number + self.ledger.skipped_batches} {turn}".encode())
        if self.device.type == "cuda":
            torch.cuda.default_generators[torch.cuda.current_device()].manual_seed(number)
        torch.default_generator.manual_seed(number)

    def _at(self, doing: str) -> None:
        if self.watch is not None:
            self.watch.at(self.step_number + 1, doing)

    def _audited(self) -> Tensor:
        """The first gradients of this process, watched product by product; MFU goes by the formats that ran."""
        assert self.audit is not None
        with self.audit:
            loss = self._gradients(self.wrapped)
        peak = weighted_rate(peaks(self.device), self.audit.result.coverage)
        self.peak_flops_per_s = peak * 1e12 * self.ranks.size if peak else self.peak_flops_per_s
        return loss

    def _settle(self) -> None:
        """Resolve the step before: its ledger entry, its events. The scheduler goes by ``ledger.applied``."""
        if self._pending is None:
            return
        step, outcome = self._pending
        self._pending = None
        record = outcome.read()
        for event in self.ledger.record(step, record):
            self.sink.event(event)
        if record.applied and self.average is not None:
            self.average.update()
        if self.monitor is not None:
            self.monitor.suspect(step, record)
        if record.stop:
            self.stopping = True
            self.interrupts.stopped_by = self.interrupts.stopped_by or signal.SIGTERM  # another rank's
        if self.ledger.skipped_in_a_row >= self.config.max_skips_in_a_row:
            raise Diverged(
                f"{self.ledger.skipped_in_a_row} steps skipped in a row ({record.reason}), which is "
                "trainer.max_skips_in_a_row: lower optim.lr, or use precision=bf16; checkpoints are as they were"
            )

    def _flush(self) -> None:
        """Read back what has gathered on the device and hand it to the sinks: one row a step, meters on the last."""
        outcome = self._pending[1].read() if self._pending else None
        self._settle()
        if not self._unread:
            return
        unread = torch.stack([loss.float() for _, loss, _ in self._unread])
        parts = self.ranks.size // self.share.size  # that see the same samples
        values = (self.ranks.sum(unread) / parts if parts > 1 else self.ranks.sum(unread)).tolist()
        steps, rates = [step for step, _, _ in self._unread], [rate for *_, rate in self._unread]
        self._unread.clear()
        self.losses |= dict(zip(steps, values, strict=True))
        for step, value, rate in zip(steps[:-1], values, rates, strict=False):
            self.sink.metrics(step, {"train/loss_step": value, "train/lr": rate})
        step, value, rate = steps[-1], values[-1], rates[-1]
        self._look_for_spikes(steps, values)
        row = {"train/loss": value, "train/loss_step": value, "train/lr": rate}
        if outcome is not None:
            row["train/grad_norm"] = outcome.grad_norm
            if self.precision.scaler.active:
                row["scale/value"] = outcome.scale
        row["scale/skipped_total"] = float(self.ledger.skipped)
        if self.compression is not None:
            row |= self.compression.bill()
        self.sink.metrics(step, row | self._speed() | self._sampled)
        self._sampled = {}

    def _speed(self) -> dict[str, float]:
        rate = self.throughput.tokens_per_s(last=self.every)
        if math.isnan(rate):
            return {}
        row = {"speed/tokens_per_s": rate}
        if self.peak_flops_per_s:
            row["speed/mfu_frac"] = rate * self.flops_per_token / self.peak_flops_per_s
        return row

    def evaluate(self, *, masters: bool = False) -> dict[str, float]:
        """What the model is judged by with the policy on; ``masters``: also of the FP32 weights with it off."""
        self._settle()
        judge = Validation(self.model, self.run_model, self.precision, self.data, self.ranks, self.share)
        sizes = self.config.batch_size, self.config.eval_batches
        return judge(*sizes, masters=masters and self.masters_whole, average=self.average)

    def keeper(self) -> Keeper:
        """What a checkpoint holds. The data's position is the step: its order, like that of random numbers, is a
        function of (seed, step)."""
        parts: dict[str, Stateful | None] = {
            "model": self.model,
            "optimizer": self.optimizer,
            "precision": self.precision,
            "ledger": self.ledger,
            "monitor": self.monitor,
            "average": self.average,
            "spikes": self.spikes,
        }
        held = {name: part for name, part in parts.items() if part is not None}
        own: dict[str, Stateful] = {} if self.compression is None else {"compression": self.compression}
        return Keeper(held, own, self.ranks, self.device, sharded_as(self.model, self.optimizer))

    def save(self) -> None:
        """Write a checkpoint of the state after the last step, unless that step is about to be undone."""
        assert self.checkpoints is not None, "save() needs checkpoints"
        self._flush()  # what is told of a step is on disk before the step is
        if self._spiked:
            return
        self._at("saving")
        self.keeper().save(self.checkpoints, self.step_number, self.about)

    def resume(self, path: Path) -> None:
        """Continue from a checkpoint. ValueError if it is damaged or of another model."""
        self.step_number = self.keeper().resume(path)

    def _look_for_spikes(self, steps: list[int], values: list[float]) -> None:
        first = self.spikes.first(values)
        if first is not None:
            text = f"the loss is {values[first]:.4g} where {self.spikes.usual:.4g} was usual"
            self.sink.event(alarm(steps[first], text))
            self._spiked = self.config.on_spike == "rollback"

    def _roll_back(self) -> None:
        """Go back to the newest checkpoint, and on behind the batches that were seen since."""
        assert self.checkpoints is not None, "on_spike=rollback needs checkpoints"
        self._spiked, self._pending = False, None
        here = self.step_number
        self.step_number, event = self.keeper().roll_back(self.checkpoints, self.ledger, here)
        self.sink.event(event)

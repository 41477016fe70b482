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

import signal
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mptrain.checkpoint.checkpoints import Checkpoints, Stateful
from mptrain.distributed.layout import Share
from mptrain.distributed.optimizer import sharded_as
from mptrain.precision.outcome import StepOutcome
from mptrain.precision.runtime import Precision
from mptrain.telemetry.ledger import Ledger
from mptrain.telemetry.meters import PeakMemory
from mptrain.training.config import TrainerConfig
from mptrain.training.extras import Extras
from mptrain.training.journal import Journal
from mptrain.training.protocols import Data, Rates, Sink, Watches
from mptrain.training.randomness import seed_generators
from mptrain.training.resume import Diverged, Keeper
from mptrain.training.signals import Interrupts
from mptrain.training.validation import Validation, to_device

NOTHING = nullcontext()


class Trainer:
    """Everything a run needs, handed in: what it can do without in :class:`~mptrain.training.extras.Extras`."""

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
        extras: Extras | None = None,
    ) -> None:
        self.config, self.model, self.precision, self.optimizer = config, model, precision, optimizer
        self.schedule, self.data, self.sink = schedule, data, sink
        self.extras = extras or Extras()
        self.monitor, self.throughput, self.ranks = self.extras.monitor, self.extras.throughput, self.extras.ranks
        self.wrapped = model if self.extras.wrapped is None else self.extras.wrapped
        self.run_model = self.wrapped if self.extras.run_model is None else self.extras.run_model
        self.share = self.extras.share or Share(config.batch_size, config.accumulate)
        self.ledger = Ledger()
        parts, scaled = self.ranks.size // self.share.size, precision.scaler.active
        self.journal = Journal(sink, self.ledger, self.extras, parts=parts, scaled=scaled)
        self.device, self.memory = precision.device, PeakMemory(precision.device)
        self.interrupts, self.step_number = Interrupts(), 0
        self.stopping = False  # a rank was asked to, and all of them know
        self.losses = self.journal.losses  # step -> training loss, as read back so far
        self.final: dict[str, float] = {}
        self._watch: Watches | None = None
        self._optimizer_draws = getattr(optimizer, "weights", "") == "bf16_stochastic"
        self._pending: tuple[int, StepOutcome] | None = None
        self._spiked = False

    @property
    def stopped_early(self) -> bool:
        """Tell whether a signal ended training; with several ranks, one that all of them have heard of."""
        return self.stopping if self.ranks.size > 1 else self.interrupts.stopped_by is not None

    def fit(self, until: int | None = None, watch: Watches | None = None) -> None:
        """Train to ``max_steps`` (or ``until``), evaluate, save. SIGINT or SIGTERM: finish the step, save, return.

        ``watch``: is told how far this rank has come.
        """
        self._watch = watch
        last, saved = self.config.max_steps if until is None else min(until, self.config.max_steps), -1
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
                if self.extras.checkpoint_every and done % self.extras.checkpoint_every == 0:
                    self.save()
                    saved = done
            self._flush()
            self._spiked = False  # at the very end: told, and nothing to go on to
            if self.extras.checkpoints is not None:
                if saved != self.step_number:
                    self.save()
                self.extras.checkpoints.wait()
            if not self.stopped_early and until is None:
                self._at("evaluating")
                self.final = self.evaluate(masters=self.precision.policy.name != "fp32")
                self.sink.metrics(self.step_number, self.final)
        self.memory.end(self.model, self.optimizer)

    def step(self) -> None:
        """One optimizer step: micro-batches, the outcome of the step before, then apply or skip."""
        start = time.perf_counter()
        step, sample, extras = self.step_number + 1, None, self.extras
        watching = self.monitor if self.monitor is not None and self.monitor.due(step) else None
        if watching:
            watching.begin_step(step)
        with self.memory.due(len(self.throughput.seconds), self.model, self.optimizer):
            audit = extras.audit if extras.audit is not None and extras.audit.result is None else None
            seen = watching is not None and watching.recording
            if extras.compression is not None:
                extras.compression.sampling = seen
            drilled = extras.drill.planted(self.model) if extras.drill and extras.drill.step == step else NOTHING
            with drilled, audit or NOTHING:  # audited are the first gradients of this process
                loss = self._gradients(self.wrapped if seen or audit else self.run_model)
            if audit:
                self.journal.audited(audit.result, self.device)
            self._settle()
            rate = self.schedule.at(self.ledger.applied)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            if watching:
                watching.see_gradients()
            if self._optimizer_draws:
                position, turn = self.step_number + self.ledger.skipped_batches, self.share.size * self.share.accumulate
                seed_generators(self.device, extras.seed, position, turn)
            if self._watch is not None:
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
        self.journal.unread.append((step, loss, rate))
        if sample:
            self.journal.tell(sample)
        if sample or step % extras.every == 0:
            self._flush()
        self.throughput.add(time.perf_counter() - start)
        self.sink.tick(step)

    def _gradients(self, model: nn.Module) -> Tensor:
        """Forward and backward of every micro-batch; this rank's part of the mean loss (0-dim, on the device)."""
        share, n, position = self.share, self.share.accumulate, self.step_number + self.ledger.skipped_batches
        alone = nullcontext if n == 1 else getattr(model, "no_sync", nullcontext)  # DDP's: sums with the last one
        losses: list[Tensor] = []
        for micro in range(n):
            if self._watch is not None:
                self._at(f"in micro-batch {micro}")
            batch = self.data.batch(
                position, micro=micro, microbatches=n,
                batch_size=share.batch_size, seed=self.extras.seed, rank=share.rank, world_size=share.size,
            )  # fmt: skip
            seed_generators(self.device, self.extras.seed, position, micro * share.size + share.rank)
            with alone() if micro < n - 1 else NOTHING:
                with self.precision.forward():
                    loss = model(**to_device(batch, self.device))
                if n * share.size > 1:
                    loss = loss / (n * share.size)
                self.precision.backward(loss)
            losses.append(loss.detach())
        return losses[0] if n == 1 else n * torch.stack(losses).nanmean()  # NaN: of one without a target

    def _at(self, doing: str) -> None:
        if self._watch is not None:
            self._watch.at(self.step_number + 1, doing)

    def _settle(self) -> None:
        """Resolve the step before: its ledger entry, its events. The scheduler goes by ``ledger.applied``."""
        if self._pending is None:
            return
        (step, outcome), self._pending = self._pending, None
        record = outcome.read()
        for event in self.ledger.record(step, record):
            self.sink.event(event)
        if record.applied and self.extras.average is not None:
            self.extras.average.update()
        if self.monitor is not None:
            self.monitor.suspect(step, record)
        if record.stop:
            self.stopping = True
            self.interrupts.stopped_by = self.interrupts.stopped_by or signal.SIGTERM  # another rank's
        if self.ledger.skipped_in_a_row >= self.config.max_skips_in_a_row:
            raise Diverged.skipping(self.ledger.skipped_in_a_row, record.reason)

    def _flush(self) -> None:
        """Read back what has gathered on the device and hand it to the sinks."""
        record = self._pending[1].read() if self._pending else None
        self._settle()
        self._spiked |= self.journal.flush(record) and self.config.on_spike == "rollback"

    def evaluate(self, *, masters: bool = False) -> dict[str, float]:
        """Evaluate the model with the policy on; ``masters``: also of the FP32 weights with it off."""
        self._settle()
        judge = Validation(self.model, self.run_model, self.precision, self.data, self.ranks, self.share)
        masters, sizes = masters and self.extras.masters_whole, (self.config.batch_size, self.config.eval_batches)
        return judge(*sizes, masters=masters, average=self.extras.average)

    def keeper(self) -> Keeper:
        """Name the parts of a checkpoint. The data's position is the step: its order, like that of random numbers, is a
        function of (seed, step)."""
        parts: dict[str, Stateful | None] = {
            "model": self.model, "optimizer": self.optimizer, "precision": self.precision, "ledger": self.ledger,
            "monitor": self.monitor, "average": self.extras.average, "spikes": self.journal.spikes,
        }  # fmt: skip
        own = {"compression": self.extras.compression}
        return Keeper(parts, own, self.ranks, self.device, sharded_as(self.model, self.optimizer))

    def save(self, checkpoints: Checkpoints | None = None) -> None:
        """Write a checkpoint of the state after the last step, unless that step is about to be undone."""
        checkpoints = checkpoints or self.extras.checkpoints
        assert checkpoints is not None, "save() needs checkpoints"
        self._flush()  # what is told of a step is on disk before the step is
        if self._spiked:
            return
        self._at("saving")
        self.keeper().save(checkpoints, self.step_number, dict(self.extras.about))

    def resume(self, path: Path) -> None:
        """Continue from a checkpoint. ValueError if it is damaged or of another model."""
        self.step_number = self.keeper().resume(path)

    def _roll_back(self) -> None:
        """Go back to the newest checkpoint, and on behind the batches that were seen since."""
        assert self.extras.checkpoints is not None, "on_spike=rollback needs checkpoints"
        self._spiked, self._pending = False, None
        checkpoints = self.extras.checkpoints
        self.step_number, event = self.keeper().roll_back(checkpoints, self.ledger, self.step_number)
        self.sink.event(event)

"""The training loop, the same for every precision.

    for micro in range(accumulate):
        with precision.forward(): loss = model(**batch)
        precision.backward(loss / accumulate)
    settle the step before: scheduler and counters move only if it was applied
    outcome = precision.step(optimizer, clip)

Step t's outcome stays on the device until just before the optimizer step of t+1, when its copy has long arrived, so
that schedule and ledger are exact and nothing stalls. Losses are read back every ``telemetry.every`` steps.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mptrain.checkpoint import Checkpoints, Rng, Stateful
from mptrain.outcome import StepOutcome
from mptrain.precision import Precision
from mptrain.settings import require
from mptrain.telemetry.ledger import Ledger
from mptrain.telemetry.meters import GIB, LiveBytes, Throughput, resident_tensors
from mptrain.telemetry.monitor import Monitor

MEMORY_STEP = 1  # the second step: optimizer state exists, and warm-up is not over


@dataclass(frozen=True)
class TrainerConfig:
    """``batch_size``: sequences a micro-batch; ``clip``: largest gradient norm, 0 for none; ``eval_every``: 0 = at the
    end only; ``checkpointing``: recompute activations in backward; ``compile``: torch.compile the model."""

    max_steps: int = 60
    batch_size: int = 4
    accumulate: int = 1
    clip: float = 1.0
    eval_every: int = 100
    eval_batches: int = 8
    checkpointing: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        for name in ("max_steps", "batch_size", "accumulate", "eval_batches"):
            require(getattr(self, name) >= 1, f"trainer.{name}", getattr(self, name), "at least 1")
        require(self.clip >= 0, "trainer.clip", self.clip, "a norm such as 1.0, or 0 for no clipping")
        require(self.eval_every >= 0, "trainer.eval_every", self.eval_every, "0 (at the end only) or more")


class Data(Protocol):
    def batch(self, step: int, *, micro: int, microbatches: int, batch_size: int, seed: int) -> dict[str, Tensor]: ...
    def validation(self, batch_size: int, batches: int) -> Iterator[dict[str, Tensor]]: ...


class Rates(Protocol):
    def at(self, applied: int) -> float: ...


class Audits(Protocol):
    """A context around the forward and backward of one step; ``result`` is None until then."""

    @property
    def result(self) -> Any: ...
    def __enter__(self) -> Any: ...
    def __exit__(self, kind: Any, error: Any, trace: Any) -> None: ...


class Sink(Protocol):
    def tick(self, step: int) -> None: ...
    def metrics(self, step: int, values: dict[str, float]) -> None: ...
    def event(self, event: dict[str, Any]) -> None: ...


class Trainer:
    """Everything a run needs, handed in. ``run_model`` is the model, or its compiled form."""

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
        monitor: Monitor,
        throughput: Throughput,
        seed: int = 0,
        every: int = 10,
        run_model: nn.Module | None = None,
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
        self.run_model = model if run_model is None else run_model
        self.checkpoints, self.checkpoint_every = checkpoints, checkpoint_every
        self.flops_per_token, self.peak_flops_per_s = flops_per_token, peak_flops_per_s
        self.audit = audit
        self.ledger = Ledger()
        self.device = precision.device
        self.step_number = 0
        self.stopped_by: signal.Signals | None = None
        self.losses: dict[int, float] = {}  # step -> mean training loss of its micro-batches, as read back
        self.final: dict[str, float] = {}
        self.peak_memory_gib = float("nan")
        self._pending: tuple[int, StepOutcome] | None = None
        self._unread: list[tuple[int, Tensor, float]] = []

    def fit(self, until: int | None = None) -> None:
        """Train to ``max_steps`` (or ``until``), evaluate, save. SIGINT or SIGTERM: finish the step, save, return."""
        last = self.config.max_steps if until is None else min(until, self.config.max_steps)
        saved = -1
        self.model.train()
        self._start_memory()
        with self._signals():
            while self.step_number < last and self.stopped_by is None:
                self.step()
                done = self.step_number
                if self.config.eval_every and done % self.config.eval_every == 0 and done < last:
                    self.sink.metrics(done, self.evaluate())
                if self.checkpoint_every and done % self.checkpoint_every == 0:
                    self.save()
                    saved = done
            self._flush()
            if self.checkpoints is not None and saved != self.step_number:
                self.save()
            if self.stopped_by is None and until is None:
                self.final = self.evaluate(masters=self.precision.policy.name != "fp32")
                self.sink.metrics(self.step_number, self.final)
        self._end_memory()

    def step(self) -> None:
        """One optimizer step: micro-batches, the outcome of the step before, then apply or skip."""
        start = time.perf_counter()
        self.monitor.begin_step(self.step_number + 1)
        with self._memory_meter():
            unaudited = self.audit is None or self.audit.result is not None
            loss = self._gradients() if unaudited else self._audited()
            self._settle()
            rate = self.schedule.at(self.ledger.applied)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            outcome = self.precision.step(self.optimizer, self.config.clip)
            self.optimizer.zero_grad(set_to_none=True)
        self.step_number += 1
        self._pending = (self.step_number, outcome)
        self._unread.append((self.step_number, loss, rate))
        if self.step_number % self.every == 0 or self.monitor.sampling:
            self._flush()
        self.throughput.add(time.perf_counter() - start)
        self.sink.tick(self.step_number)

    def _gradients(self) -> Tensor:
        """Forward and backward of every micro-batch; the mean loss (0-dim, on the device)."""
        n = self.config.accumulate
        total: Tensor | None = None
        for micro in range(n):
            batch = self.data.batch(
                self.step_number, micro=micro, microbatches=n, batch_size=self.config.batch_size, seed=self.seed
            )
            with self.precision.forward():
                loss = self.run_model(**self._to_device(batch))
            if n > 1:
                loss = loss / n
            self.precision.backward(loss)
            detached = loss.detach()
            total = detached if total is None else total + detached
        assert total is not None
        return total

    def _audited(self) -> Tensor:
        """The first gradients of this process, watched. Compiled products cannot be: the model itself runs."""
        assert self.audit is not None
        run_model, self.run_model = self.run_model, self.model
        try:
            with self.audit:
                return self._gradients()
        finally:
            self.run_model = run_model

    def _to_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.device.type == "cpu":
            return batch
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}

    def _settle(self) -> None:
        """Resolve the step before: its ledger entry, its events. The scheduler goes by ``ledger.applied``."""
        if self._pending is None:
            return
        step, outcome = self._pending
        self._pending = None
        for event in self.ledger.record(step, outcome.read()):
            self.sink.event(event)

    def _flush(self) -> None:
        """Read back what has gathered on the device and hand it to the sinks: one row a step, meters on the last."""
        outcome = self._pending[1].read() if self._pending else None
        self._settle()
        if not self._unread:
            return
        values = torch.stack([loss.float() for _, loss, _ in self._unread]).tolist()
        *earlier, last = list(zip(self._unread, values, strict=True))
        for (step, _, rate), value in earlier:
            self.losses[step] = value
            self.sink.metrics(step, {"train/loss_step": value, "train/lr": rate})
        (step, _, rate), value = last
        self.losses[step] = value
        self._unread.clear()
        row = {"train/loss": value, "train/loss_step": value, "train/lr": rate}
        if outcome is not None:
            row["train/grad_norm"] = outcome.grad_norm
            if self.precision.scaler.active:
                row["scale/value"] = outcome.scale
        row["scale/skipped_total"] = float(self.ledger.skipped)
        self.sink.metrics(step, row | self._speed() | self.monitor.end_step())

    def _speed(self) -> dict[str, float]:
        rate = self.throughput.tokens_per_s(last=self.every)
        if math.isnan(rate):
            return {}
        row = {"speed/tokens_per_s": rate}
        if self.peak_flops_per_s:
            row["speed/mfu_frac"] = rate * self.flops_per_token / self.peak_flops_per_s
        return row

    def evaluate(self, *, masters: bool = False) -> dict[str, float]:
        """Mean validation loss (nats) with the policy on; ``masters``: also of the FP32 weights with it off."""
        self._settle()
        self.model.eval()
        row = {"val/loss": self._validation_loss(policy_on=True)}
        if masters:
            row["val/loss_masters"] = self._validation_loss(policy_on=False)
        self.model.train()
        return row

    def _validation_loss(self, *, policy_on: bool) -> float:
        losses = []
        for batch in self.data.validation(self.config.batch_size, self.config.eval_batches):
            with self.precision.evaluating(policy_on=policy_on):
                losses.append(self.run_model(**self._to_device(batch)).float())
        return float(torch.stack(losses).mean())

    def parts(self) -> dict[str, Stateful]:
        """What a checkpoint holds. The data's position is the step: its order is a function of (seed, step)."""
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "precision": self.precision,
            "ledger": self.ledger,
            "monitor": self.monitor,
            "rng": Rng(),
        }

    def save(self) -> None:
        """Write a checkpoint of the state after the last step."""
        assert self.checkpoints is not None, "save() needs checkpoints"
        self._settle()
        about = {**self.about, "step": self.step_number}
        self.checkpoints.save(self.step_number, self.parts(), about)

    def load(self, state: dict[str, Any], step: int) -> None:
        """Continue from the state of :func:`mptrain.checkpoint.load`. ValueError if it is of another model."""
        for name, part in self.parts().items():
            try:
                part.load_state_dict(state[name])
            except (RuntimeError, KeyError, ValueError) as error:
                first = str(error).splitlines()[0]
                raise ValueError(
                    f"the checkpoint's {name} does not fit this run ({first}): use the model and optim it was made with"
                ) from error
        self.step_number = step

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """The first SIGINT or SIGTERM ends training after this step; a second SIGINT interrupts at once."""

        def stop(number: int, frame: Any) -> None:
            if self.stopped_by is not None:
                raise KeyboardInterrupt
            self.stopped_by = signal.Signals(number)

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _start_memory(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def _end_memory(self) -> None:
        if self.device.type == "cuda":
            self.peak_memory_gib = torch.cuda.max_memory_allocated(self.device) / GIB

    @contextmanager
    def _memory_meter(self) -> Iterator[None]:
        """On a CPU, one early step runs under :class:`LiveBytes`."""
        measured = self.device.type == "cpu" and len(self.throughput.seconds) == MEMORY_STEP
        meter = LiveBytes(resident_tensors(self.model, self.optimizer)) if measured else nullcontext()
        with meter:
            yield
        if isinstance(meter, LiveBytes):
            self.peak_memory_gib = meter.peak / GIB

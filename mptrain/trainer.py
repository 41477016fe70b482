"""The training loop, the same for every precision.

    for micro in range(accumulate):
        with precision.forward(): loss = model(**batch)
        precision.backward(loss / accumulate)
    settle the step before: scheduler and counters move only if it was applied
    outcome = precision.step(optimizer, clip)

Step t's outcome stays on the device until just before the optimizer step of t+1, when its copy has long arrived, so
that schedule and ledger are exact and nothing stalls. Losses are read back every ``telemetry.every`` steps. A step
whose tensors the monitor records is read back at once, and runs the model itself where others run its compiled form.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mptrain.checkpoint import Checkpoints, Rng, Stateful
from mptrain.interrupts import Interrupts
from mptrain.outcome import StepOutcome
from mptrain.precision import Precision
from mptrain.settings import require
from mptrain.telemetry.drill import Drill
from mptrain.telemetry.ledger import Ledger
from mptrain.telemetry.meters import PeakMemory, Throughput, peaks, weighted_rate
from mptrain.telemetry.monitor import Monitor, Sample
from mptrain.telemetry.record import Record

NOTHING = nullcontext()


@dataclass(frozen=True)
class TrainerConfig:
    """``batch_size``: samples a micro-batch; ``clip``: largest gradient norm, 0 for none; ``eval_every``: 0 = at the
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


class Averaged(Stateful, Protocol):
    """A running average of the weights."""

    def update(self) -> None: ...
    def in_place(self) -> AbstractContextManager[None]: ...


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
    def record(self, record: Record) -> None: ...


class Trainer:
    """Everything a run needs, handed in. ``run_model``: the model, or its compiled form. Without ``monitor`` nobody
    watches the numerics."""

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
        run_model: nn.Module | None = None,
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
        self.run_model = model if run_model is None else run_model
        self.average, self.drill = average, drill
        self.checkpoints, self.checkpoint_every = checkpoints, checkpoint_every
        self.flops_per_token, self.peak_flops_per_s = flops_per_token, peak_flops_per_s
        self.audit = audit
        self.ledger = Ledger()
        self.device = precision.device
        self.step_number = 0
        self.interrupts = Interrupts()
        self.losses: dict[int, float] = {}  # step -> mean training loss of its micro-batches, as read back
        self.final: dict[str, float] = {}
        self.memory = PeakMemory(self.device)
        self._pending: tuple[int, StepOutcome] | None = None
        self._unread: list[tuple[int, Tensor, float]] = []
        self._sampled: dict[str, float] = {}

    @property
    def stopped_early(self) -> bool:
        """Did a signal end training?"""
        return self.interrupts.stopped_by is not None

    def fit(self, until: int | None = None) -> None:
        """Train to ``max_steps`` (or ``until``), evaluate, save. SIGINT or SIGTERM: finish the step, save, return."""
        last = self.config.max_steps if until is None else min(until, self.config.max_steps)
        saved = -1
        self.model.train()
        self.memory.start()
        with self.interrupts.handled():
            while self.step_number < last and not self.stopped_early:
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
            if not self.stopped_early and until is None:
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
        with self._around(step):
            audited = self.audit is not None and self.audit.result is None
            seen = watching is not None and watching.recording
            loss = self._audited() if audited else self._gradients(self.model if seen else self.run_model)
        self._settle()
        rate = self.schedule.at(self.ledger.applied)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if watching:
            watching.see_gradients()
        outcome = self.precision.step(self.optimizer, self.config.clip)
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

    def _around(self, step: int) -> AbstractContextManager[object]:
        """What one step out of many runs in: a fire drill, or else the meter of memory."""
        if self.drill is not None and self.drill.step == step:
            return self.drill.planted(self.model)
        metered = self.memory.due(len(self.throughput.seconds))
        return self.memory.measured(self.model, self.optimizer) if metered else NOTHING

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
        """Forward and backward of every micro-batch; the mean loss (0-dim, on the device)."""
        n = self.config.accumulate
        total: Tensor | None = None
        for micro in range(n):
            batch = self.data.batch(
                self.step_number, micro=micro, microbatches=n, batch_size=self.config.batch_size, seed=self.seed
            )
            with self.precision.forward():
                loss = model(**self._to_device(batch))
            if n > 1:
                loss = loss / n
            self.precision.backward(loss)
            detached = loss.detach()
            total = detached if total is None else total + detached
        assert total is not None
        return total

    def _audited(self) -> Tensor:
        """The first gradients of this process, watched product by product; MFU goes by the formats that ran."""
        assert self.audit is not None
        with self.audit:
            loss = self._gradients(self.model)
        peak = weighted_rate(peaks(self.device), self.audit.result.coverage)
        self.peak_flops_per_s = peak * 1e12 if peak else self.peak_flops_per_s
        return loss

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
        record = outcome.read()
        for event in self.ledger.record(step, record):
            self.sink.event(event)
        if record.applied and self.average is not None:
            self.average.update()
        if self.monitor is not None:
            self.monitor.suspect(step, record)

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
        """What the model is judged by (loss in nats, accuracy) with the policy on; ``masters``: also of the FP32
        weights with it off."""
        self._settle()
        self.model.eval()
        row = self._validate("")
        if masters:
            row |= self._validate("_masters", policy_on=False)
        if self.average is not None:
            with self.average.in_place():
                row |= self._validate("_average")
        self.model.train()
        return row

    def _validate(self, suffix: str, *, policy_on: bool = True) -> dict[str, float]:
        """Means over the validation batches, as ``val/NAME`` + ``suffix``: the loss, or what the model measures."""
        measure = getattr(self.model, "measure", lambda **batch: {"loss": self.run_model(**batch)})
        found: list[dict[str, Tensor]] = []
        for batch in self.data.validation(self.config.batch_size, self.config.eval_batches):
            with self.precision.evaluating(policy_on=policy_on):
                found.append(measure(**self._to_device(batch)))
        means = {name: torch.stack([values[name].float() for values in found]).mean() for name in found[0]}
        return {f"val/{name}{suffix}": float(mean) for name, mean in means.items()}

    def parts(self) -> dict[str, Stateful]:
        """What a checkpoint holds. The data's position is the step: its order is a function of (seed, step)."""
        parts: dict[str, Stateful | None] = {
            "model": self.model,
            "optimizer": self.optimizer,
            "precision": self.precision,
            "ledger": self.ledger,
            "monitor": self.monitor,
            "average": self.average,
            "rng": Rng(),
        }
        return {name: part for name, part in parts.items() if part is not None}

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
                part.load_state_dict(state.get(name, {}) if name in ("monitor", "average") else state[name])
            except (RuntimeError, KeyError, ValueError) as error:
                first = str(error).splitlines()[0]
                raise ValueError(
                    f"the checkpoint's {name} does not fit this run ({first}): use the model and optim it was made with"
                ) from error
        self.step_number = step

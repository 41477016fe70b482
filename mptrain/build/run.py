"""A run: a trainer with folder and sinks, and what is written of it: ``run.json`` before, ``summary.json`` after."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.console import Console

from mptrain.build.preflight import Prepared
from mptrain.distributed.watchdog import RankLost, Watchdog
from mptrain.loggers import Sinks
from mptrain.memory.training.grading import Grade, graded
from mptrain.memory.training.plan import TrainingPlan
from mptrain.precision.counters import N_COUNTS
from mptrain.report.run_summary import print_comparison, print_end
from mptrain.runs import baseline, identity
from mptrain.runs.baseline import Figures
from mptrain.runs.resumption import command
from mptrain.telemetry.coverage import summary_of
from mptrain.telemetry.monitor import ELEMENTS, FLUSHED, INF, NAN, SATURATED
from mptrain.telemetry.peaks import weighted_rate
from mptrain.tools import machine
from mptrain.training.trainer import Trainer


@dataclass
class Run:
    """A trainer with its folder, sinks and baseline."""

    prepared: Prepared
    trainer: Trainer
    sinks: Sinks
    console: Console
    folder: Path
    held: list[TextIO]  # the lock on the folder, on the first rank
    fp32: Figures
    planned: TrainingPlan | None = None

    def train(self) -> dict[str, Any]:
        """Fit, summarize, compare with FP32, close the sinks; returns the summary (also in ``summary.json``).

        RankLost, naming it, if another rank died.
        """
        try:
            with self._watched() as watch:
                self.trainer.fit(watch=watch)
                peaks_gib = self.prepared.ranks.gather(self.trainer.memory.peak_gib)
            if not self.prepared.ranks.first:
                return {}
            grade = self._grade()
            self.trainer.memory.peak_gib = max(peaks_gib)
            if grade is not None:
                self.sinks.metrics(self.trainer.step_number, grade.metrics())
            summary = self.summary() | {"plan": None if grade is None else grade.plain()}
            self.sinks.summary(summary)
        except BaseException:
            if self.prepared.ranks.size == 1 and self.trainer.extras.checkpoints is not None:
                with contextlib.suppress(OSError):  # another error is being told
                    self.trainer.extras.checkpoints.wait()
            raise
        finally:
            self.sinks.close()
            for lock in self.held:
                lock.close()
        print_comparison(self.console, summary)
        print_end(self._say, self.folder, command(self.folder) if self.trainer.stopped_early else "")
        return summary

    @contextmanager
    def _watched(self) -> Iterator[Watchdog | None]:
        """Tell the other ranks how far this one is, and name the one that ended the run if one did."""
        if self.prepared.ranks.size == 1:
            yield None
            return
        watch = Watchdog(self.prepared.ranks, self.prepared.config.dist.timeout_s)
        try:
            yield watch
        except RuntimeError as error:  # of a collective, or this rank's own
            gone = watch.blame()
            if not gone:
                raise
            raise RankLost(f"{gone}; every saved checkpoint is whole (resume=auto run_dir={self.folder})") from error
        finally:
            watch.close()

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)

    def summary(self) -> dict[str, Any]:
        """The figures of the run; NaN (null in the file) where there is none."""
        trainer, config = self.trainer, self.prepared.config
        backend = trainer.precision.backend
        monitor = trainer.monitor
        totals = [0] * N_COUNTS if monitor is None else monitor.totals.sum(0).tolist()
        counted = totals[ELEMENTS] > 0
        overflow = totals[SATURATED] + totals[INF] + totals[NAN]
        return {
            "precision": config.precision.name,
            "backend": backend.name,
            "emulated": backend.emulated,
            "carrier": backend.carrier,
            "scaling": config.precision.quantization.scaling.value,
            "fp32_gemm": self.prepared.fp32_gemm,
            "steps": trainer.step_number,
            "skipped_steps": trainer.ledger.skipped,
            "train_loss": trainer.losses.get(trainer.step_number, math.nan),
            **self._validation(),
            "unit": self.prepared.data.unit,
            "tokens_per_s": trainer.throughput.tokens_per_s(),
            "mfu_frac": self._mfu_frac(),
            "peak_memory_gib": trainer.memory.peak_gib,
            "overflow_events": overflow if counted else None,
            "underflow_frac": totals[FLUSHED] / totals[ELEMENTS] if counted else None,
            "memory_gib": trainer.memory.roles_gib,
            "worst_layers": [] if monitor is None else monitor.worst(),
            "layers": [] if monitor is None else monitor.worst(most=None),
            "baseline": baseline.compare(self._figures(), self.fp32, emulated=backend.emulated),
            **summary_of(
                None if trainer.extras.audit is None else trainer.extras.audit.result, compiled=config.trainer.compile
            ),
            "fingerprint": self.prepared.fingerprint,
            "machine": machine.describe(self.prepared.device),
            "torch": torch.__version__,
            "ended": datetime.now(UTC).isoformat(timespec="seconds"),
        }

    def _grade(self) -> Grade | None:
        """The plan of memory beside what was measured on this rank."""
        return None if self.planned is None else graded(self.planned, self.trainer.memory.roles_gib)

    def _mfu_frac(self) -> float:
        """Model FLOPs a second over the rate of the formats that the audited step ran in; NaN if not known."""
        audit = self.trainer.extras.audit
        if audit is None or audit.result is None or self.trainer.precision.backend.emulated:
            return math.nan
        rate = weighted_rate(self.prepared.gemm_tflops, audit.result.coverage)
        achieved = self.trainer.throughput.tokens_per_s() * self.trainer.extras.flops_per_token
        return achieved / (rate * 1e12) if rate else math.nan

    def _validation(self) -> dict[str, float]:
        """``val_top1_frac``: of models that classify, else NaN."""
        names = ("loss", "loss_masters", "top1_frac", "top1_frac_masters")
        return {f"val_{name}": self.trainer.final.get(f"val/{name}", math.nan) for name in names}

    def _figures(self) -> Figures:
        """This run's side, its speed over the steps that the other side ran."""
        losses = baseline.read_losses(self.folder)
        speed = self.trainer.throughput.tokens_per_s(first=self.fp32.steps)
        metrics = self._validation()
        memory = self.trainer.memory.peak_gib
        return Figures("this run", losses, speed, memory, metrics["val_loss"], metrics["val_top1_frac"])


def about(prepared: Prepared, trainer: Trainer) -> dict[str, Any]:
    """``run.json``: what the settings do not say of a run, known before its first step."""
    backend = trainer.precision.backend
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        **identity.environment(),
        "torch": torch.__version__,
        "machine": machine.describe(prepared.device),
        "fp32_gemm": prepared.fp32_gemm,
        "corpus": prepared.data.fingerprint,
        "corpus_name": prepared.data.name,
        "initial_weights": trainer.extras.about["initial_weights"],
        "parameters": sum(p.numel() for p in prepared.shell.parameters()),
        "unit": prepared.data.unit,
        "ranks": prepared.ranks.size,
        "layout": str(prepared.layout),
        "tokens_per_step": prepared.units_per_step,
        "flops_per_token": trainer.extras.flops_per_token,
        "gemm_tflops": prepared.gemm_tflops,
        "backend": backend.name,
        "emulated": backend.emulated,
        "fingerprint": prepared.fingerprint,
    }

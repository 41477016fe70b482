"""``mptrain bench telemetry``: the cost of the flight recorder on this CPU, next to other ways of watching tensors.

One torch thread, BF16 training steps of two GPTs. *Inside the calls* is thread CPU time spent in the recorder's own
functions (hooks, passes over tensors, the record and its file) as a share of the step's: timing whole steps cannot
separate small shares from noise. An interval's share is that of one sampled step and of the steps between, measured
apart. Whole steps are shown next to it: variants take turns, with an A/A twin of the unwatched step; medians of paired
ratios.
"""

from __future__ import annotations

import functools
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mptrain.bench.cpu import CLIP, Training
from mptrain.bench.rows import TWIN, Report, Row, Step, Turns, arguments, machine, one_thread
from mptrain.models import gpt
from mptrain.telemetry import record
from mptrain.telemetry.monitor import Monitor, TelemetryConfig

MODELS = {
    "nano": (gpt.Config(256, 256, n_layer=4, n_head=4, n_embd=256), 4),
    "10 M GPT": (gpt.Config(256, 256, n_layer=6, n_head=6, n_embd=384), 8),
}
TINY = {"tiny": (gpt.Config(256, 16, n_layer=1, n_head=1, n_embd=32), 2)}
DEFAULT = TelemetryConfig().record_every
BOUNDS = {1: 0.03, 10: 0.003, DEFAULT: 0.001}  # share of the step's time, by interval
PRECISION = "bf16"
STEPS = 3  # per measurement of whole steps


class Clock:
    """Thread CPU seconds spent inside the functions it wraps; only the outermost of nested calls counts."""

    def __init__(self) -> None:
        self.seconds, self._depth = 0.0, 0

    def wrapping(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def clocked(*args: Any, **kwargs: Any) -> Any:
            self._depth += 1
            start = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                self._depth -= 1
                if not self._depth:
                    self.seconds += time.thread_time() - start

        return clocked


class Recorded(Training):
    """Training under a monitor that samples every step and writes its records, with a clock on all it does."""

    def __init__(self, sizes: gpt.Config, batch: int, folder: Path) -> None:
        super().__init__(sizes, batch, PRECISION)
        self.clock, self.number, self.file = Clock(), 0, folder / record.FILE
        self.monitor = Monitor(self.model, self.precision, TelemetryConfig(record_every=1), 1 << 30)
        observer = self.monitor._observer
        for owner, name in ((observer, "_look"), (observer, "_see"), (self.monitor, "due")):
            setattr(owner, name, self.clock.wrapping(getattr(owner, name)))

    def step(self) -> None:
        self.number += 1
        inside = self.clock.wrapping
        self.monitor.due(self.number)
        inside(self.monitor.begin_step)(self.number)
        self.gradients()
        inside(self.monitor.see_gradients)()
        outcome = self.precision.step(self.optimizer, clip=CLIP)
        inside(self._end)(outcome)
        self.optimizer.zero_grad(set_to_none=True)

    def _end(self, outcome: Any) -> None:
        sample = self.monitor.end_step(self.number, self.optimizer, outcome)
        assert sample.record is not None
        record.append(self.file, sample.record)

    def unsampled(self) -> None:
        """Run a step between two samples."""
        self.monitor.due(self.number)
        super().step()


def shares(training: Recorded, repeats: int) -> tuple[float, float]:
    """Return (sampled, unsampled): time inside the calls as a share of the rest of the step, median over the
    repetitions."""
    medians = []
    for step in (training.step, training.unsampled):
        ratios = []
        for _ in range(repeats + 1):
            training.clock.seconds = 0.0
            start = time.thread_time()
            step()
            whole = time.thread_time() - start
            ratios.append(training.clock.seconds / (whole - training.clock.seconds))
        medians.append(statistics.median(ratios[1:]))
        training.monitor._config = TelemetryConfig(record_every=1 << 30)
    return medians[0], medians[1]


def look_at(x: Tensor) -> list[Tensor]:
    """Gather what hooks of this kind usually do: six figures of a tensor."""
    x = x.detach().float()
    return [x.abs().amax(), x.mean(), x.std(), (x == 0).float().mean(), x.isinf().sum(), x.isnan().sum()]


@contextmanager
def hooks(training: Training, look: Callable[[Tensor], object]) -> Iterator[None]:
    """Call ``look`` on the input, the output and its gradient of every linear layer, on weights and their gradients."""
    handles = []

    def after(layer: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        for x in (args[0], layer.weight, out):
            look(x)  # type: ignore[arg-type]
        out.register_hook(lambda grad: look(grad) and None)  # type: ignore[no-untyped-call]

    for layer in training.model.modules():
        if isinstance(layer, nn.Linear):
            handles.append(layer.register_forward_hook(after))
    for parameter in training.model.parameters():
        after_gradient: Any = parameter.register_post_accumulate_grad_hook
        handles.append(after_gradient(lambda p: look(p.grad) and None))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def peers() -> dict[str, Callable[[Training], AbstractContextManager[object]]]:
    """Return other ways of watching tensors."""
    last_figures: list[Tensor] = []

    def on_device(x: Tensor) -> bool:
        last_figures[:] = look_at(x)
        return True

    return {
        "hooks that call .item()": partial(hooks, look=lambda x: [value.item() for value in look_at(x)]),
        "hooks, kept on the device": partial(hooks, look=on_device),
        "hooks, compiled": lambda training: hooks(training, compiled_look()),
        "detect_anomaly": lambda training: anomalies(),
    }


@functools.cache
def compiled_look() -> Callable[[Tensor], object]:
    """Return :func:`look_at` compiled by torch."""
    torch._dynamo.config.recompile_limit = 32  # one graph per dtype and state of autograd and autocast
    return torch.compile(look_at, dynamic=True)


@contextmanager
def anomalies() -> Iterator[None]:
    """Detect anomalies without torch's warning that this is slow: that is what is measured."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.autograd.detect_anomaly(check_nan=True):
            yield


def measure(name: str, sizes: gpt.Config, batch: int, repeats: int, compile_peers: bool) -> Iterator[Row]:
    """Measure the shares inside the calls by interval, then whole steps against the unwatched one."""
    with tempfile.TemporaryDirectory() as folder:
        recorded, plain = Recorded(sizes, batch, Path(folder)), Training(sizes, batch, PRECISION)
        sampled, between = shares(recorded, repeats * 2)
        for interval, bound in BOUNDS.items():
            share = (sampled + (interval - 1) * between) / interval
            default = " (default)" if interval == DEFAULT else ""
            yield Row(f"{name}: inside the calls, every {interval}{default}", bound, unit="of step", measured=share)
        recorded.monitor._config = TelemetryConfig(record_every=1)
        contexts = {k: v for k, v in peers().items() if compile_peers or "compiled" not in k}
        variants: dict[str, Step] = {"off": partial(steps, plain), "off" + TWIN: partial(steps, plain)}
        variants["recorder"] = partial(steps, recorded)
        variants |= {peer: partial(steps, plain, context) for peer, context in contexts.items()}
        turns = Turns(variants, repeats)
        for variant in ("recorder", *contexts):
            row = Row(f"{name}: whole step, {variant}, every step", unit="x")
            yield turns.fill(row, variant, "off")


def steps(
    training: Training, context: Callable[[Training], AbstractContextManager[object]] = lambda _: nullcontext()
) -> None:
    with context(training):
        for _ in range(STEPS):
            training.step()


def run(argv: list[str]) -> int:
    """Measure and print. Always returns 0: missed targets are results, not failures."""
    command = "mptrain bench telemetry"
    parser = arguments(command, __doc__)
    parser.add_argument("--repeats", type=int, default=5, help="repetitions of a measurement (default 5)")
    args = parser.parse_args(argv)
    with one_thread():
        report = Report(args.json, machine(command, argv))
        for name, (sizes, batch) in (TINY if args.dry_run else MODELS).items():
            for row in measure(name, sizes, batch, 1 if args.dry_run else args.repeats, not args.dry_run):
                report.add(row)
    return 0

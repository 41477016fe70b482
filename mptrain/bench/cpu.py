"""``mptrain bench cpu``: what the emulation, the kernels and the trainer cost on this CPU.

One torch thread. Figures are process CPU time; wall time stands beside them for information. Variants take turns
within each repetition, and the reference runs twice in each (its A/A twin: what differs between the two is noise). A
figure is the median over the repetitions of the paired ratio or difference, so that a machine that slows down slows
both sides. ``--dry-run`` goes the same way with tiny sizes; its figures mean nothing.

Rows: training steps of a 10 M GPT in each precision; quantize-dequantize of FP32 against copying the same bytes; a
trainer step against a loop written by hand, on a model of 952 parameters, where nothing but host work is left.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW

from mptrain import LossScale, Precision, PrecisionPolicy, kernels
from mptrain.formats import Format
from mptrain.loggers import NullSink
from mptrain.models import gpt
from mptrain.optim import OptimConfig, Schedule
from mptrain.precision.policy import LossScaleKind
from mptrain.telemetry.monitor import Monitor, TelemetryConfig
from mptrain.tools.files import write_whole
from mptrain.tools.machine import cpu_name
from mptrain.training.config import TrainerConfig
from mptrain.training.extras import Extras
from mptrain.training.trainer import Trainer

CLIP, EVERY = 1.0, 10
LR = 1e-6  # learns nothing: gradients that vanish become subnormal, and arithmetic slow
TWIN = " (A/A)"
Step = Callable[[], object]


@dataclass(frozen=True)
class Sizes:
    """The sizes that are measured, and how often.

    ``steps``: of the null model, in one measurement: one of them is recorded.
    """

    gpt: gpt.Config = field(default_factory=lambda: gpt.Config(256, 256, n_layer=6, n_head=6, n_embd=384))
    batch: int = 8
    elements: int = 16 << 20
    steps: int = 300
    repeats: int = 9


TINY = Sizes(gpt.Config(256, 16, n_layer=1, n_head=1, n_embd=32), batch=1, elements=1 << 12, steps=20, repeats=2)


@dataclass
class Row:
    """One figure. ``target``: a bound from above or below (``at_most``); None: for information."""

    name: str
    target: float | None = None
    at_most: bool = True
    unit: str = "x"
    measured: float | None = None
    wall: float | None = None
    noise: float | None = None  # the figure of the A/A twin: 1 x or 0 us on a quiet machine
    reason: str = ""

    @property
    def verdict(self) -> str:
        if self.measured is None:
            return f"not measured: {self.reason}"
        if self.target is None:
            return "information"
        return "met" if (self.measured <= self.target if self.at_most else self.measured >= self.target) else "missed"

    def __str__(self) -> str:
        bound = "" if self.target is None else f"{'<=' if self.at_most else '>='} {self.target:g}"
        figures = [f"{'' if value is None else f'{value:.3g}':>8}" for value in (self.measured, self.wall, self.noise)]
        return f"{self.name:56} {self.unit:3}{figures[0]} {bound:>8} {figures[1]}{figures[2]}  {self.verdict}"


class Times:
    """(CPU, wall) seconds of variants that take turns, in reverse order every other time."""

    def __init__(self, variants: dict[str, Step], repeats: int, warmup: int = 1) -> None:
        self.samples: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
        for step in list(variants.values()) * warmup:
            step()
        order = list(variants.items())
        for _ in range(repeats):
            for name, step in order:
                cpu, wall = time.process_time(), time.perf_counter()
                step()
                self.samples[name].append((time.process_time() - cpu, time.perf_counter() - wall))
            order.reverse()

    def fill(self, row: Row, name: str, reference: str, how: Callable[[float, float], float]) -> Row:
        """Median of ``how(variant, reference)`` over the repetitions, in CPU and wall time, and the noise."""
        if not {name, reference} <= self.samples.keys():
            return row
        base, twin = self.samples[reference], self.samples.get(reference + TWIN)
        pairs = list(zip(self.samples[name], base, strict=True))
        row.measured, row.wall = (statistics.median(how(a[clock], b[clock]) for a, b in pairs) for clock in (0, 1))
        if twin:
            row.noise = statistics.median(how(a, b) for (a, _), (b, _) in zip(twin, base, strict=True))
        return row


GPT_VARIANTS = {  # policy, backend, kernels
    **{name + twin: (name, "auto", "") for name in ("bf16", "fp32") for twin in ("", TWIN)},
    "fp8, C kernels": ("fp8", "emulated", "c"),
    "fp8 of torchao": ("fp8", "native", ""),
    "fp16": ("fp16", "emulated", ""),
    "tf32": ("tf32", "emulated", ""),
}
GPT_ROWS = (  # variant, reference, target, at most
    ("fp8, C kernels", "bf16", 1.10, True),
    ("fp8 of torchao", "fp8, C kernels", 3.5, False),
    ("fp16", "fp32", 1.3, True),
    ("tf32", "fp32", None, True),
    ("fp32", "bf16", None, True),
)


def gpt_step(policy: PrecisionPolicy, sizes: Sizes, implementation: str) -> Step:
    """A whole training step of the GPT on one batch of random bytes."""
    torch.manual_seed(0)
    model = gpt.build(sizes.gpt)
    precision = Precision(policy).prepare(model)
    optimizer = AdamW(model.parameters(), lr=LR, fused=True)
    tokens, targets = torch.randint(sizes.gpt.vocab_size, (2, sizes.batch, sizes.gpt.block_size))

    def step() -> None:
        with kernels.use(implementation) if implementation else nullcontext():
            with precision.forward():
                loss = model(tokens, targets)
            precision.backward(loss)
            precision.step(optimizer, clip=CLIP)
        optimizer.zero_grad(set_to_none=True)

    step()  # what cannot run here fails now
    return step


def measure_gpt(sizes: Sizes) -> list[Row]:
    """Training steps of the GPT in every precision. What cannot run here is a row with its reason."""
    variants: dict[str, Step] = {}
    why_not: dict[str, str] = {}
    for name, (policy, backend, implementation) in GPT_VARIANTS.items():
        try:
            made = replace(PrecisionPolicy.named(policy), backend=backend)
            variants[name] = gpt_step(made, sizes, implementation)
        except (ValueError, RuntimeError) as error:
            why_not[name] = str(error).splitlines()[0]
    times = Times(variants, sizes.repeats)
    rows = []
    for name, base, target, at_most in GPT_ROWS:
        row = Row(f"GPT step: {name} / {base}", target, at_most, reason=why_not.get(name) or why_not.get(base, ""))
        rows.append(times.fill(row, name, base, lambda a, b: a / b))
    return rows


def measure_kernels(sizes: Sizes) -> list[Row]:
    """Quantize-dequantize in FP32 into a preallocated tensor, as a share of the rate of a copy."""
    x = torch.randn(sizes.elements)
    out, scale, amax = torch.empty_like(x), torch.tensor(7.25), torch.zeros(())

    def rounded(largest: Tensor | None) -> Step:
        statistics = kernels.Statistics(amax=largest)
        return lambda: kernels.fake_quantize(x, scale, Format.fp8_e4m3, out=out, statistics=statistics)

    passes: dict[str, Step] = {"copy": lambda: out.copy_(x), "given": rounded(None), "amax": rounded(amax)}
    times = Times(passes | {"copy" + TWIN: passes["copy"]}, sizes.repeats * 3)
    title = f"quantize-dequantize ({kernels.implementation(x.device)}) / copy bandwidth"
    rows = Row(f"{title}, scale given", 0.9, at_most=False), Row(f"{title}, with amax", 0.6, at_most=False)
    return [
        times.fill(row, name, "copy", lambda a, b: b / a) for row, name in zip(rows, ("given", "amax"), strict=True)
    ]


class NullModel(nn.Module):
    """Four linear layers, 952 parameters: next to none of its step is arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(16, width) for width in (16, 16, 16, 8)))

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(self.layers(x), targets)


class NullData:
    """The same batch for ever."""

    only: ClassVar[dict[str, Tensor]] = {"x": torch.ones(8, 16), "targets": torch.ones(8, 8)}

    def batch(self, step: int, **_: int) -> dict[str, Tensor]:
        return self.only

    def validation(self, batch_size: int, batches: int) -> Iterator[dict[str, Tensor]]:
        return itertools.repeat(self.only, batches)


def trainer_steps(kind: LossScaleKind, sizes: Sizes) -> Step:
    """``sizes.steps`` more steps of a :class:`Trainer` with everything that a run has but output."""
    torch.manual_seed(0)
    model = NullModel()
    precision = Precision(PrecisionPolicy(loss_scale=LossScale(kind=kind))).prepare(model)
    parts: dict[str, Any] = {"model": model, "precision": precision, "data": NullData(), "sink": NullSink()}
    parts |= {"optimizer": AdamW(model.parameters(), lr=LR, fused=True)}
    parts |= {"schedule": Schedule.of(OptimConfig(lr=LR), 1 << 30)}
    monitor = Monitor(model, precision, TelemetryConfig(EVERY), 1 << 30)
    parts |= {"extras": Extras(every=EVERY, monitor=monitor)}
    trainer = Trainer(TrainerConfig(max_steps=1 << 30, clip=CLIP, eval_every=0), **parts)
    return lambda: trainer.fit(until=trainer.step_number + sizes.steps)


def bare_steps(sizes: Sizes) -> Step:
    """The same steps by hand: model, backward, clip, optimizer."""
    torch.manual_seed(0)
    model, batch = NullModel(), NullData.only
    optimizer = AdamW(model.parameters(), lr=LR, fused=True)
    parameters = list(model.parameters())

    def steps() -> None:
        for _ in range(sizes.steps):
            model(**batch).backward()
            nn.utils.clip_grad_norm_(parameters, CLIP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return steps


def measure_trainer(sizes: Sizes) -> list[Row]:
    """Microseconds a step that the trainer adds to a bare loop."""
    rows = {"none": Row("trainer, added to a bare loop's step", 50.0, unit="us")}
    rows |= {kind: Row(f"trainer with {kind} loss scaling, added", 100.0, unit="us") for kind in ("static", "dynamic")}
    variants = {"bare": bare_steps(sizes), "bare" + TWIN: bare_steps(sizes)}
    variants |= {kind.value: trainer_steps(kind, sizes) for kind in LossScaleKind}
    times = Times(variants, sizes.repeats)
    for name, row in rows.items():
        times.fill(row, name, "bare", lambda a, b: (a - b) / sizes.steps * 1e6)
    step = times.fill(Row("bare loop, a step", unit="us"), "bare", "bare", lambda a, _: a / sizes.steps * 1e6)
    return [replace(step, noise=rows["none"].noise), *rows.values()]


def machine() -> dict[str, str]:
    """Describe the machine that the figures belong to."""
    return {
        "cpu": cpu_name(),
        "cores": str(os.cpu_count()),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def run(argv: list[str]) -> int:
    """Measure and print; 0 whatever the figures are: they are a finding, not a failure."""
    parser = argparse.ArgumentParser(prog="mptrain bench cpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write rows to this file as they come")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes: does it run, not how fast")
    parser.add_argument("--repeats", type=int, help=f"repetitions of a measurement (default {Sizes.repeats})")
    args = parser.parse_args(argv)
    chosen = TINY if args.dry_run else Sizes()
    sizes = replace(chosen, repeats=args.repeats or chosen.repeats)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        report(sizes, args.json, machine() | {"command": " ".join(["mptrain bench cpu", *argv])})
    finally:
        torch.set_num_threads(threads)
    return 0


def report(sizes: Sizes, path: Path | None, about: dict[str, str]) -> None:
    """Print every row as it comes, and write all so far to ``path``."""
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print(f"{'':60}{'CPU':>8} {'target':>8} {'wall':>8}{'A/A':>8}")
    rows: list[dict[str, Any]] = []
    for measure in (measure_trainer, measure_kernels, measure_gpt):
        found = measure(sizes)
        print("\n".join(map(str, found)), flush=True)
        rows += [asdict(row) | {"verdict": row.verdict} for row in found]
        if path is not None:
            write_whole(path, json.dumps({"machine": about, "rows": rows}, indent=1))

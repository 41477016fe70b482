"""``mptrain bench cpu``: the cost of the emulation, the kernels and the trainer on this CPU.

One torch thread. Figures are process CPU time; wall time is shown for information. Variants take turns within
each repetition, and the reference runs twice in each (its A/A twin: what differs between the two is noise). A
figure is the median over the repetitions of the paired ratio or difference, so that a machine that slows down
slows both sides. ``--dry-run`` runs the same code with tiny sizes; its figures mean nothing.

Rows: training steps of a 10 M GPT in each precision; quantize-dequantize of FP32 against copying the same bytes;
a trainer step against a hand-written loop, on a model of 952 parameters, where only host work is left.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW

from mptrain import LossScale, Precision, PrecisionPolicy, kernels
from mptrain.bench.rows import TWIN, Report, Row, Step, Turns, arguments, machine, one_thread
from mptrain.formats import Format
from mptrain.loggers import NullSink
from mptrain.models import gpt
from mptrain.optim import OptimConfig, Schedule
from mptrain.precision.policy import LossScaleKind
from mptrain.telemetry.monitor import Monitor, TelemetryConfig
from mptrain.training.config import TrainerConfig
from mptrain.training.extras import Extras
from mptrain.training.trainer import Trainer

CLIP, EVERY = 1.0, 10
LR = 1e-6  # hardly learns: vanishing gradients would become subnormal, which slows arithmetic


@dataclass(frozen=True)
class Sizes:
    """The sizes to measure, and how often.

    ``steps``: of the null model, in one measurement: one of them is recorded.
    """

    gpt: gpt.Config = field(default_factory=lambda: gpt.Config(256, 256, n_layer=6, n_head=6, n_embd=384))
    batch: int = 8
    elements: int = 16 << 20
    steps: int = 300
    repeats: int = 9


TINY = Sizes(gpt.Config(256, 16, n_layer=1, n_head=1, n_embd=32), batch=1, elements=1 << 12, steps=20, repeats=2)


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


class Training:
    """A GPT with its precision and optimizer, and one batch of random bytes."""

    def __init__(self, sizes: gpt.Config, batch: int, policy: PrecisionPolicy | str) -> None:
        torch.manual_seed(0)
        self.model = gpt.build(sizes)
        self.precision = Precision(policy).prepare(self.model)
        self.optimizer = AdamW(self.model.parameters(), lr=LR, fused=True)
        self.tokens, self.targets = torch.randint(sizes.vocab_size, (2, batch, sizes.block_size))

    def gradients(self) -> None:
        with self.precision.forward():
            loss = self.model(self.tokens, self.targets)
        self.precision.backward(loss)

    def step(self) -> None:
        self.gradients()
        self.precision.step(self.optimizer, clip=CLIP)
        self.optimizer.zero_grad(set_to_none=True)


def gpt_step(policy: PrecisionPolicy, sizes: Sizes, implementation: str) -> Step:
    """Return a whole training step of the GPT on one batch of random bytes."""
    training = Training(sizes.gpt, sizes.batch, policy)

    def step() -> None:
        with kernels.use(implementation) if implementation else nullcontext():
            training.step()

    step()  # fail now if it cannot run here
    return step


def measure_gpt(sizes: Sizes) -> list[Row]:
    """Measure training steps of the GPT in every precision. A row has the reason where one cannot run here."""
    variants: dict[str, Step] = {}
    why_not: dict[str, str] = {}
    for name, (policy, backend, implementation) in GPT_VARIANTS.items():
        try:
            on_backend = replace(PrecisionPolicy.named(policy), backend=backend)
            variants[name] = gpt_step(on_backend, sizes, implementation)
        except (ValueError, RuntimeError) as error:
            why_not[name] = str(error).splitlines()[0]
    turns = Turns(variants, sizes.repeats)
    rows = []
    for name, base, target, at_most in GPT_ROWS:
        row = Row(f"GPT step: {name} / {base}", target, at_most, reason=why_not.get(name) or why_not.get(base, ""))
        rows.append(turns.fill(row, name, base))
    return rows


def measure_kernels(sizes: Sizes) -> list[Row]:
    """Measure quantize-dequantize in FP32 into a preallocated tensor, as a share of the rate of a copy."""
    x = torch.randn(sizes.elements)
    out, scale, amax = torch.empty_like(x), torch.tensor(7.25), torch.zeros(())

    def rounded(largest: Tensor | None) -> Step:
        statistics = kernels.Statistics(amax=largest)
        return lambda: kernels.fake_quantize(x, scale, Format.fp8_e4m3, out=out, statistics=statistics)

    passes: dict[str, Step] = {"copy": lambda: out.copy_(x), "given": rounded(None), "amax": rounded(amax)}
    turns = Turns(passes | {"copy" + TWIN: passes["copy"]}, sizes.repeats * 3)
    title = f"quantize-dequantize ({kernels.implementation(x.device)}) / copy bandwidth"
    rows = Row(f"{title}, scale given", 0.9, at_most=False), Row(f"{title}, with amax", 0.6, at_most=False)
    return [
        turns.fill(row, name, "copy", lambda a, b: b / a) for row, name in zip(rows, ("given", "amax"), strict=True)
    ]


class NullModel(nn.Module):
    """Four linear layers, 952 parameters: step time is almost pure host overhead."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(16, width) for width in (16, 16, 16, 8)))

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(self.layers(x), targets)


class NullData:
    """The same batch at every step."""

    only: ClassVar[dict[str, Tensor]] = {"x": torch.ones(8, 16), "targets": torch.ones(8, 8)}

    def batch(self, step: int, **_: int) -> dict[str, Tensor]:
        return self.only

    def validation(self, batch_size: int, batches: int) -> Iterator[dict[str, Tensor]]:
        return itertools.repeat(self.only, batches)


def trainer_steps(kind: LossScaleKind, sizes: Sizes) -> Step:
    """Return ``sizes.steps`` more steps of a :class:`Trainer` with everything that a run has except output."""
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
    """Return the same steps as a bare loop: model, backward, clip, optimizer."""
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
    """Measure the microseconds per step that the trainer adds to a bare loop."""
    rows = {"none": Row("trainer, added to a bare loop's step", 50.0, unit="us")}
    rows |= {kind: Row(f"trainer with {kind} loss scaling, added", 100.0, unit="us") for kind in ("static", "dynamic")}
    variants = {"bare": bare_steps(sizes), "bare" + TWIN: bare_steps(sizes)}
    variants |= {kind.value: trainer_steps(kind, sizes) for kind in LossScaleKind}
    turns = Turns(variants, sizes.repeats)
    added = [turns.fill(row, name, "bare", lambda a, b: (a - b) / sizes.steps * 1e6) for name, row in rows.items()]
    step = turns.fill(Row("bare loop, a step", unit="us"), "bare", "bare", lambda a, _: a / sizes.steps * 1e6)
    return [replace(step, noise=added[0].noise), *added]


def run(argv: list[str]) -> int:
    """Measure and print. Always returns 0: missed targets are results, not failures."""
    command = "mptrain bench cpu"
    parser = arguments(command, __doc__)
    parser.add_argument("--repeats", type=int, help=f"repetitions of a measurement (default {Sizes.repeats})")
    args = parser.parse_args(argv)
    chosen = TINY if args.dry_run else Sizes()
    sizes = replace(chosen, repeats=args.repeats or chosen.repeats)
    with one_thread():
        report = Report(args.json, machine(command, argv), f"{'':60}{'CPU':>8} {'target':>8} {'wall':>8}{'A/A':>8}")
        for measure in (measure_trainer, measure_kernels, measure_gpt):
            for row in measure(sizes):
                report.add(row)
    return 0

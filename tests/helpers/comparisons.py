"""Comparisons as the report gets them, made up: figures of the size that real runs have, and every odd case."""

from __future__ import annotations

import math
import random

from mptrain.report.compare.comparison import (
    Comparison,
    Curve,
    Group,
    Health,
    Interval,
    Kind,
    Loss,
    Memory,
    RunRow,
    Speed,
    Variant,
    Verdict,
)
from mptrain.runs.read import Status

STEPS = list(range(0, 2001, 10))
RULES = [
    "Equivalent: the 95 % interval of the difference lies within the margin of 0.5 % on either side of 0.",
    "Worse: the interval lies above 0 and its middle outside the margin.",
    "Undecided: neither; more seeds make the interval narrower.",
]


def loss_at(step: int, seed: int = 0, end: float = 2.4) -> float:
    """Nats after ``step`` steps: falls from 5.5 towards ``end``, with a ripple of its own for every seed."""
    return end + 3.1 * math.exp(-step / 260) + 0.004 * math.sin(step / 37 + seed)


def curve(end: float = 2.4, seed: int = 0, last: int = 2000) -> Curve:
    steps = [step for step in STEPS if step <= last]
    values = [loss_at(step, seed, end) for step in steps]
    width = [0.006 + 0.05 * math.exp(-step / 100) for step in steps]
    low = [v - w for v, w in zip(values, width, strict=True)]
    return Curve(steps, values, low, [v + w for v, w in zip(values, width, strict=True)])


def difference(end: float, seed: int = 0, last: int = 2000) -> Curve:
    """Relative to the baseline, which ends at 2.4: it opens slowly, and the first steps are noise."""
    noise = random.Random(seed)
    steps = [step for step in STEPS if step <= last]
    shift = [(end / 2.4 - 1) * (1 - math.exp(-step / 500)) for step in steps]
    return Curve(
        steps, [s + noise.gauss(0, 0.0006 + 0.03 * math.exp(-t / 40)) for s, t in zip(shift, steps, strict=True)]
    )


def noise_band() -> Curve:
    width = [0.002 + 0.05 * math.exp(-step / 60) for step in STEPS]
    return Curve(STEPS, [0.0] * len(STEPS), [-w for w in width], width)


def around(mean: float, half: float, n: int = 3) -> Interval:
    return Interval(mean, mean - half, mean + half, n, "paired t")


def runs(name: str, losses: list[float], status: Status = Status.finished, why: str = "") -> list[RunRow]:
    done = status is Status.finished
    return [
        RunRow(
            name=f"{name}-s{seed}",
            folder=f"runs/{name}-s{seed}",
            seed=seed,
            status=status,
            steps=2000 if done else 640,
            max_steps=2000,
            why=why,
            train_loss=value - 0.01,
            val_loss=value if done else None,
            tokens_per_s=41234.5678 + seed,
            peak_memory_gib=3.21 + 0.001 * seed,
            skipped_steps=seed,
        )
        for seed, value in enumerate(losses)
    ]


def layers(part: float, overflow: int = 0) -> list[dict[str, object]]:
    names = [f"blocks.{i}.{what}" for i in range(6) for what in ("attn.qkv", "attn.proj", "mlp.up", "mlp.down")]
    return [
        {
            "layer": name,
            "role": role,
            "overflow_events": overflow if name.endswith("mlp.down") and role == "grad_output" else 0,
            "underflow_frac": part * 10.0 ** -(index % 5) * (index % 7 != 0),
        }
        for index, (name, role) in enumerate((n, r) for n in names for r in ("input", "weight", "grad_output"))
    ]


def events() -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    for seed in range(3):
        for step in (3, 4, 5, 6, 700 + 40 * seed, 1400):
            found.append(
                {"seed": seed, "step": step, "event": "skipped", "reason": "overflow", "layer": "blocks.3.mlp.up"}
            )
            found.append({"seed": seed, "step": step, "event": "scale_backed_off", "scale": 2.0**14})
        found += [
            {"seed": seed, "step": step, "event": "scale_grew", "scale": 2.0**15} for step in (300, 600, 900, 1200)
        ]
    return [*found, {"seed": 1, "step": 1500, "event": "alarm", "reason": "32 steps skipped in a row: lower optim.lr"}]


def scale() -> Curve:
    jumps = {0: 16, 10: 13, 300: 14, 600: 15, 700: 14, 900: 15, 1200: 16, 1400: 15, 1800: 16}
    power, values = 16, []
    for step in STEPS:
        power = jumps.get(step, power)
        values.append(2.0**power)
    return Curve(STEPS, values)


ROLES = {"weights": 1.4, "gradients": 1.4, "optimizer": 2.8, "activations": 3.1, "batch": 0.02}


def baseline() -> Variant:
    return Variant(
        "fp32",
        Verdict(Kind.baseline, "the baseline"),
        backend="autocast",
        loss=Loss(val=2.45234567, train=2.4001),
        speed=Speed(41234.5678, 1.0, 0.99, 1.01, 0.31),
        memory=Memory(8.9, 1.0, ROLES),
        health=Health(coverage={"fp32": 1.0}),
        curve=curve(),
        runs=runs("fp32", [2.451, 2.452, 2.453]),
    )


def fp16() -> Variant:
    return Variant(
        "fp16",
        Verdict(Kind.equivalent, "equivalent", "+0.02 % [-0.11, +0.15] over 3 seeds lies within ±0.5 %"),
        backend="autocast",
        loss=Loss(2.4528123, 2.4003, None, None, around(0.0002, 0.0013), around(0.0001, 0.0009)),
        speed=Speed(92345.1, 2.24, 2.19, 2.3, 0.36, 2.9, 0.65),
        memory=Memory(6.3, 0.71, {**ROLES, "activations": 0.6}),
        health=Health(0, 0.00031, 21, layers(1e-3), events(), 37, scale(), {"fp16": 0.97, "fp32": 0.03}),
        curve=curve(2.401, 1),
        difference=difference(2.401, 1),
        runs=runs("fp16", [2.452, 2.453, 2.4531]),
    )


def fp8() -> Variant:
    worse = Loss(
        2.4797, 2.4264, 2.4611, None, around(0.0112, 0.0031), around(0.011, 0.002), None, 430, 22_000_000, 1.31
    )
    return Variant(
        "fp8",
        Verdict(Kind.worse, "worse by 1.1 %", "+1.12 % [+0.81, +1.43] over 3 seeds lies above 0.5 %"),
        backend="emulated",
        emulated=True,
        loss=worse,
        speed=Speed(8123.4, note="emulated: no FP8 unit here; numerics are exact, speed is not"),
        memory=Memory(9.4, 1.06),
        health=Health(1234, 0.0213, 0, layers(0.3, 17), coverage={"fp8_e4m3": 0.61, "fp8_e5m2": 0.31, "bf16": 0.08}),
        curve=curve(2.427, 2),
        difference=difference(2.427, 2),
        runs=runs("fp8", [2.478, 2.48, 2.481]),
    )


def diverged() -> Variant:
    steps = STEPS[:80]
    values = [loss_at(s, 4, 2.5) if s < 400 else 3.3 * 1.35 ** ((s - 400) / 10) for s in steps[:75]] + [math.nan] * 5
    gone = Curve(steps, values)
    relative = Curve(steps, [v / loss_at(s) - 1 for s, v in zip(steps, values, strict=True)])
    return Variant(
        "fp8 lr=3e-3",
        Verdict(Kind.diverged, "diverged at step 750", "the loss of seed 0 became NaN"),
        backend="native",
        loss=Loss(outside_step=410),
        health=Health(
            99, 0.4, 0, layers(0.9, 400), [{"seed": 0, "step": 750, "event": "alarm", "reason": "loss is NaN"}]
        ),
        curve=gone,
        difference=relative,
        runs=runs("fp8-lr", [math.nan], Status.failed, "loss became NaN at step 750"),
    )


def running() -> Variant:
    return Variant(
        "bf16",
        Verdict(Kind.none, "no verdict: no finished run"),
        backend="autocast",
        curve=curve(2.402, 3, 640),
        difference=difference(2.402, 3, 640),
        runs=runs("bf16", [2.9], Status.running, "at step 640 of 2,000"),
    )


def realistic() -> Comparison:
    """A baseline and four variants: one equivalent, one emulated and worse, one diverged, one still running."""
    variants = [baseline(), fp16(), fp8(), diverged(), running()]
    band = Curve(STEPS, curve().values, [v - 0.01 for v in curve().values], [v + 0.01 for v in curve().values])
    group = Group("", "gpt", "validation loss", "tokens", "fp32", variants, band, noise_band(), 25)
    notes = ["runs/old left out: its summary.json has no fingerprint"]
    return Comparison("gpt-tiny on stdlib: 5 variants", 0.005, [group], RULES, notes)


def crowded(count: int = 20) -> Comparison:
    """Many variants with long names, as a sweep makes them, in a second group beside a small one."""
    kinds = [Kind.equivalent, Kind.worse, Kind.undecided]
    variants = [baseline()]
    for i in range(count - 1):
        label = f"fp8-delayed quantization.history={2**i} quantization.margin={i % 3} keep=blocks.(0|{i}).*"
        mean = 0.0007 * (i - 6)
        variants.append(
            Variant(
                label,
                Verdict(kinds[i % 3], kinds[i % 3].value, f"{100 * mean:+.2f} % over 3 seeds"),
                backend="transformer_engine",
                loss=Loss(
                    2.45 * (1 + mean), 2.4, None, None, around(mean, 0.0004 * (1 + i % 4)), outside_step=400 + 50 * i
                ),
                speed=Speed(5e4, 1.0 + 0.05 * i, 0.98 + 0.05 * i, 1.03 + 0.05 * i),
                memory=Memory(6.0 + 0.1 * i, 0.7 + 0.01 * i, {**ROLES, "FP8 copies of weights": 0.1 * i}),
                health=Health(
                    i, 10.0**-i, i, layers(10.0**-i, i), events() if i % 4 == 0 else [], 0, scale(), {"fp8_e4m3": 1}
                ),
                curve=curve(2.4 * (1 + mean), i),
                difference=difference(2.4 * (1 + mean), i),
                runs=runs(f"sweep-{i}", [2.45]),
            )
        )
    big = Group(
        "gpt, 2,000 steps of 16 x 256", "gpt", "validation loss", "tokens", "fp32", variants, noise=noise_band()
    )
    return Comparison("a sweep " + "with a very long title " * 6, 0.005, [big, images()], RULES)


def images() -> Group:
    """Judged by top-1, with one seed: intervals have no ends."""
    one = Interval(-0.004, math.nan, math.nan, 1, "paired t")
    base = Variant("fp32", Verdict(Kind.baseline, "the baseline"), loss=Loss(0.93, 0.8, top1_frac=0.7613))
    other = Variant(
        "bf16",
        Verdict(Kind.undecided, "undecided", "one seed has no interval"),
        loss=Loss(0.94, 0.81, top1_frac=0.7573, top1_delta=one),
        speed=Speed(2100.0, 1.9),
    )
    return Group("resnet50 on images", "image classification", "top-1", "images", "fp32", [base, other])


def degenerate() -> Comparison:
    """Nothing is known: no baseline, no finished run, empty curves, labels that are markup."""
    nasty = "<b>&\"'|`_*"
    empty = Curve([], [])
    unread = RunRow(nasty, f"runs/{nasty}", None, Status.unreadable, why="summary.json: not <JSON> | at all")
    variants = [
        Variant(nasty, Verdict(Kind.none, "no verdict", nasty), curve=empty, difference=empty, runs=[unread]),
        Variant("nan", Verdict(Kind.none, ""), curve=Curve([1, 2], [math.nan, math.nan]), health=Health(scale=empty)),
    ]
    groups = [
        Group("", "gpt", "validation loss", "tokens", None, variants),
        Group("void", "gpt", "top-1", "tokens", None, []),
    ]
    return Comparison(f"a title with {nasty}", 0.01, groups, [], [nasty])

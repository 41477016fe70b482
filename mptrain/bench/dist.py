"""``mptrain bench dist``: what training on several ranks costs beside a loop written by hand in plain torch.

Starts its own ranks on this machine: gloo on CPUs with one torch thread each, NCCL where every rank has a GPU. All
variants live in one process group and take turns, in reverse order every other time. Times are wall time from barrier
to the last rank's end; process CPU time of all ranks stands beside them. A figure is the median over the repetitions of
the paired ratio, and the reference runs twice (its A/A twin: what differs between the two is noise).

Rows: steps of the trainer under DDP and FSDP against the hand-written loop; how long training waits for a checkpoint
that is written in the background, against one it waits for until it is on disk; what each compression of gradients
costs, sends and loses. ``--dry-run`` goes the same way with tiny sizes; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from functools import partial
from multiprocessing import set_forkserver_preload
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes

from mptrain.bench import cpu
from mptrain.bench.by_hand import ByHand
from mptrain.bench.cpu import LR, TWIN, Step
from mptrain.build import assemble
from mptrain.checkpoint import Checkpoints
from mptrain.config import RunConfig
from mptrain.convert import parameter_names
from mptrain.distributed import World
from mptrain.distributed.compression import KINDS, Compression
from mptrain.distributed.layout import DistConfig
from mptrain.distributed.reduction import look_and_send
from mptrain.distributed.watchdog import Watchdog
from mptrain.files import json_text, write_whole
from mptrain.loggers import NullSink
from mptrain.machine import describe, pick_device
from mptrain.models import gpt
from mptrain.optim import OptimConfig
from mptrain.policy import PrecisionPolicy
from mptrain.prepare import Prepared, prepare
from mptrain.telemetry.monitor import TelemetryConfig
from mptrain.trainer import Trainer, TrainerConfig

WRAPPERS = ("ddp", "fsdp")
SLOWER, STALL = 1.03, 0.10  # at most: a step over the hand-written one's, a background save over a synchronous one
SCALE = 2.0**10  # of the loss where gradients are compressed: FP16 is made for a loss scale
MOST_STEPS = 100  # while a checkpoint is written; one that fails never ends


@dataclass(frozen=True)
class Sizes:
    """What is measured, and how often. ``steps``: in one measurement, ``micro_batches`` of each rank in a step.
    ``saved``: the model of the checkpoints."""

    gpt: gpt.Config = field(default_factory=lambda: gpt.Config(256, 256, n_layer=4, n_head=4, n_embd=256))
    batch: int = 4
    micro_batches: int = 2
    saved: gpt.Config = field(default_factory=lambda: gpt.Config(50304, 64, n_layer=12, n_head=12, n_embd=768))
    steps: int = 3
    repeats: int = 7


SMALLEST = gpt.Config(256, 16, n_layer=1, n_head=1, n_embd=32)
TINY = Sizes(SMALLEST, batch=1, micro_batches=2, saved=SMALLEST, steps=2, repeats=1)


@dataclass
class Row(cpu.Row):
    """One figure, of wall time if it is one of time. ``cpu``: the same of CPU time, for information."""

    cpu: float | None = None

    def __str__(self) -> str:
        shown = replace(self, wall=self.cpu)
        return cpu.Row.__str__(shown)


def timed(work: Step) -> tuple[float, float]:
    """(wall, CPU) seconds of ``work`` on all ranks: the slowest one's, and of all together. A collective."""
    ranks = World()
    ranks.barrier()
    cpu_s, wall_s = time.process_time(), time.perf_counter()
    work()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    found = ranks.gather((time.perf_counter() - wall_s, time.process_time() - cpu_s))
    return max(wall for wall, _ in found), sum(cpu for _, cpu in found)


class Turns:
    """(wall, CPU) seconds of variants that take turns."""

    def __init__(self, variants: dict[str, Step], repeats: int) -> None:
        self.samples: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
        for work in variants.values():
            timed(work)
        order = list(variants.items())
        for _ in range(repeats):
            for name, work in order:
                self.samples[name].append(timed(work))
            order.reverse()

    def fill(self, row: Row, name: str, reference: str) -> Row:
        """The median ratio of ``name`` to ``reference``, of wall and CPU time, and of its twin in wall time."""
        wall, cpu = (self.ratio(name, reference, clock) for clock in (0, 1))
        return replace(row, measured=wall, cpu=cpu, noise=self.ratio(reference + TWIN, reference))

    def ratio(self, name: str, reference: str, clock: int = 0) -> float:
        pairs = zip(self.samples[name], self.samples[reference], strict=True)
        return statistics.median(a[clock] / b[clock] for a, b in pairs)

    def seconds(self, name: str) -> float:
        return statistics.median(wall for wall, _ in self.samples[name])


def settings(wrapper: str, sizes: Sizes, device: str, model: gpt.Config, telemetry: TelemetryConfig) -> RunConfig:
    """BF16 training that learns nothing, so that every step is like the first."""
    accumulate = sizes.micro_batches * World().size
    return RunConfig(
        precision=PrecisionPolicy.named("bf16"),
        model={"kind": "gpt", **asdict(model)},
        data={"kind": "stdlib"},
        optim=OptimConfig(lr=LR, warmup_frac=0.0),
        trainer=TrainerConfig(max_steps=1 << 30, batch_size=sizes.batch, accumulate=accumulate, eval_every=0),
        telemetry=telemetry,
        dist=DistConfig(wrapper),
        device=device,
        baseline="none",
    )


def repeated(step: Step, times: int) -> Step:
    def steps() -> None:
        for _ in range(times):
            step()

    return steps


def trainer_of(prepared: Prepared) -> Trainer:
    """Ours, ready to step."""
    trainer = assemble(prepared, NullSink())
    trainer.model.train()
    return trainer


def measure_steps(sizes: Sizes, device: str) -> Iterator[Row]:
    """The trainer's step over the hand-written one: telemetry off; as it is by default, between recorded steps."""
    quiet = TelemetryConfig(every=sizes.steps, record_every=0)  # each measurement reads the losses back once
    for wrapper in WRAPPERS:
        with ExitStack() as stack:
            prepared = prepare(settings(wrapper, sizes, device, sizes.gpt, quiet))
            usual = replace(prepared, config=replace(prepared.config, telemetry=TelemetryConfig()))
            watched = trainer_of(usual)
            watch = watched.watch = Watchdog(prepared.ranks, prepared.config.dist.timeout_s)
            stack.callback(watch.close)
            hands = [ByHand(wrapper, prepared) for _ in range(2)]
            variants: dict[str, Step] = {"hand": hands[0].step, "ours": trainer_of(prepared).step}
            variants |= {"defaults": watched.step, "hand" + TWIN: hands[1].step}
            turns = Turns({name: repeated(step, sizes.steps) for name, step in variants.items()}, sizes.repeats)
        yield turns.fill(Row(f"{wrapper} step: trainer / by hand", SLOWER), "ours", "hand")
        title = f"{wrapper} step: trainer with telemetry and watchdog / by hand"
        yield turns.fill(Row(title), "defaults", "hand")
        yield Row(f"{wrapper} step: by hand", unit="s", measured=turns.seconds("hand") / sizes.steps)


def measure_checkpoints(sizes: Sizes, device: str, folder: Path) -> Iterator[Row]:
    """What training waits for when it saves."""
    small = replace(sizes, batch=1, micro_batches=1)
    for wrapper in reversed(WRAPPERS):
        prepared = prepare(settings(wrapper, small, device, sizes.saved, TelemetryConfig(record_every=0)))
        saving = Saving(trainer_of(prepared), folder / wrapper)
        first = saving.background()
        for _ in range(sizes.repeats):
            saving.repeat()
        millions = sum(p.numel() for p in prepared.shell.parameters()) / 1e6
        yield from saving.rows(f"checkpoint of {millions:.3g} M, {wrapper}", first)
        del saving
        if prepared.ranks.first:
            shutil.rmtree(folder / wrapper)
        prepared.ranks.barrier()


class Saving:
    """A trainer that saves now one way, now the other, each time after a step more."""

    def __init__(self, trainer: Trainer, folder: Path) -> None:
        self.trainer = trainer
        self.kinds = {
            background: Checkpoints(folder / str(background), 1, trainer.ranks, background=background)
            for background in (False, True)
        }
        self.samples: dict[str, list[float]] = {}
        for _ in range(3):
            trainer.step()

    def save(self, background: bool) -> float:
        """Seconds that training waits."""
        self.trainer.checkpoints = self.kinds[background]
        return timed(self.trainer.save)[0]

    def repeat(self) -> None:
        """Everything once."""
        for twin in ("", TWIN):
            self.add("step" + twin, timed(self.trainer.step)[0])
            self.add("synchronous" + twin, self.save(background=False))
        timed(self.trainer.step)
        self.add("stall", self.background())

    def background(self) -> float:
        """The stall of a background save; steps go on until it is on disk."""
        begin = time.perf_counter()
        stall, path = self.save(background=True), self.kinds[True].path(self.trainer.step_number)
        steps = []
        while len(steps) < MOST_STEPS and self.trainer.ranks.share(not path.exists()):
            steps.append(timed(self.trainer.step)[0])
        if len(steps) > 1:  # the last one went on when all was written
            self.add("step while writing", statistics.median(steps[:-1]))
        self.kinds[True].wait()
        self.trainer.ranks.barrier()
        self.add("written", time.perf_counter() - begin)
        return stall

    def add(self, name: str, seconds: float) -> None:
        self.samples.setdefault(name, []).append(seconds)

    def ratio(self, name: str, reference: str) -> float:
        pairs = zip(self.samples[name], self.samples[reference], strict=True)
        return statistics.median(a / b for a, b in pairs)

    def rows(self, title: str, first: float) -> Iterator[Row]:
        noise = self.ratio("synchronous" + TWIN, "synchronous")
        synchronous, step = (statistics.median(self.samples[name]) for name in ("synchronous", "step"))
        stall = self.ratio("stall", "synchronous")
        yield Row(f"{title}: stall of a background save / synchronous save", STALL, measured=stall, noise=noise)
        yield Row(f"{title}: the first one's, which allocates the copies", measured=first / synchronous)
        yield Row(f"{title}: synchronous save", unit="s", measured=synchronous)
        yield Row(
            f"{title}: background save, until on disk", unit="s", measured=statistics.median(self.samples["written"])
        )
        row = Row(f"{title}: step while it is written / step", noise=self.ratio("step" + TWIN, "step"))
        if "step while writing" in self.samples:
            yield replace(row, measured=statistics.median(self.samples["step while writing"]) / step)
        else:
            yield replace(row, reason="no step ended before the checkpoint was written")


def measure_compression(sizes: Sizes, device: str) -> Iterator[Row]:
    """A step, the bytes a rank sends in it, and the accuracy of the mean gradient, by kind of compression."""
    prepared = prepare(settings("ddp", sizes, device, sizes.gpt, TelemetryConfig(record_every=0)))
    trainings: dict[str, tuple[ByHand, Compression]] = {}
    for name in (*KINDS, "none" + TWIN):
        training = ByHand("ddp", prepared, SCALE)
        names = parameter_names(training.model)
        compression = Compression(name.removesuffix(TWIN), prepared.ranks, names)
        look_and_send(training.ddp, names, {}, compression.send)
        trainings[name] = training, compression
    variants = {name: repeated(training.step, sizes.steps) for name, (training, _) in trainings.items()}
    turns = Turns(dict(variants), sizes.repeats)
    for kind in KINDS:
        training, compression = trainings[kind]
        compression.bill()  # of steps that PowerSGD sends plainly, too
        training.step()
        bill = compression.bill()
        compression.sampling = True
        variants[kind]()
        bill |= {"comm/sqnr_db": compression.bill().get("comm/sqnr_db", 0.0)}
        if kind != "none":
            yield turns.fill(Row(f"compress={kind}: step / none"), kind, "none")
        yield Row(f"compress={kind}: sent by a rank in a step", unit="MB", measured=bill["comm/bytes_per_step"] / 1e6)
        if kind != "none":
            share = bill.get("comm/bytes_frac")
            yield Row(f"compress={kind}: bytes / none", measured=share, reason="a single rank sends nothing")
            yield Row(f"compress={kind}: SQNR of the mean gradient", unit="dB", measured=bill["comm/sqnr_db"])


def report(sizes: Sizes, device: str, folder: Path, path: Path | None, command: str) -> None:
    """Measure; the first rank prints every row as it comes, and writes all so far to ``path``."""
    first, size = World().first, World().size
    about = cpu.machine() | {"ranks": str(size), "device": describe(pick_device(device)), "command": command}
    if first:
        print(", ".join(f"{key} {value}" for key, value in about.items()))
        print(f"{'':60}{'wall':>8} {'target':>8} {'CPU':>8}{'A/A':>8}")
    parts: list[Callable[[], Iterator[Row]]] = [partial(measure_steps, sizes, device)]
    parts += [partial(measure_compression, sizes, device), partial(measure_checkpoints, sizes, device, folder)]
    rows: list[dict[str, Any]] = []
    for measure in parts:
        for row in measure():
            rows.append(asdict(row) | {"verdict": row.verdict})
            if first:
                print(row, flush=True)
                if path is not None:
                    write_whole(path, json_text({"machine": about, "rows": rows}, indent=1))


def _rank(rank: int, size: int, device: str, folder: str, *args: Any) -> None:
    """One of the processes."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    where = pick_device(device)
    backend = "gloo"
    if where.type == "cuda":
        torch.cuda.set_device(where)
        backend = "cpu:gloo,cuda:nccl"
    store = dist.FileStore(f"{folder}/store", size)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timedelta(minutes=5))
    report(args[0], device, Path(folder), *args[1:])
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads can abort a normal exit


def run(argv: list[str]) -> int:
    """Start the ranks, which measure and print; 0 whatever the figures are: they are a finding, not a failure."""
    parser = argparse.ArgumentParser(prog="mptrain bench dist", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write rows to this file as they come")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes: does it run, not how fast")
    parser.add_argument("--repeats", type=int, help=f"repetitions of a measurement (default {Sizes.repeats})")
    parser.add_argument("--ranks", type=int, default=2, help="processes to start (default %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: GPUs if there is one for each rank")
    parser.add_argument("--folder", type=Path, help="where checkpoints are written (default: that of temporary files)")
    args = parser.parse_args(argv)
    chosen = TINY if args.dry_run else Sizes()
    sizes = replace(chosen, repeats=args.repeats or chosen.repeats)
    gpus = torch.cuda.device_count()
    device = args.device or ("cuda" if 0 < args.ranks <= gpus else "cpu")
    if device == "cuda" and args.ranks > gpus:
        raise ValueError(f"--ranks {args.ranks} on {gpus} GPUs: give --device cpu, or --ranks {max(1, gpus)}")
    command = " ".join(["mptrain bench dist", *argv])
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        set_forkserver_preload([__name__])  # everything is imported once
        given = args.ranks, device, folder, sizes, args.json, command
        start_processes(_rank, given, nprocs=args.ranks, start_method="forkserver")  # type: ignore[no-untyped-call]
    return 0

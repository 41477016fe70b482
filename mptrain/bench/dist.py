"""``mptrain bench dist``: the cost of training on several ranks, relative to a hand-written loop in plain torch.

Starts its own ranks on this machine: gloo on CPUs with one torch thread each, NCCL where every rank has a GPU. All
variants live in one process group and take turns, in reverse order every other time. Times are wall time from barrier
to the last rank's end; process CPU time of all ranks is shown next to it. A figure is the median over the repetitions
of the paired ratio, and the reference runs twice (its A/A twin: what differs between the two is noise).

Rows: steps of the trainer under DDP and FSDP against the hand-written loop; the stall of a checkpoint written in
the background, against that of a synchronous one; the cost, the bytes and the error of each compression of
gradients. ``--dry-run`` runs the same code with tiny sizes; its figures mean nothing.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta
from functools import partial
from multiprocessing import set_forkserver_preload
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from mptrain.bench.by_hand import ByHand
from mptrain.bench.ranked import TINY, WRAPPERS, Row, Sizes, repeated, settings, timed, trainer_of
from mptrain.bench.rows import TWIN, Report, Step, Turns, arguments, machine
from mptrain.bench.saving import measure_checkpoints
from mptrain.build.preflight import prepare
from mptrain.distributed import World
from mptrain.distributed.compression import KINDS, Compression
from mptrain.distributed.reduction import look_and_send
from mptrain.distributed.watchdog import Watchdog
from mptrain.telemetry.monitor import TelemetryConfig
from mptrain.tools.machine import describe, pick_device
from mptrain.tools.modules import parameter_names

COMMAND = "mptrain bench dist"
SLOWER = 1.03  # upper bound of a step's ratio to the hand-written one
SCALE = 2.0**10  # loss scale where gradients are compressed: FP16 needs one


def measure_steps(sizes: Sizes, device: str) -> Iterator[Row]:
    """Measure the trainer's step over the hand-written one: telemetry off; then as it is by default, between
    recorded steps."""
    quiet = TelemetryConfig(every=sizes.steps, record_every=0)  # so that each measurement reads the losses back once
    for wrapper in WRAPPERS:
        with ExitStack() as stack:
            prepared = prepare(settings(wrapper, sizes, device, sizes.model, quiet))
            usual = replace(prepared, config=replace(prepared.config, telemetry=TelemetryConfig()))
            watched = trainer_of(usual)
            watch = Watchdog(prepared.ranks, prepared.config.dist.timeout_s)
            stack.callback(watch.close)
            watched.fit(until=0, watch=watch)  # beats from here on
            hands = [ByHand(wrapper, prepared) for _ in range(2)]
            variants: dict[str, Step] = {"hand": hands[0].step, "ours": trainer_of(prepared).step}
            variants |= {"defaults": watched.step, "hand" + TWIN: hands[1].step}
            works = {name: repeated(step, sizes.steps) for name, step in variants.items()}
            turns = Turns(works, sizes.repeats, timed)
        yield turns.fill(Row(f"{wrapper} step: trainer / by hand", SLOWER), "ours", "hand")
        title = f"{wrapper} step: trainer with telemetry and watchdog / by hand"
        yield turns.fill(Row(title), "defaults", "hand")
        yield Row(f"{wrapper} step: by hand", unit="s", measured=turns.seconds("hand") / sizes.steps)


def measure_compression(sizes: Sizes, device: str) -> Iterator[Row]:
    """Measure a step, the bytes a rank sends in it, and the accuracy of the mean gradient, by kind of compression."""
    prepared = prepare(settings("ddp", sizes, device, sizes.model, TelemetryConfig(record_every=0)))
    trainings: dict[str, tuple[ByHand, Compression]] = {}
    for name in (*KINDS, "none" + TWIN):
        training = ByHand("ddp", prepared, SCALE)
        names = parameter_names(training.model)
        compression = Compression(name.removesuffix(TWIN), prepared.ranks, names)
        look_and_send(training.ddp, names, {}, compression.send)
        trainings[name] = training, compression
    variants = {name: repeated(training.step, sizes.steps) for name, (training, _) in trainings.items()}
    turns = Turns(dict(variants), sizes.repeats, timed)
    for kind in KINDS:
        training, compression = trainings[kind]
        compression.bill()  # discard the bill so far: PowerSGD sends its first steps uncompressed
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


def report(sizes: Sizes, device: str, folder: Path, path: Path | None, argv: list[str]) -> None:
    """Measure; the first rank prints every row as it comes, and writes all so far to ``path``."""
    parts: list[Callable[[], Iterator[Row]]] = [partial(measure_steps, sizes, device)]
    parts += [partial(measure_compression, sizes, device), partial(measure_checkpoints, sizes, device, folder)]
    rows = None
    if World().first:
        about = machine(COMMAND, argv) | {"ranks": str(World().size), "device": describe(pick_device(device))}
        rows = Report(path, about, f"{'':60}{'wall':>8} {'target':>8} {'CPU':>8}{'A/A':>8}")
    for measure in parts:
        for row in measure():
            if rows is not None:
                rows.add(row)


def _rank(rank: int, size: int, device: str, folder: str, *args: Any) -> None:
    """Join the process group and measure; the program of one process."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    where = pick_device(device)
    backend = "gloo"
    if where.type == "cuda":
        torch.cuda.set_device(where)
        backend = "cpu:gloo,cuda:nccl"
    store = dist.FileStore(f"{folder}/store", size)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timedelta(minutes=5))
    report(args[0], device, Path(folder), *args[1:])
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads can abort a normal exit


def run(argv: list[str]) -> int:
    """Start the ranks, which measure and print. Always returns 0: missed targets are results, not failures."""
    parser = arguments(COMMAND, __doc__)
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
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        set_forkserver_preload([__name__])  # imports happen once, in the fork server
        given = args.ranks, device, folder, sizes, args.json, argv
        start_processes(_rank, given, nprocs=args.ranks, start_method="forkserver")  # type: ignore[no-untyped-call]
    return 0

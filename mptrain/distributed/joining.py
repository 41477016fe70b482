"""Join the processes of one attempt to a process group, and leave it.

torchrun keeps its store through the restarts of its processes, with all that dead ones have written there: a new rank
that is quick finds the address of its neighbour's predecessor, waits for it and gives up (seen with torch 2.13, in
every second restart). So the ranks first agree on a part of the store of their own: each says hello under a name that
no other process ever had, and rank 0 answers those names until all have answered back.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from mptrain.distributed import ALONE, Ranks, World
from mptrain.distributed.layout import DistConfig, Layout
from mptrain.tools.launcher import world_size

POLL_S = 0.02


def join(config: DistConfig, device: torch.device) -> Ranks:
    """Join the other processes (torchrun says where they are). One process without a wrapper joins nothing.

    ValueError if so many processes cannot be laid out as ``config`` says, or not all of them come.
    """
    size = world_size()
    Layout.of(config, size)
    if size == 1 and config.kind == "single":
        return ALONE
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        timeout = timedelta(seconds=config.timeout_s + 30)  # longer than the watchdog, whose message says more
        store: Any = torch._C._distributed_c10d.HashStore()
        rank = 0
        if size > 1:
            shared, rank, size = next(rendezvous("env://", timeout=timeout))
            store = meet(shared, rank, size, config.timeout_s)
        dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=size)
    return World()


def meet(store: Any, rank: int, size: int, timeout_s: float) -> Any:
    """The part of ``store`` of these ``size`` processes alone. ValueError if some do not come in time."""
    name, deadline = uuid.uuid4().hex, time.monotonic() + timeout_s
    store = dist.distributed_c10d.PrefixStore("mptrain", store)
    if rank > 0:
        store.set(f"hello/{rank}", name)
        _wait_for(lambda: store.check([f"call/{name}"]), deadline, "rank 0", timeout_s)
        room = store.get(f"call/{name}").decode()
        store.set(f"{room}/{rank}", "here")
        return dist.distributed_c10d.PrefixStore(room, store)
    called: set[str] = set()
    missing = set(range(1, size))

    def all_here() -> bool:
        for other in [rank for rank in missing if store.check([f"hello/{rank}"])]:
            greeting = store.get(f"hello/{other}").decode()  # perhaps a dead one's: it will not answer
            if greeting not in called:
                store.set(f"call/{greeting}", name)
                called.add(greeting)
            if store.check([f"{name}/{other}"]):
                missing.discard(other)
        return not missing

    _wait_for(all_here, deadline, "the other ranks", timeout_s)
    return dist.distributed_c10d.PrefixStore(name, store)


def _wait_for(happened: Any, deadline: float, whom: str, timeout_s: float) -> None:
    while not happened():
        if time.monotonic() > deadline:
            raise ValueError(f"waited {timeout_s:.0f} s (dist.timeout_s) for {whom}: did all processes start?")
        time.sleep(POLL_S)


@contextmanager
def left_cleanly() -> Iterator[None]:
    """Around a program: leave the process group, then the process, with the exit status it would have had.

    With gloo a process that ends in the usual way can abort in a destructor ("terminate called without an active
    exception": 5 of 32 runs of DDP on torch 2.13). Nothing happens where no group was joined.
    """
    status = 0
    try:
        yield
    except SystemExit as end:
        if not dist.is_initialized():
            raise
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        if not dist.is_initialized():
            raise
        traceback.print_exc()
        status = 1
    if dist.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        if status == 0:  # else the others may never come
            dist.destroy_process_group()
        os._exit(status)

"""Several ranks in one test: processes forked from one server that has torch loaded, joined by gloo."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_context = multiprocessing.get_context("forkserver")  # a fork of this process could inherit a lock that a thread holds
_context.set_forkserver_preload(
    ["torch.distributed.fsdp", "torch.distributed.tensor", "torch._dynamo", "mptrain.build"]
)


def run(size: int, task: Callable[..., Any], *args: Any, timeout_s: float = 120.0) -> list[Any]:
    """``task(rank, *args)`` on each of ``size`` ranks; what each returned, by rank. Both must be picklable.

    AssertionError with the traceback of the first rank that failed, or the ranks that did not end in time.
    """
    with tempfile.TemporaryDirectory() as folder:
        pipes = [_context.Pipe(duplex=False) for _ in range(size)]
        jobs = [
            _context.Process(target=_rank, args=(rank, size, folder, pipe[1], task, args), daemon=True)
            for rank, pipe in enumerate(pipes)
        ]
        for job, (_, sending) in zip(jobs, pipes, strict=True):
            job.start()
            sending.close()
        try:
            return _collected([receiving for receiving, _ in pipes], time.monotonic() + timeout_s)
        finally:
            for job in jobs:
                job.join(1.0)
                job.kill()
                job.join()


def _collected(pipes: list[Any], deadline: float) -> list[Any]:
    found: dict[int, Any] = {}
    while len(found) < len(pipes):
        waiting = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in found}
        ready = multiprocessing.connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
        assert ready, f"ranks {sorted(waiting.values())} did not end in time"
        for pipe in ready:
            rank = waiting[pipe]  # type: ignore[index]
            try:
                fine, value = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                raise AssertionError(f"rank {rank} died") from None
            assert fine, f"rank {rank} failed:\n{value}"
            found[rank] = value
    return [found[rank] for rank in range(len(pipes))]


def _rank(rank: int, size: int, folder: str, pipe: Any, task: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    store = dist.FileStore(str(Path(folder) / "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    try:
        pipe.send_bytes(
            pickle.dumps((True, task(rank, *args)))
        )  # send() would share tensors' memory, which goes with us
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
    finally:
        pipe.close()
        os._exit(0)  # gloo's threads can abort a normal exit

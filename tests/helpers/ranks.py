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


def outcomes(
    size: int, task: Callable[..., Any], *args: Any, of: list[int], timeout_s: float = 90.0
) -> list[tuple[int | None, str]]:
    """The exit status of each rank (None: it did not end) and what it wrote to stderr, when those in ``of`` have ended.

    The task leads its own process: an exception is status 1, with its message.
    """
    with tempfile.TemporaryDirectory() as folder:
        jobs = [
            _context.Process(target=_rank_alone, args=(rank, size, folder, task, args), daemon=True)
            for rank in range(size)
        ]
        for job in jobs:
            job.start()
        until = time.monotonic() + timeout_s
        for rank in of:
            jobs[rank].join(max(0.0, until - time.monotonic()))
        found = [job.exitcode for job in jobs]
        for job in jobs:
            job.kill()
            job.join()
        return [(code, (Path(folder) / f"stderr{rank}").read_text()) for rank, code in enumerate(found)]


def _rank_alone(rank: int, size: int, folder: str, task: Callable[..., Any], args: tuple[Any, ...]) -> None:
    error = os.open(str(Path(folder) / f"stderr{rank}"), os.O_CREAT | os.O_WRONLY)
    os.dup2(error, 2)
    _join(rank, size, folder)
    status = 0
    try:
        task(rank, *args)
    except BaseException as raised:
        os.write(2, f"{type(raised).__name__}: {raised}\n".encode())
        status = 1
    os._exit(status)


def _join(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    store = dist.FileStore(str(Path(folder) / "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))


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
    _join(rank, size, folder)
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

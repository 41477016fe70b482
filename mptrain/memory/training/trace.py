"""One training step on fake tensors: the operators of the real model, optimizer and wrappers, and no memory.

The step is the second one of a run, so that the optimizer has its state. A deep model is traced at three small depths
and carried on: in each window of the step (see :mod:`mptrain.memory.training.live`) every byte grows evenly with the
number of blocks (of an odd number, backward's halves meet in the middle of a block, where no peak is). The third depth
must be met to the byte, else the whole model is traced (80 blocks: some 10 s).
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh

from mptrain import kernels
from mptrain.distributed import ALONE, Ranks, World, wrap
from mptrain.distributed.layout import DistConfig, Layout
from mptrain.memory.training import recurrent
from mptrain.memory.training.cuda import CudaCasts, casting, stand_in, with_transposed
from mptrain.memory.training.live import UPDATE, Bytes, buckets_of, resident, watched
from mptrain.models import Architecture
from mptrain.optim import Average, OptimConfig, build_optimizer
from mptrain.precision import Precision
from mptrain.precision.backends import resolve
from mptrain.precision.backends.emulated.gemm import carrier_dtype
from mptrain.precision.policy import PrecisionPolicy, Scaling

CPU = torch.device("cpu")
DEPTHS = (2, 4, 6)  # even: half of the gradients are then there at the same place of a block
DEEP = 8  # blocks; what has fewer is traced whole

Peaks = dict[str, Bytes]  # window of the step -> what is alive at its peak


@dataclass(frozen=True)
class Job:
    """A step to trace. ``model``: the module of a kind with its Config; ``batch_size``: of one rank's micro-batch, of
    ``accumulate``. ``gpu``: as on a CUDA GPU, else as on this CPU. Left out is what ``dist.compress=fp8`` works with
    while it sends: some six buckets, of 25 MiB at most."""

    model: Architecture
    config: Any
    policy: PrecisionPolicy
    optim: OptimConfig
    batch_size: int
    accumulate: int = 1
    checkpointing: bool = False
    gpu: bool = False
    dist: DistConfig = field(default_factory=DistConfig)
    layout: Layout = field(default_factory=Layout)


def peaks(job: Job, *, check: bool = True) -> Peaks:
    """Find what is alive at the peak of each window of a step, on one rank. ``check``: meet the third depth."""
    depth = job.config.n_layer
    if depth <= DEEP or not job.model.grows_evenly(job.config, DEPTHS[0], DEPTHS[1] - DEPTHS[0]):
        return trace(job)
    first, second = _at(job, DEPTHS[0]), _at(job, DEPTHS[1])
    if check and _carried_on(first, second, DEPTHS[2]) != _at(job, DEPTHS[2]):
        return trace(job)
    return _carried_on(first, second, depth)


def _at(job: Job, depth: int) -> Peaks:
    return trace(replace(job, config=replace(job.config, n_layer=depth)))


def _carried_on(first: Peaks, second: Peaks, depth: int) -> Peaks:
    """Every byte at ``depth`` blocks, on the line through the first two depths."""
    start, step = DEPTHS[0], DEPTHS[1] - DEPTHS[0]
    carried: Peaks = {}
    for window in first:
        a, b = first[window], second.get(window, Counter())
        sizes = {key: a[key] + (b[key] - a[key]) * (depth - start) // step for key in a.keys() | b.keys()}
        carried[window] = Counter({key: size for key, size in sizes.items() if size})
    return carried


def trace(job: Job) -> Peaks:
    """The same without a short cut. Traces are kept: FP32 and TF32 are one step on a GPU."""
    policy = stand_in(job.policy) if job.gpu else job.policy
    resolve(policy, CPU)
    traced = _traced(replace(job, policy=replace(policy, name="")))
    return {window: with_transposed(peak, job.policy) if job.gpu else peak for window, peak in traced.items()}


@functools.lru_cache(maxsize=256)
def _traced(job: Job) -> Peaks:
    kernels.implementation(CPU)  # both are found out once a process, on real tensors
    carrier_dtype("cpu")
    with ExitStack() as stack:
        ranks = stack.enter_context(_ranks(job.layout))
        mesh = job.layout.mesh(CPU) if ranks.size > 1 else None
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(_real_meshes())
        stack.enter_context(recurrent.Workspaces())  # type: ignore[no-untyped-call]
        if job.gpu:
            stack.enter_context(CudaCasts())
        return _step(job, ranks, mesh)


def _step(job: Job, ranks: Ranks, mesh: Any) -> Peaks:
    model: nn.Module = job.model.build(job.config)
    if job.gpu:
        recurrent.require_known(model)
    precision = Precision(job.policy, ranks=ranks).prepare(model)
    if job.checkpointing:
        again = precision.recompute
        model.recompute = casting(again) if job.gpu else again  # type: ignore[assignment]
    if mesh is not None:  # DDP's C++ takes no fake tensors: see _into_buckets
        products = job.model.TENSOR_PARALLEL
        formats = job.policy.compute.value.dtype, job.policy.reduce.value.dtype
        wrap.cut_up(model, products, mesh, job.dist, formats, precision.unreduced)
    optimizer = build_optimizer(job.optim, model)
    average = Average(model, job.optim.ema_decay).shadow if job.optim.ema_decay else []
    batch = batch_of(job)
    buckets = buckets_of(model, job.dist)

    def step(at_update: Callable[[], None]) -> None:
        rounds = min(job.accumulate, 2)  # more find what the second finds: the gradients of those before
        for micro in range(rounds):
            with _into_buckets(model, buckets) if buckets and micro == rounds - 1 else nullcontext():
                with precision.forward():
                    loss = model(**batch)
                # Not the precision's: its books are read on the host, and fake tensors hold no values.
                with precision.backend.backward():
                    loss.backward()
        at_update()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    model.train()
    if (mesh is None or buckets) and job.policy.quantization.scaling is not Scaling.delayed:
        _first_state(model, optimizer)
    else:  # FSDP, amax histories: they find their buffers in the first step
        step(lambda: None)
    lives = {**resident(model, optimizer), "average": average, "communication": buckets}
    with watched(lives, model) as meter:
        step(lambda: meter.at(UPDATE))
    return {window: Counter({key: size for key, size in peak.items() if size}) for window, peak in meter.peaks.items()}


def _first_state(model: nn.Module, optimizer: Any) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def batch_of(job: Job) -> dict[str, Tensor]:
    """A micro-batch in the shapes of the data."""
    config, size = job.config, job.batch_size
    if job.model.INPUT == "tokens":
        both = torch.zeros(2, size, config.block_size, dtype=torch.int64)  # one tensor, as a data set makes them
        return {"tokens": both[0], "targets": both[1]}
    images = torch.zeros(size, config.channels, config.image_size, config.image_size)
    return {"images": images, "labels": torch.zeros(size, dtype=torch.int64)}


@contextmanager
def _into_buckets(model: nn.Module, buckets: list[Tensor]) -> Iterator[None]:
    """DDP of the last micro-batch: each gradient goes into its bucket as soon as it is there."""
    trained = [p for p in model.parameters() if p.requires_grad]
    place = dict(zip(trained, buckets, strict=False))  # residuals behind them

    def move(parameter: Tensor) -> None:
        parameter.grad = place[parameter]  # type: ignore[index]

    hooks = [p.register_post_accumulate_grad_hook(move) for p in trained]  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _real_meshes() -> Iterator[None]:
    """A mesh that is made on the way (FSDP's with tensor parallelism) reads where this rank is from its tensor."""
    init = DeviceMesh.__init__

    def real(mesh: DeviceMesh, *args: Any, **kwargs: Any) -> None:
        with unset_fake_temporarily():
            init(mesh, *args, **kwargs)

    DeviceMesh.__init__ = real  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        DeviceMesh.__init__ = init  # type: ignore[method-assign]


@contextmanager
def _ranks(layout: Layout) -> Iterator[Ranks]:
    """The ranks that were joined; or made up ones, of which this process is the first. Nothing is sent either way."""
    size = layout.data_parallel * layout.parts
    if size == 1 or dist.is_initialized():
        yield ALONE if size == 1 else World()
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    try:
        yield World()
    finally:
        dist.destroy_process_group()

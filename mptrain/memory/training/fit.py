"""The largest step that a device holds, and what to turn on where the one asked for does not fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from mptrain.distributed.layout import DistConfig, Layout
from mptrain.formats import Format
from mptrain.memory.training.plan import MOST_TOKENS, TrainingPlan, plan
from mptrain.memory.training.trace import Job
from mptrain.precision.policy import PrecisionPolicy

MOST = 1 << 20  # samples, tokens of a sequence
SHARDS = 8  # ranks of a usual node
CHECKPOINTING = "trainer.checkpointing=true"


@dataclass(frozen=True)
class Remedy:
    """A change of settings, the plan with it, and what it costs beside memory. ``saved``: bytes, on each rank."""

    settings: str
    cost: str
    plan: TrainingPlan
    saved: int


def largest(total: Callable[[int], int], capacity: int, *, step: int = 1, most: int = MOST) -> int:
    """The largest multiple of ``step`` up to ``most`` whose ``total`` bytes fit ``capacity``; 0 if ``step`` does not.

    ``total`` grows about evenly, so the line through two of its values says where to look next (3 to 6 looks); every
    third look halves what is left, for a total that does not.
    """
    low = total(step)
    if low > capacity:
        return 0
    good, bad, size, looks = step, most // step * step + step, low, 0
    at = 2 * step
    while bad - good > step:
        at = min(max(at, good + step), bad - step)
        needed = total(at)
        slope = max(1e-9, (needed - low) / (at - step))
        if needed <= capacity:
            good, size = at, needed
        else:
            bad = at
        looks += 1
        ahead = (bad - good) / 2 if looks % 3 == 0 else (capacity - size) / slope
        at = good + max(step, int(min(ahead, bad - good)) // step * step)
    return good


def largest_batch(job: Job, capacity: int) -> int:
    """Samples in a micro-batch of one rank; 0 if not even one fits."""
    most = MOST_TOKENS // max(1, job.config.block_size)
    return largest(lambda size: plan(replace(job, batch_size=size), check=False).total, capacity, most=min(MOST, most))


def largest_sequence(job: Job, capacity: int, step: int = 64) -> int:
    """Tokens of a sequence (``model.block_size``) at the batch of ``job``, in multiples of ``step``; 0 if none fits."""

    def total(length: int) -> int:
        return plan(replace(job, config=replace(job.config, block_size=length)), check=False).total

    return largest(total, capacity, step=step, most=min(MOST, MOST_TOKENS // job.batch_size))


def remedies(job: Job, now: TrainingPlan) -> list[Remedy]:
    """List what would take less memory than ``now``, most bytes saved first."""
    changes = [Remedy(settings, cost, plan(changed, check=False), 0) for settings, cost, changed in _changes(job)]
    changes = [replace(one, saved=now.total - one.plan.total) for one in changes]
    return sorted((one for one in changes if one.saved > 0), key=lambda one: -one.saved)


def _changes(job: Job) -> Iterator[tuple[str, str, Job]]:
    sharded = job.layout.shards > 1 or job.layout.parts > 1
    plain = job.optim.kind == "adamw" and job.optim.fp32 and not sharded
    if not job.checkpointing:
        yield CHECKPOINTING, "each block's forward twice: about a third more FLOPs", _checkpointed(job)
    if plain:
        cost = "moments rounded to 8 bits in blocks of 256; a slower optimizer step"
        yield "optim=adamw-8bit", cost, replace(job, optim=replace(job.optim, moments="int8"))
    if plain and job.policy.compute is Format.bf16:
        cost = "gradients added up in BF16; no bit of the weights is lost"
        yield "optim=adamw-remainder", cost, replace(job, optim=replace(job.optim, weights="bf16_remainder"))
    if job.batch_size > 1:
        half = replace(job, batch_size=-(-job.batch_size // 2), accumulate=2 * job.accumulate)
        sizes = f"trainer.batch_size={half.batch_size} trainer.accumulate={half.accumulate}"
        yield sizes, "the same step in more and smaller micro-batches", half
    for name in {Format.fp32: ("bf16", "fp8"), Format.tf32: ("bf16", "fp8")}.get(job.policy.compute, ()):
        cost = "lower precision: compare it before you trust it (python train.py -m)"
        yield f"precision={name}", cost, replace(job, policy=PrecisionPolicy.named(name))
    if job.layout == Layout():
        cost = f"{SHARDS} ranks; each gathers the weights of a block when it needs them"
        yield f"dist=fsdp on {SHARDS} ranks", cost, _sharded(job)
        if job.batch_size > 1 or not job.checkpointing:
            small = _sharded(replace(_checkpointed(job), batch_size=1))
            yield f"the same, {CHECKPOINTING}, one sample a rank", "both of these", small
    if job.layout.shards > 1:
        wider = replace(job.layout, shards=2 * job.layout.shards)
        yield f"twice the ranks: {wider}", "smaller shards", replace(job, layout=wider)
    if plain and (job.batch_size > 1 or not job.checkpointing):
        rounds = job.batch_size * job.accumulate
        small = replace(_checkpointed(job), batch_size=1, accumulate=rounds)
        settings = f"{CHECKPOINTING} optim=adamw-8bit trainer.batch_size=1 trainer.accumulate={rounds}"
        yield settings, "all that one rank can do", replace(small, optim=replace(job.optim, moments="int8"))


def _sharded(job: Job) -> Job:
    """Each rank with the micro-batch of ``job``."""
    optim = replace(job.optim, weights="fp32", moments="fp32")
    return replace(job, dist=DistConfig(kind="fsdp"), layout=Layout(shards=SHARDS), optim=optim)


def _checkpointed(job: Job) -> Job:
    return replace(job, checkpointing=True)

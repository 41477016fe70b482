"""A user's own DDP or fully_shard around a prepared model, with nothing said about ranks."""

from __future__ import annotations

import math

import pytest
import ranks
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import mptrain
from mptrain import Precision

NAMES = ("fp32", "fp16", "fp8", "fp8-delayed")


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32, bias=False), nn.Tanh(), nn.Linear(32, 32, bias=False))


def batch(seed, bad=False):
    x = torch.randn(16, 32, generator=torch.Generator().manual_seed(seed))
    if bad:
        x[3, 5] = math.inf
    return x


def steps(rank, name, how):
    """Four steps; in the third rank 1 alone has an Inf in its input. Records, weights, and the norm by torch itself."""
    model = mlp()
    if how == "ddp first":  # the other way round: what is prepared is the DDP
        model = DistributedDataParallel(model)
    precision = Precision(name).prepare(model)
    if how == "ddp first":
        wrapped = model
    elif how == "ddp":
        wrapped = DistributedDataParallel(model)
    else:
        wrapped = fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    records, norms = [], []
    for step in range(4):
        with precision.forward():
            loss = wrapped(batch(10 * step + rank, bad=step == 2 and rank == 1)).float().square().mean()
        precision.backward(loss)
        scale = precision.scaler.scale
        whole = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in wrapped.parameters()]
        norms.append((torch.stack([g.norm() for g in whole]).norm() / scale).item())
        outcome = precision.step(optimizer, clip=0.5)
        records.append((outcome.applied, outcome.grad_norm, outcome.read().next_scale))
        optimizer.zero_grad()
    weights = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in wrapped.parameters()]
    return records, norms, torch.cat([w.detach().flatten() for w in weights])


@pytest.mark.multi
@pytest.mark.parametrize("how", ["ddp", "ddp first", "fsdp"])
@pytest.mark.parametrize("name", NAMES)
def test_norm_and_skip_are_the_same_on_all_ranks(name, how):
    (first, norms, weights), (second, _, others) = ranks.run(2, steps, name, how)
    assert [applied for applied, *_ in first] == [True, True, False, True]
    assert torch.equal(weights, others)
    for (applied, norm, scale), (also, theirs, its), right in zip(first, second, norms, strict=True):
        assert (applied, scale) == (also, its)
        assert not applied or (norm == pytest.approx(right, rel=1e-4) and theirs == pytest.approx(norm, rel=1e-6))


def unsaid(rank):
    """Neither DDP nor sharded: what the step says, and what it does when told."""
    said = []
    for told in ({}, {"ranks": mptrain.ALONE}, {"ranks": mptrain.World()}):
        model = mlp()
        precision = Precision("fp32", **told).prepare(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with precision.forward():
            loss = model(batch(rank, bad=rank == 1)).square().mean()
        precision.backward(loss)
        try:
            said.append(precision.step(optimizer).applied)
        except ValueError as error:
            said.append(str(error))
    return said


@pytest.mark.multi
def test_processes_that_nothing_ties_together_are_asked_about():
    for rank, (error, alone, together) in enumerate(ranks.run(2, unsaid)):
        assert (
            "say Precision(policy, ranks=mptrain.World()) if they train one model, ranks=mptrain.ALONE if not" in error
        )
        assert (alone, together) == (rank == 0, False)

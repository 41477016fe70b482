"""One rank alone has a bad step: all of them skip it, know whose it was, and stay equal."""

from __future__ import annotations

import math

import pytest
import ranks
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mptrain.distributed import World
from mptrain.distributed.reduction import look_and_send, plain
from mptrain.precision import Precision
from mptrain.tools.modules import parameter_names

POLICIES = ("fp32", "tf32", "bf16", "fp16", "fp8", "fp8-delayed")


def toy():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32, bias=False), nn.Tanh(), nn.Linear(32, 16, bias=False))


def steps_with_a_bad_rank(rank, policy, where):
    """Five steps; in the third rank 1 alone is given an Inf, in an input or in the loss's gradient."""
    world = World()
    model = toy()
    precision = Precision(policy, ranks=world).prepare(model)
    wrapped = DistributedDataParallel(model)
    look_and_send(wrapped, parameter_names(model), precision.unreduced, plain())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    generator = torch.Generator().manual_seed(rank)
    records = []
    for step in range(5):
        x = torch.randn(16, 32, generator=generator)
        bad = step == 2 and rank == 1
        if bad and where == "input":
            x[3, 5] = math.inf
        before = [p.detach().clone() for p in model.parameters()]
        with precision.forward():
            out = wrapped(x).float()
            loss = out.square().mean()
        if bad and where == "gradient":  # of no finite loss
            out.register_hook(lambda grad: grad.index_fill(0, torch.tensor([3]), math.inf))
        precision.backward(loss)
        records.append(precision.step(optimizer, clip=1.0, stop=step == 4 and rank == 1).read())
        optimizer.zero_grad()
        unmoved = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert unmoved is not records[-1].applied, step
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    return records, weights


@pytest.mark.multi
@pytest.mark.parametrize("where", ["input", "gradient"])
@pytest.mark.parametrize("policy", POLICIES)
def test_all_ranks_skip_what_one_found(policy, where):
    (first, weights), (second, others) = ranks.run(2, steps_with_a_bad_rank, policy, where)
    assert [record.applied for record in first] == [True, True, False, True, True]
    assert torch.equal(weights, others)
    assert [record.stop for record in first] == [False] * 4 + [True]
    assert first[2].blame == second[2].blame
    assert first[2].blame.rank == 1
    for a, b in zip(first, second, strict=True):
        assert (a.applied, a.scale, a.next_scale, a.event) == (b.applied, b.scale, b.next_scale, b.event)

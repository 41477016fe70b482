"""Counts of the casts that autocast and the emulation make: exact, on planted tensors."""

import pytest
import torch
from torch import nn

from mptrain import Format, Precision
from mptrain.formats import count_cast, overflows, underflows

PLANTED = {  # format: (values that overflow, values that become zero, values that do neither)
    Format.bf16: ([3.4e38, -3.4e38], [2.0**-134, -1e-41], [3.38e38, 2.0**-133, 0.0]),
    Format.fp16: ([65520.0, 1e30], [2.0**-25, -1e-9], [65519.0, 6e-8, -0.0]),
    Format.tf32: ([(2.0 - 2.0**-20) * 2.0**127], [2.0**-137], [3.4e38, 2.0**-136]),
}


@pytest.mark.parametrize("fmt", PLANTED, ids=str)
def test_planted_values_are_counted_exactly(fmt):
    beyond, flushed, fine = PLANTED[fmt]
    x = torch.tensor([*beyond, *flushed, *fine, torch.inf, torch.nan, torch.nan])
    counts = count_cast(x, fmt).tolist()
    assert counts == [len(x), len(beyond), len(flushed), 1, 2]


@pytest.mark.parametrize("fmt", [fmt for fmt in Format if fmt not in (Format.fp32, Format.int8, Format.int4)], ids=str)
def test_counts_agree_with_the_definitions(fmt):
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (5_000_000,), generator=generator, dtype=torch.int64).to(torch.int32)
    x = bits.view(torch.float32).reshape(1000, 5000).t()  # several chunks, not contiguous
    expected = [x.numel(), overflows(x, fmt).sum(), underflows(x, fmt).sum(), x.isinf().sum(), x.isnan().sum()]
    assert count_cast(x, fmt).tolist() == [int(number) for number in expected]


def sample(name, x, grad, *, backend_weight):
    """One sampled micro-batch through a lone layer: counts by role."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(backend_weight)
    precision = Precision(name).prepare(model)
    precision.counters.counting = True
    with precision.forward():
        out = model(x)
    out.backward(grad.to(out.dtype))
    return dict(zip([role for _, role in precision.counters.slots], precision.counters.take().tolist(), strict=True))


@pytest.mark.parametrize("name", ["bf16", "fp16", "tf32"])
def test_each_role_of_a_layer_is_counted(name):
    x, weight, grad = torch.ones(2, 4), torch.ones(4, 4), torch.ones(2, 4)
    x[0, 0], x[1, 1] = torch.inf, torch.nan
    weight[0, 0], weight[2, 3] = 1e-43, 3.4028e38  # the second rounds past TF32's maximum, 3.4011e38
    grad[1, 2] = torch.nan
    counts = sample(name, x, grad, backend_weight=weight)
    assert counts["input"] == [8, 0, 0, 1, 1]
    assert counts["weight"] == [16, 1, 1, 0, 0]
    assert counts["grad_output"] == [8, 0, 0, 0, 1]


def test_nothing_is_counted_in_evaluation_or_in_fp32_or_twice_when_recomputed():
    model = nn.Sequential(nn.Linear(4, 4))
    precision = Precision("bf16").prepare(model)
    precision.counters.counting = True
    with precision.evaluating():
        model(torch.ones(2, 4))
    assert precision.counters.take().sum() == 0
    with precision.forward():
        out = precision.recompute(model, torch.ones(2, 4, requires_grad=True))
    precision.backward(out.float().sum())
    assert [row[0] for row in precision.counters.take().tolist()] == [8, 16, 8]
    assert Precision("fp32").prepare(nn.Sequential(nn.Linear(4, 4))).counters.slots == []

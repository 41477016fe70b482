"""Weights and moments stored in fewer bits: what is lost, what is not, and what the meter says of it beforehand."""

import copy
import math

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mptrain.kernels import bins
from mptrain.kernels.adamw import N_LOST, lost_in, update, updates
from mptrain.optim import MOMENTS, WEIGHTS, Average, OptimConfig, build_optimizer
from mptrain.optim._stored import StoredAdamW, join, round_stochastically, split

pytestmark = pytest.mark.usefixtures("one_thread")
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)


def model(seed=0, width=64):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))


def steps(net, optimizer, count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        x = torch.randn(16, net[0].in_features, generator=generator)
        net(x.to(net[0].weight.dtype)).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in net.parameters()]


@given(st.lists(FINITE, min_size=1, max_size=50))
def test_split_and_join_give_every_bit_back(values):
    master = torch.tensor(values, dtype=torch.float32)
    high, low = split(master)
    assert torch.equal(join(high, low).view(torch.int32), master.view(torch.int32))
    assert (high.dtype, low.dtype) == (torch.bfloat16, torch.int16)


def test_half_of_the_ties_need_rounding_up():
    """A BF16 with an even last bit and exactly half a last place: nearest-even would go down, past int16's range."""
    master = torch.tensor([0x3F808000, 0x3F818000, 0x3F7F8000], dtype=torch.int32).view(torch.float32)
    high, low = split(master)
    assert low.tolist() == [-0x8000] * 3
    assert torch.equal(join(high, low), master)


def test_stochastic_rounding_is_right_on_average_and_never_off_the_neighbours():
    torch.manual_seed(0)
    value = 1.0 + 0.3 * 2.0**-7
    rounded = round_stochastically(torch.full((200_000,), value)).float()
    assert set(rounded.tolist()) == {1.0, 1.0 + 2.0**-7}
    chance = float((rounded > 1).float().mean())
    assert abs(chance - 0.3) < 5 * math.sqrt(0.3 * 0.7 / 200_000)
    special = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0, 1.5])
    assert torch.equal(round_stochastically(special)[[0, 1, 3, 4, 5]].float(), special[[0, 1, 3, 4, 5]])
    assert round_stochastically(special)[2].isnan()


def test_a_remainder_trains_the_same_masters_as_fp32():
    """With the same gradients, bit for bit: 32 bits are 32 bits."""
    plain, stored = model(), model()
    masters = torch.optim.AdamW(plain.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    optimizer = StoredAdamW(
        stored.parameters(), lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, weights="bf16_remainder"
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        for p, s in zip(plain.parameters(), stored.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=generator).bfloat16().float()
            s.grad = p.grad.bfloat16()
        masters.step()
        optimizer.step()
    for p, s in zip(plain.parameters(), stored.parameters(), strict=True):
        assert s.dtype is torch.bfloat16
        assert torch.equal(optimizer.master(s), p)


@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_saved_and_loaded_it_goes_on_bit_for_bit(weights, moments):
    config = OptimConfig(lr=1e-3, weights=weights, moments=moments)
    net = model()
    optimizer = build_optimizer(config, net)
    steps(net, optimizer, 3)
    state, parameters = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(net.state_dict())
    again = model(seed=5)
    loaded = build_optimizer(config, again)
    again.load_state_dict(parameters)
    loaded.load_state_dict(state)
    torch.manual_seed(9)
    expected = steps(net, optimizer, 3, seed=2)
    torch.manual_seed(9)
    assert all(torch.equal(a, b) for a, b in zip(expected, steps(again, loaded, 3, seed=2), strict=True))


def test_bytes_are_those_promised():
    """Bytes a weight, of the parameter and of its state (64 x 64 matrices; biases are too small for 8 bits)."""
    expected = {("fp32", "fp32"): (4, 8), ("bf16", "fp32"): (2, 8), ("bf16_remainder", "fp32"): (2, 10)}
    expected |= {("fp32", "int8"): (4, 2 + 8 / 256), ("bf16_remainder", "int8"): (2, 4 + 8 / 256)}
    for (weights, moments), (own, beside) in expected.items():
        net = model()
        optimizer = build_optimizer(OptimConfig(weights=weights, moments=moments), net)
        steps(net, optimizer, 1)
        weight = net[0].weight
        state = sum(v.nbytes for name, v in optimizer.state[weight].items() if name != "step")
        assert (weight.nbytes / weight.numel(), state / weight.numel()) == (own, beside)


def test_eight_bit_moments_stay_close():
    plain, stored = model(), model()
    a = steps(plain, build_optimizer(OptimConfig(lr=1e-3), plain), 20)
    b = steps(stored, build_optimizer(OptimConfig(lr=1e-3, moments="int8"), stored), 20)
    start = model()
    moved = sum(float((x - s.detach()).square().sum()) for x, s in zip(a, start.parameters(), strict=True))
    apart = sum(float((x - y).square().sum()) for x, y in zip(a, b, strict=True))
    assert 0 < apart < 0.05 * moved


def lost_oracle(w, u):
    """Coordinate by coordinate with ml_dtypes: asked, lost in BF16 and in FP32."""
    base = w.astype(ml_dtypes.bfloat16).astype(np.float32)
    asked = u != 0
    with np.errstate(over="ignore"):
        bf16 = (base + u).astype(ml_dtypes.bfloat16).astype(np.float32) == base
        fp32 = (w + u).astype(np.float32) == w
    return [asked.sum(), (asked & bf16).sum(), (asked & fp32).sum()]


@settings(deadline=None)
@given(st.lists(st.tuples(FINITE, FINITE, st.integers(0, 40)), min_size=1, max_size=60))
def test_lost_updates_against_an_oracle(values):
    w = np.array([v for v, _, _ in values], dtype=np.float32)
    u = np.array([np.float32(x) if shift > 30 else np.float32(v * 2.0**-shift) for v, x, shift in values])
    found = lost_in(torch.from_numpy(w), torch.from_numpy(u)).tolist()
    assert found[:3] == lost_oracle(w, u)
    assert found[4] == found[2], "32 bits are 32 bits"


def test_the_chance_that_stochastic_rounding_leaves_a_weight():
    """By 100,000 throws, for steps up and down, across a power of two, and too large to stay."""
    torch.manual_seed(0)
    for w, u in ((1.0, 0.25 * 2.0**-7), (1.0, -0.25 * 2.0**-7), (-1.5, 0.9 * 2.0**-7), (1.0, 2.0**-6), (3.0, 1e-9)):
        weight, step = torch.tensor([w]), torch.tensor([u])
        expected = lost_in(weight, step)[3].item()
        stayed = (round_stochastically((weight + step).expand(100_000).contiguous()).float() == w).float().mean().item()
        assert stayed == pytest.approx(expected, abs=0.01), (w, u)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("n", [0, 1, 7, 1000, 70_001])
def test_one_pass_over_weight_and_moments(n, dtype):
    """Histograms and losses of the pass against its definition, one operation at a time."""
    generator = torch.Generator().manual_seed(n)
    w, m = (torch.randn(n, generator=generator) for _ in range(2))
    v = torch.rand(n, generator=generator) * 1e-3
    w = w.to(dtype)
    m[: n // 3] = 0.0
    numbers = {"step_size": 1e-3, "correction": 1.3, "eps": 1e-8, "decay": 0.0}
    tables = tuple(torch.zeros(bins.N_BINS, dtype=torch.int64) for _ in range(3))
    lost = torch.zeros(N_LOST, dtype=torch.float64)
    updates(w, m, v, histograms=tables, lost=lost, **numbers)
    u = update(w.float(), m, v, *numbers.values())
    reference = -1e-3 * m.double() / (v.double().sqrt() * 1.3 + 1e-8)
    torch.testing.assert_close(u.double(), reference, rtol=1e-6, atol=0.0)
    assert int((u == 0).sum()) == n // 3
    for x, table in zip((m, v, u), tables, strict=True):
        bits = x.abs().view(torch.int32)
        expected = torch.bincount(torch.where(bits == 0, bins.ZERO, (bits - 1) >> 20), minlength=bins.N_BINS)
        assert torch.equal(table, expected)
    torch.testing.assert_close(lost, lost_in(w.float(), u))


def test_the_average_moves_by_its_decay_and_is_put_in_place_for_a_while():
    net = model()
    average = Average(net, 0.75)
    before = net[0].weight.detach().clone()
    with torch.no_grad():
        net[0].weight.add_(1.0)
    average.update()
    expected = before + 0.25
    torch.testing.assert_close(average.state_dict()["0.weight"], expected)
    with average.in_place():
        torch.testing.assert_close(net[0].weight.detach(), expected)
    assert torch.equal(net[0].weight.detach(), before + 1.0)
    other = Average(net, 0.5)
    other.load_state_dict(average.state_dict())
    assert torch.equal(other.shadow[0], average.shadow[0])
    other.load_state_dict({})
    assert torch.equal(other.shadow[0], net[0].weight.detach()), "a run without an average begins with its weights"


@pytest.mark.parametrize(("name", "value"), [("weights", "fp8"), ("moments", "fp4"), ("ema_decay", 1.0)])
def test_impossible_settings_are_named(name, value):
    with pytest.raises(ValueError, match=f"optim.{name}"):
        OptimConfig(**{name: value})

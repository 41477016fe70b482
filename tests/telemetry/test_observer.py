"""What a sampled step sees: every tensor once, exactly, and nothing of it changes the training."""

import math

import pytest
import torch
from torch import nn

from mptrain import Precision
from mptrain.kernels import bins
from mptrain.models import gpt
from mptrain.optim import OptimConfig, build_optimizer
from mptrain.telemetry.monitor import Monitor, TelemetryConfig
from mptrain.telemetry.observer import LOST, PARAMETER_ROLES

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = gpt.Config(vocab_size=32, block_size=8, n_layer=2, n_head=2, n_embd=32)
NAMES = ("fp32", "bf16", "fp16", "tf32", "fp8", "fp8-delayed", "fp8-rowwise")


class Loop:
    """A model of its own under a monitor that samples every step."""

    def __init__(self, name, *, accumulate=1, checkpointing=False, sizes=SIZES, **optim):
        torch.manual_seed(0)
        self.model = gpt.build(sizes)
        self.precision = Precision(name).prepare(self.model)
        if checkpointing:
            self.model.recompute = self.precision.recompute
        self.optimizer = build_optimizer(OptimConfig(**optim), self.model)
        self.monitor = Monitor(self.model, self.precision, TelemetryConfig(record_every=1), 100)
        self.accumulate, self.number = accumulate, 0

    def step(self, *, watched=True, size=8):
        self.number += 1
        generator = torch.Generator().manual_seed(self.number)
        tokens = torch.randint(0, 32, (2, size, SIZES.block_size + 1), generator=generator)[0]
        if watched:
            assert self.monitor.due(self.number)
            self.monitor.begin_step(self.number)
        for part in tokens.chunk(self.accumulate):
            with self.precision.forward():
                loss = self.model(part[:, :-1], part[:, 1:]) / self.accumulate
            self.precision.backward(loss)
        if watched:
            self.monitor.see_gradients()
        outcome = self.precision.step(self.optimizer, clip=1.0)
        sample = self.monitor.end_step(self.number, self.optimizer, outcome) if watched else None
        self.optimizer.zero_grad()
        return loss.item(), sample


def elements(sample):
    """Elements by (layer, role), from the histograms."""
    counted = sample.record.tables["histogram"].sum(1).tolist()
    return {(layer, role): n for (layer, role, _), n in zip(sample.record.rows, counted, strict=True)}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("accumulate", "checkpointing"), [(1, False), (4, True)], ids=["plain", "accumulated"])
def test_every_tensor_is_seen_once(name, accumulate, checkpointing):
    """Under gradient accumulation and activation checkpointing, with a tied head: elements by layer and role."""
    loop = Loop(name, accumulate=accumulate, checkpointing=checkpointing)
    seen = elements(loop.step()[1])
    tokens = 8 * SIZES.block_size
    assert loop.model.head.weight is loop.model.embed.weight
    for layer, module in loop.model.named_modules():
        if isinstance(module, nn.Linear) or hasattr(module, "quantizers"):
            assert seen.pop((layer, "input")) == tokens * module.in_features
            assert seen.pop((layer, "output")) == seen.pop((layer, "grad_output")) == tokens * module.out_features
            for role in PARAMETER_ROLES:
                assert seen.pop((layer, role)) == module.weight.numel(), (layer, role)
            if module.bias is not None:
                assert [seen.pop((f"{layer}.bias", role)) for role in PARAMETER_ROLES] == [module.out_features] * 5
        elif isinstance(module, nn.LayerNorm):
            assert [seen.pop((layer, role)) for role in PARAMETER_ROLES] == [2 * SIZES.n_embd] * 5
    assert [seen.pop(("position", role)) for role in PARAMETER_ROLES] == [SIZES.block_size * SIZES.n_embd] * 5
    assert seen == {}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("optim", [{}, {"weights": "bf16_remainder", "moments": "int8"}], ids=["masters", "stored"])
def test_watching_changes_nothing(name, optim):
    if optim and name in ("fp32", "fp16", "tf32"):
        pytest.skip("BF16 weights are for BF16 arithmetic")
    blind, watched = Loop(name, **optim), Loop(name, **optim)
    for _ in range(3):
        assert blind.step(watched=False)[0] == watched.step()[0]
    for one, other in zip(blind.model.parameters(), watched.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_no_hook_outlives_its_step():
    def hooks(model):
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())

    loop = Loop("bf16")
    before = hooks(loop.model)
    assert loop.monitor.due(1)
    loop.monitor.begin_step(1)
    assert hooks(loop.model) == before + 9  # 2 blocks of 4 linear layers, and the head
    loop.monitor.see_gradients()
    assert hooks(loop.model) == before


PLANTED = {  # format: (values that overflow, values that become zero, values that do neither)
    "bf16": ([3.4e38, -3.4e38], [2.0**-134, -1e-41], [3.38e38, 2.0**-133, 0.0]),
    "fp16": ([65520.0, 1e30], [2.0**-25, -1e-9], [65519.0, 6e-8, -0.0]),
    "tf32": ([(2.0 - 2.0**-20) * 2.0**127], [2.0**-137], [3.4e38, 2.0**-136]),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_values_are_counted_exactly(name):
    """In the input, the weight and the gradient of the output of a lone layer, before the casts of its GEMMs."""
    beyond, flushed, fine = PLANTED[name]
    x = torch.tensor([*beyond, *flushed, *fine, torch.inf, torch.nan, torch.nan])
    model = nn.Sequential(nn.Linear(len(x), 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(x)
    precision = Precision(name).prepare(model)
    monitor = Monitor(model, precision, TelemetryConfig(), 1)
    assert monitor.due(1)
    monitor.begin_step(1)
    with precision.forward():
        out = model(x[None])
    out.backward(torch.full_like(out, torch.nan))
    sums = precision.counters.take()
    monitor._count_the_uncast(sums)
    rows = {role: index for index, (_, role) in enumerate(precision.counters.slots)}
    expected = [len(x), len(beyond), len(flushed), 1, 2]
    assert sums["counts"][rows["input"]].tolist() == expected
    assert sums["counts"][rows["weight"]].tolist() == expected
    assert sums["counts"][rows["grad_output"]].tolist() == [1, 0, 0, 0, 1]
    histogram = sums["histogram"][rows["input"]]
    assert histogram.sum() == len(x)
    assert histogram[[bins.ZERO, bins.INF, bins.NAN]].tolist() == [x.eq(0).sum(), 1, 2]


def test_the_error_of_the_cast_is_measured():
    """SQNR of a weight's cast to BF16, against the same cast done by torch."""
    loop = Loop("bf16")
    weight = loop.model.blocks[0].mlp.up.weight.detach().double().clone()
    _, sample = loop.step()
    noise = (weight - weight.float().bfloat16().double()).square().sum()
    expected = 10 * math.log10(weight.square().sum() / noise)
    assert sample.metrics["sqnr_db/blocks.0.mlp.up/weight"] == pytest.approx(expected, abs=1e-3)
    assert "sqnr_db/blocks.1.mlp.down/output" not in sample.metrics, "an output is not cast"


def test_scales_and_amaxes_are_those_in_use():
    loop = Loop("fp8")
    amax = loop.model.blocks[0].mlp.up.weight.detach().abs().max().item()
    _, sample = loop.step()
    assert sample.metrics["amax/blocks.0.mlp.up/weight"] == amax
    assert sample.metrics["scale/blocks.0.mlp.up/weight"] == pytest.approx(448 / amax)
    assert "scale/head/weight" not in sample.metrics, "the head is kept in BF16"


def test_the_update_is_what_adamw_does():
    """Row `update` against the difference that the optimizer made, in a run whose weights are large next to none."""
    loop = Loop("fp32", lr=1e-2, weight_decay=0.5)
    layer = loop.model.blocks[1].attention.qkv.weight
    for _ in range(3):
        before = layer.detach().double().clone()
        _, sample = loop.step()
    moved = (layer.detach().double() - before).abs().float()
    row = [(layer, role) for layer, role, _ in sample.record.rows].index(("blocks.1.attention.qkv", "update"))
    table = sample.record.tables["histogram"][row][: bins.N_MAGNITUDES].double()
    upper = bins.edges()[1:]
    assert (table * upper).sum() / moved.double().sum() == pytest.approx(1.0, abs=0.15)
    assert table.sum() == moved.numel()
    lost = dict(zip(LOST, sample.record.tables["lost"][row].tolist(), strict=True))
    assert lost["asked"] == moved.numel()
    assert lost["fp32"] == lost["bf16_remainder"] == 0


def test_alarms_are_told_once_until_the_layer_recovers():
    config = TelemetryConfig(record_every=1, alarm_flushed_frac=0.2)
    model = nn.Sequential(nn.Linear(32, 32, bias=False))
    precision = Precision("fp8").prepare(model)
    monitor = Monitor(model, precision, config, 100)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    told = []
    for step, tiny in enumerate([False, True, True, False, True], start=1):
        x = torch.ones(16, 32)
        x[:, :8] = 2.0**-40 if tiny else 1.0
        assert monitor.due(step)
        monitor.begin_step(step)
        with precision.forward():
            loss = model(x).square().mean()
        precision.backward(loss)
        monitor.see_gradients()
        sample = monitor.end_step(step, optimizer, precision.step(optimizer))
        optimizer.zero_grad()
        told += [(e["step"], e["layer"], e["role"], e["reason"]) for e in sample.events if e["role"] == "input"]
    text = "25.00% of input flushed to zero in fp8_e4m3"
    assert told == [(2, "0", "input", text), (5, "0", "input", text)]

"""Rowwise and block scaling of the emulation: values, directions, counts and scales against numpy and ml_dtypes."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.register_assert_rewrite("backend_contract")

import backend_contract as contract  # noqa: E402
from backend_contract import Case, policy_of  # noqa: E402
from backend_oracle import FP8, oracle, oracle_cast, sqnr  # noqa: E402

from mptrain import Precision, PrecisionPolicy  # noqa: E402
from mptrain.formats import Format  # noqa: E402
from mptrain.kernels import tiles  # noqa: E402
from mptrain.models import gpt  # noqa: E402
from mptrain.report.inspect import tensors  # noqa: E402
from mptrain.telemetry.audit import StepAudit  # noqa: E402
from mptrain.telemetry.monitor import Monitor, TelemetryConfig  # noqa: E402
from mptrain.telemetry.products import look  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
FINE = ("fp8-rowwise", "fp8-block")
SHAPES = [(200, 256, 384), (128, 128, 128), (1, 256, 128), (300, 384, 256)]  # tokens, features in, features out


def in_fp32(name: str, **quantization: object) -> PrecisionPolicy:
    """The recipe with FP32 around its GEMMs, so that a result shows the exact sum."""
    return replace(policy_of(name, "emulated", **quantization), compute=Format.fp32)


def outliers(rows: int, width: int, row: int = 3, size: float = 2.0**12) -> Tensor:
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(5))
    x[row] *= size
    return x


@pytest.mark.parametrize("backward", [Format.fp8_e4m3, Format.fp8_e5m2], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", FINE)
def test_the_three_gemms_are_exact_on_their_operands(name, shape, backward):
    """FP64 GEMMs on ml_dtypes casts, with rows and columns of very different size and tiles of zeros."""
    policy = in_fp32(name, backward=backward)
    model, x, cotangent = contract.one_layer(Case(name, policy), *shape)
    spread = torch.Generator().manual_seed(1)
    for values in (x, cotangent):
        values *= torch.exp2(torch.randint(-20, 20, (values.shape[0], 1), generator=spread))
        values *= torch.exp2(torch.randint(-3, 3, (1, values.shape[1]), generator=spread))
    if shape[0] > 1:
        x[0], cotangent[:, 7] = 0.0, 0.0
    weight = model[0].weight.detach().clone()
    got = contract.three_gemms(Case(name, policy), model, x, cotangent)
    wanted = oracle(x, weight, cotangent, policy)
    for gemm, value in wanted.items():
        assert sqnr(value, got[gemm]) > 120, gemm
        noise = ((value - got[gemm].double().numpy()) ** 2).sum(1)
        assert (noise <= 1e-10 * (value**2).sum(1)).all(), f"{gemm}: the small rows as well as the large ones"


@pytest.mark.parametrize("name", FINE)
def test_a_bias_is_added_and_its_gradient_is_not_quantized(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 256))
    twin, x, cotangent = copy.deepcopy(model), torch.randn(3, 50, 128), torch.randn(3, 50, 256).bfloat16()
    twin[0].bias = None
    outs = []
    for made in (model, twin):
        with Precision(policy_of(name)).prepare(made).forward():
            outs.append(made(x))
    assert outs[0].shape == (3, 50, 256)
    assert sqnr(outs[1].float() + model[0].bias.detach(), outs[0]) > 48
    outs[0].backward(cotangent)
    torch.testing.assert_close(model[0].bias.grad, cotangent.float().sum((0, 1)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FINE)
def test_the_second_direction_is_cast_from_high_precision(name):
    """Features beside a large one vanish in the casts along tokens' rows, and must not in those down the columns."""
    policy = in_fp32(name)
    model, x, cotangent = contract.one_layer(Case(name, policy), 128, 128, 128)
    x[:, 0] = 2.0**20
    weight = model[0].weight.detach().clone()
    got = contract.three_gemms(Case(name, policy), model, x, cotangent)["grad_weight"].double().numpy()[:, 1:]
    exact = (cotangent.double().T @ x.double()).numpy()[:, 1:]
    columns = oracle_cast(cotangent.T.contiguous().numpy(), policy, "grad_output")
    turned = columns @ oracle_cast(x.numpy(), policy, "input")
    assert sqnr(oracle(x, weight, cotangent, policy)["grad_weight"][:, 1:], got) > 120
    assert sqnr(exact, got) > 25
    assert sqnr(exact, turned[:, 1:]) < 5, "a transposed FP8 tensor would pass"


def test_a_scale_of_its_own_saves_the_rows_beside_an_outlier():
    """SQNR of the other rows of the output: what one scale for the whole tensor loses."""
    found = {}
    for name in ("fp8", *FINE):
        case = Case(name, policy_of(name, "emulated", backward=Format.fp8_e4m3))
        model, _, cotangent = contract.one_layer(case, 64, 256, 128)
        x = outliers(64, 256, size=2.0**16)
        exact = x.double() @ model[0].weight.detach().double().T
        got = contract.three_gemms(case, model, x, cotangent)["output"].double()
        keep = torch.arange(64) != 3
        found[name] = sqnr(exact[keep], got[keep])
    assert all(found[name] - found["fp8"] > 15 for name in FINE), found
    assert all(27 < found[name] < 33 for name in FINE), found


def power_oracle(x: np.ndarray, fmt: str, tile: tuple[int, int], margin: int) -> np.ndarray:
    """FP64 scale of each element, straight from the rule, tile by tile."""
    scale = np.ones(x.shape)
    height, width = (size or whole for size, whole in zip(tile, x.shape, strict=True))
    for i in range(0, x.shape[0], height):
        for j in range(0, x.shape[1], width):
            amax = np.abs(x[i : i + height, j : j + width].astype(np.float64)).max()
            if 0 < amax < np.inf:
                exponent = math.frexp(FP8[fmt][1] / amax)[1] - 1 - margin
                scale[i : i + height, j : j + width] = 2.0 ** min(exponent, 127)
    return scale


def figures_oracle(x: np.ndarray, fmt: str, scale: np.ndarray) -> tuple[list[int], list[float]]:
    """Elements, saturated, flushed, Inf, NaN; sum of squares of the values and of the errors."""
    dtype, largest = FP8[fmt]
    wide = x.astype(np.float64)
    finite, product = np.isfinite(wide), wide * scale
    rounded = np.clip(product, -largest, largest).astype(dtype).astype(np.float64)
    tie = {"fp8_e4m3": 464.0, "fp8_e5m2": 61440.0}[fmt]
    beyond = np.abs(product) >= tie if fmt == "fp8_e5m2" else np.abs(product) > tie
    flushed = finite & (wide != 0) & (rounded == 0)
    counts = [x.size, (beyond & finite).sum(), flushed.sum(), np.isinf(wide).sum(), np.isnan(wide).sum()]
    error = (wide - rounded / scale)[finite]
    return [int(n) for n in counts], [float((wide[finite] ** 2).sum()), float((error**2).sum())]


def planted(rows: int, width: int, seed: int) -> Tensor:
    """Sizes from 2^-30 to 2^30 by row, ties and values below the smallest, zeros, an Inf and two NaN."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator) * torch.exp2(torch.randint(-30, 30, (rows, 1)).float())
    x = torch.where(torch.rand(rows, width, generator=generator) < 0.2, x * 2.0**-19, x)
    x[1], x[2, ::3], x[3] = 0.0, 0.0, 465.0
    x[3, 5], x[4, 6], x[5, 100], x[5, 3] = torch.inf, torch.nan, torch.nan, 70000.0
    return x.bfloat16().float()


PLANTED = [(name, "emulated", margin) for name in FINE for margin in (0, -1, 3)] + [("fp8-rowwise", "native", 0)]


@pytest.mark.parametrize(("name", "backend", "margin"), PLANTED)
def test_planted_values_are_counted_exactly(name, backend, margin):
    policy = replace(in_fp32(name, backward=Format.fp8_e5m2, margin=margin), backend=backend)
    torch.manual_seed(0)
    operands = {"input": planted(40, 256, 1), "weight": planted(128, 256, 2), "grad_output": planted(40, 128, 3)}
    model = nn.Sequential(nn.Linear(256, 128, bias=False))
    model[0].weight.data = operands["weight"].clone()
    precision = Precision(policy).prepare(model)
    books = precision.counters
    books.sample()
    with precision.forward():
        out = model(operands["input"])
    out.backward(operands["grad_output"])
    slots = {role: index for index, (_, role) in enumerate(books.slots)}
    sums = books.sums
    for role, x in operands.items():
        tile = {"fp8-rowwise": (1, 0), "fp8-block": (128, 128) if role == "weight" else (1, 128)}[name]
        fmt = str(policy.quantization.format_of(role))
        counts, errors = figures_oracle(x.numpy(), fmt, power_oracle(x.numpy(), fmt, tile, margin))
        assert sums["counts"][slots[role]].tolist() == counts, role
        assert counts[2] > 0, "the test plants underflow"
        assert counts[1] > 0 or role == "weight", "and saturation beside an Inf or a NaN"
        assert sums["errors"][slots[role]].tolist() == pytest.approx(errors, rel=1e-12)
        assert sums["histogram"][slots[role]].sum() == x.numel()
        assert math.isnan(books.amax[slots[role]]), "a NaN shows in the amax"
        assert math.isnan(books.scale[slots[role]]), "no one scale stands for the cast"


@pytest.mark.parametrize("fmt", [Format.fp8_e4m3, Format.fp8_e5m2], ids=str)
@pytest.mark.parametrize("margin", [0, 2, -3])
def test_scales_are_the_largest_powers_of_two_that_fit(fmt, margin):
    """For every BF16 amax, bit for bit; and a hair beside the powers of two in FP32."""
    amax = torch.arange(0x7FFF + 1, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    edges = torch.tensor([fmt.value.max * 2.0**k for k in range(-110, 100)])
    amax = torch.cat([amax, edges, edges.nextafter(torch.tensor(0.0)), edges.nextafter(torch.tensor(math.inf))])
    wide = amax.double().numpy()
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        exact = (np.float32(fmt.value.max) / wide.astype(np.float32)).astype(np.float64)
        exponent = np.frexp(np.minimum(exact, 2.0**127))[1] - 1 - margin
    wanted = np.where((wide > 0) & np.isfinite(wide), np.exp2(np.clip(exponent, -126, 127).astype(np.float64)), 1.0)
    got = tiles.powers(amax, fmt, margin)
    assert got.dtype == torch.float32
    assert np.array_equal(got.double().numpy(), wanted)


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (128, 128), (130, 300)], ids=str)
@pytest.mark.parametrize("tile", [(0, 0), (1, 0), (0, 1), (1, 128), (128, 1), (128, 128)], ids=str)
def test_a_cast_is_every_tile_s_own(tile, shape):
    """Codes against ml_dtypes, bit for bit, and what a GEMM gets: the value over the scale of the whole."""
    x = outliers(*shape, row=0).bfloat16()
    if x.numel() > 1:
        x[-1, -1], x[-1, 0] = 2.0**-132, 2.0**20  # the product is below BF16's range: lost by the cast, and it counts
    (codes, carried, ratio, scale), amax = tiles.cast(x, tile, Format.fp8_e4m3, carrier=torch.bfloat16)
    wide = x.float().numpy()
    own = power_oracle(wide, "fp8_e4m3", tile, 0)
    counts = torch.zeros(5, dtype=torch.int64)
    counted, _ = tiles.cast(x, tile, Format.fp8_e4m3, counts=counts)
    assert torch.equal(counted.codes.view(torch.uint8), codes.view(torch.uint8))
    assert counts.tolist() == figures_oracle(wide, "fp8_e4m3", own)[0]
    assert np.array_equal(codes.float().numpy(), (wide * own).astype(ml_dtypes.float8_e4m3fn).astype(np.float32))
    assert amax == x.abs().max()
    assert scale == power_oracle(wide, "fp8_e4m3", (0, 0), 0)[0, 0]
    back = (wide * own).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) / own
    assert np.array_equal(carried.double().numpy() / scale.item(), back)
    assert torch.equal(tiles.decode(codes, tile, ratio, torch.bfloat16), carried)


def test_backward_keeps_a_byte_a_value():
    """Codes of input and weight; beside them scales, of which a row has one and 128 elements have one."""
    for name, scales in (("fp8-rowwise", 384 + 384), ("fp8-block", 384 * 2 + 3 * 2)):
        model, x, _ = contract.one_layer(Case(name, policy_of(name)), 256, 384, 256)
        precision = Precision(policy_of(name)).prepare(model)
        kept: list[Tensor] = []
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t), lambda t: t)
        with hooks, precision.forward():
            model(x)
        codes = sum(t.numel() for t in kept if t.dtype is torch.float8_e4m3fn)
        assert codes == 256 * 384 * 2
        assert sum(t.numel() * t.element_size() for t in kept) == codes + 4 * (scales + 2), name


def run_of(name: str, *, checkpointing: bool = False) -> tuple[nn.Module, Precision]:
    torch.manual_seed(0)
    model = gpt.build(gpt.Config(vocab_size=64, block_size=32, n_layer=2, n_head=2, n_embd=128))
    precision = Precision(policy_of(name)).prepare(model)
    if checkpointing:
        model.recompute = precision.recompute
    return model, precision


def text(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    tokens = (torch.randint(0, 64, (5, 1), generator=generator) + 3 * torch.arange(33)) % 64
    return tokens[:, :-1], tokens[:, 1:]


@pytest.mark.parametrize("name", FINE)
def test_training_in_it_is_next_to_training_in_fp32(name):
    """160 tokens a micro-batch: grad_weight's last tiles are partial."""
    ends = {}
    for which in ("fp32", name):
        model, precision = run_of(which)
        assert which == "fp32" or len(precision.report.converted) == 8
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        losses = []
        for step in range(16):
            with precision.forward():
                loss = model(*text(step))
            precision.backward(loss)
            assert precision.step(optimizer, clip=1.0).read().applied
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < 0.6 * losses[0]
        ends[which] = losses[-1]
    assert 0 < abs(ends[name] - ends["fp32"]) < 0.1


@pytest.mark.parametrize("name", FINE)
def test_the_audit_proves_every_layer(name):
    model, precision = run_of(name, checkpointing=True)
    with StepAudit(model, precision) as step:
        for micro in range(2):
            with precision.forward():
                loss = model(*text(micro))
            precision.backward(loss)
    audit = step.result
    assert audit.problems() == []
    linear = sum(row.flops for row in audit.rows if row.layer.startswith("blocks") and row.gemm != "attention")
    assert audit.asked_coverage == linear / audit.flops > 0.8
    assert {row.evidence for row in audit.rows if set(row.ran) == {"fp8_e4m3"}} == {"values"}


def test_the_audit_tells_scaled_tiles_from_numbers_that_are_none():
    x = outliers(256, 256).bfloat16()
    x[:, 100] *= 2.0**-30
    for tile in ((1, 0), (1, 128), (128, 128), (0, 1)):
        carried = tiles.cast(x, tile, Format.fp8_e4m3, carrier=torch.bfloat16)[0].carried
        assert look(carried, Format.fp8_e4m3, emulated=True, tile=tile).ran == "fp8_e4m3"
        off = carried.clone()
        off[9, 9] *= 1.0625  # a mantissa bit too many
        assert look(off, Format.fp8_e4m3, emulated=True, tile=tile).ran == "bf16"
    down = tiles.cast(x, (0, 1), Format.fp8_e4m3, carrier=torch.bfloat16)[0].carried
    assert look(down, Format.fp8_e4m3, emulated=True, tile=(1, 0)).ran == "bf16", "cast along the wrong dimension"


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("name", FINE)
def test_under_a_compiler_it_is_the_same(name):
    """A graph break around each layer: outputs, gradients and books as without."""
    found = []
    for compiled in (False, True):
        model, precision = run_of(name)
        forward = torch.compile(model, backend="eager") if compiled else model
        precision.counters.sample()
        with precision.forward():
            loss = forward(*text(0))
        precision.backward(loss)
        found.append([loss, *(p.grad for p in model.parameters()), *precision.counters.take().values()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("name", FINE)
def test_a_record_has_the_figures_of_the_cast_and_no_scale(name):
    """Nobody may judge such a cast at one scale; its counts and its SQNR are there."""
    model, precision = run_of(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    monitor = Monitor(model, precision, TelemetryConfig(), 1)
    assert monitor.due(1)
    monitor.begin_step(1)
    with precision.forward():
        loss = model(*text(0))
    precision.backward(loss)
    monitor.see_gradients()
    sample = monitor.end_step(1, optimizer, precision.step(optimizer))
    place = "blocks.1.mlp.up/grad_output"
    assert 25 < sample.metrics[f"sqnr_db/{place}"] < 35
    assert 0 < sample.metrics[f"amax/{place}"] < 1
    assert f"scale/{place}" not in sample.metrics
    rows = tensors.figures(tensors.Tensors("", sample.record.rows, sample.record.tables))
    (row,) = [row for row in rows if f"{row.layer}/{row.role}" == place]
    assert (row.used.format, row.used.scale, row.used.subnormal) == ("fp8_e4m3", None, None)
    assert row.used.elements == row.elements == 5 * 32 * 512
    assert row.used.sqnr_db == pytest.approx(sample.metrics[f"sqnr_db/{place}"])


def test_layers_without_whole_tiles_stay_in_compute():
    model = nn.Sequential(nn.Linear(128, 96), nn.Linear(96, 128), nn.Linear(128, 256))
    report = Precision("fp8-block").prepare(model).report
    assert report.converted == ("2",)
    assert report.kept == {
        "0": "96x128 is not divisible by 128, which FP8 GEMMs need",
        "1": "128x96 is not divisible by 128, which FP8 GEMMs need",
    }
    assert set(Precision("fp8-rowwise").prepare(nn.Sequential(nn.Linear(48, 96))).report.converted) == {"0"}

"""The quantizers against independent oracles (ml_dtypes, NumPy) and against each other, bit for bit."""

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from mptrain import kernels
from mptrain.formats import Format, overflows, underflows
from mptrain.kernels import Statistics, c, exhaustive
from mptrain.kernels.bits import NAN_BITS

E4M3, E5M2, FP16, TF32 = Format.fp8_e4m3, Format.fp8_e5m2, Format.fp16, Format.tf32
CPU = torch.device("cpu")
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
SCALES = (1.0, 3.7, 2.0**-120, 1e-5, 3e38, 1e-42, -2.0, math.inf, math.nan, 0.0)

needs_c = pytest.mark.skipif(bool(c.missing(CPU)), reason=f"C kernels: {c.missing(CPU)}")
each = pytest.mark.parametrize("name", [pytest.param("c", marks=needs_c), "eager"])
each_code = pytest.mark.parametrize("fmt", [E4M3, E5M2, FP16], ids=str)
each_format = pytest.mark.parametrize("fmt", [E4M3, E5M2, FP16, TF32], ids=str)


def bits(x):
    return x.view(BITS[x.element_size()])


def one(value=1.0):
    return torch.tensor(value, dtype=torch.float32)


def all_16_bit(dtype):
    return torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)


def random_bits(n, seed=0):
    """FP32 of uniformly random bit patterns: every exponent, subnormals, Infs and NaNs alike."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, (n,), generator=generator).to(torch.int32).view(torch.float32)


def ties(fmt):
    """Every midpoint between neighbours of ``fmt``, and the FP32 values just below and just above it."""
    codes = torch.arange(0x7C00 if fmt is FP16 else 0x7C, dtype=torch.int32)
    dtype = fmt.value.dtype
    values = codes.to(torch.int16 if fmt is FP16 else torch.uint8).view(dtype).float()
    middle = bits((values[1:] + values[:-1]) / 2)
    edge = bits(one(fmt.value.overflow_at))
    near = torch.cat([middle - 1, middle, middle + 1, torch.stack([edge - 1, edge, edge + 1])]).view(torch.float32)
    return torch.cat([near, -near])


def run(name, x, scale, fmt):
    """Everything the kernels give for ``x``, as a dictionary of bit patterns."""
    got = {}
    with kernels.use(name):
        counts, amax = torch.zeros(5, dtype=torch.int64), one(-7.0)
        got["fake"] = kernels.fake_quantize(x, scale, fmt, statistics=Statistics(counts=counts, amax=amax))
        got["counts"], got["amax"], got["amax alone"] = counts, amax, kernels.amax(x)
        for carrier in (None, torch.float32, torch.bfloat16):
            if fmt is TF32 or (fmt is FP16 and carrier is torch.bfloat16):
                continue
            again = torch.zeros(5, dtype=torch.int64)
            q, carried = kernels.quantize(x, scale, fmt, carrier=carrier, statistics=Statistics(counts=again))
            assert torch.equal(counts, again)
            got[f"q for {carrier}"] = q
            got[f"decoded for {carrier}"] = kernels.decode(q, carrier or torch.bfloat16)
            if carried is not None:
                got[f"carried in {carrier}"] = carried
    return {key: value if key == "counts" else bits(value) for key, value in got.items()}


def assert_same(left, right):
    assert left.keys() == right.keys()
    assert [key for key in left if not torch.equal(left[key], right[key])] == []


@each
@each_code
def test_codes_equal_ml_dtypes(name, fmt):
    x = torch.cat([all_16_bit(torch.bfloat16).float(), random_bits(300_000), ties(fmt)])
    clamped = x.numpy() if fmt is FP16 else np.clip(x.numpy(), -fmt.value.max, fmt.value.max)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = clamped.astype(exhaustive.ORACLE[fmt])
    with kernels.use(name):
        q, carried = kernels.quantize(x, one(), fmt, carrier=torch.float32)
        narrow, _ = kernels.quantize(all_16_bit(torch.bfloat16), one(), fmt)
    nan = x.isnan()
    wanted = torch.from_numpy(expected.view(np.int16 if fmt is FP16 else np.uint8))
    assert torch.equal(bits(q)[~nan], wanted[~nan])
    assert (bits(q)[nan] == (0x7E00 if fmt is FP16 else 0x7F)).all()
    assert torch.equal(bits(carried)[~nan], torch.from_numpy(expected.astype(np.float32).view(np.int32))[~nan])
    assert torch.equal(bits(narrow), bits(q)[:65536])


@each
def test_tf32_equals_rounding_by_halves_in_float64(name):
    x = torch.cat([random_bits(300_000), all_16_bit(torch.float16).float(), bits(random_bits(9)).view(torch.float32)])
    x = torch.cat([x, torch.tensor([0x7F7FEFFF, 0x7F7FF000, 0x3F801000, 0x3F803000], dtype=torch.int32).view(x.dtype)])
    wide = x.double().numpy()
    with np.errstate(over="ignore", invalid="ignore"):
        step = np.exp2(np.maximum(np.frexp(wide)[1] - 1, -126) - 10.0)
        expected = np.where(np.isfinite(wide), np.rint(wide / step) * step, wide).astype(np.float32)
    with kernels.use(name):
        got = kernels.fake_quantize(x, one(), TF32)
    nan = x.isnan()
    assert torch.equal(bits(got)[~nan], torch.from_numpy(expected.view(np.int32))[~nan])
    assert (bits(got)[nan] == NAN_BITS).all()


@needs_c
@each_format
def test_c_equals_eager_for_every_input_type_and_scale(fmt):
    for x in (all_16_bit(torch.bfloat16), all_16_bit(torch.float16), random_bits(20_011)):
        for scale in SCALES:
            assert_same(run("c", x, one(scale), fmt), run("eager", x, one(scale), fmt))


PLANTED = {
    E4M3: ([448.0, 448.1, 464.0, 465.0, -465.0, 2.0**-10, 2.0**-10 * 1.01, -(2.0**-9), 1e-40], 2, 2),
    E5M2: ([57344.0, 61439.0, 61440.0, -1e38, 2.0**-17, 2.0**-17 * 1.01, -(2.0**-16), 1e-45], 2, 2),
    FP16: ([65504.0, 65519.0, 65520.0, -65536.0, 2.0**-25, 2.0**-25 * 1.01, 2.0**-24, 1e-39], 2, 2),
    TF32: ([3.4e38, 1.0, 1e-45, 2.0**-137, 2.0**-137 * 1.5], 0, 2),
}


@each
@each_format
def test_counts_are_exact_on_planted_values(name, fmt):
    values, saturated, flushed = PLANTED[fmt]
    special = torch.tensor([0x7F800001, -1, 0x7FC00000, -0x800000, 0x7F800000], dtype=torch.int32).view(torch.float32)
    x = torch.cat([torch.tensor(values), special, torch.tensor([0.0, -0.0])])
    counts = torch.full((5,), 100, dtype=torch.int64)
    with kernels.use(name):
        kernels.fake_quantize(x, one(), fmt, statistics=Statistics(counts=counts))
    assert (counts - 100).tolist() == [len(x), saturated, flushed, 2, 3]


@each
@each_format
@pytest.mark.parametrize("scale", [1.0, 3.7, 2.0**-20])
def test_counts_equal_the_definition_in_formats(name, fmt, scale):
    x = torch.cat([random_bits(50_000), torch.randn(50_000, generator=torch.Generator().manual_seed(1)) * 300])
    y, counts = x * scale, torch.zeros(5, dtype=torch.int64)
    with kernels.use(name):
        kernels.fake_quantize(x, one(scale), fmt, statistics=Statistics(counts=counts))
    over = (overflows(y, fmt) | (y.isinf() & x.isfinite())).sum()
    under = (underflows(y, fmt) | ((y == 0) & (x != 0))).sum()
    assert counts.tolist() == [len(x), over, under, x.isinf().sum(), x.isnan().sum()]


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_infinity_and_one_nan_in_a_million(name, dtype):
    x = torch.ones(1_000_003, dtype=dtype)
    x[777_777] = -math.inf
    counts, amax = torch.zeros(5, dtype=torch.int64), one()
    with kernels.use(name):
        kernels.quantize(x, one(), E4M3, statistics=Statistics(counts=counts, amax=amax))
        assert counts.tolist() == [1_000_003, 0, 0, 1, 0]
        assert amax == math.inf == kernels.amax(x)
        x[1_000_002] = math.nan
        kernels.quantize(x, one(), E4M3, statistics=Statistics(counts=counts, amax=amax))
        assert counts.tolist() == [2_000_006, 0, 0, 2, 1]
        assert amax.isnan()
        assert kernels.amax(x).isnan()


@needs_c
def test_sizes_threads_and_layouts():
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for n in (0, 1, 7, 15, 16, 17, 63, 65, 4095, 4096, 4097, 65535, 65536, 200_001):
                x = random_bits(n, seed=n)
                assert_same(run("c", x, one(3.7), E5M2), run("eager", x, one(3.7), E5M2))
    finally:
        torch.set_num_threads(threads)
    wide = random_bits(6 * 40 * 50).view(6, 40, 50)
    for x in (wide.transpose(0, 2), wide[:, ::3, 1:], wide[:1, :1, :1].expand(3, 4, 5), wide[0, 0, 0]):
        left, right = (run(name, x, one(0.3), E4M3) for name in ("c", "eager"))
        assert_same(left, right)
        assert left["fake"].shape == x.shape == left["q for None"].shape
        assert_same(left, run("c", x.contiguous(), one(0.3), E4M3))


@each
def test_empty_tensor_and_rounding_in_place(name):
    with kernels.use(name):
        empty = torch.empty(0, 3)
        assert kernels.amax(empty) == 0
        assert kernels.quantize(empty, one(), E4M3)[0].shape == (0, 3)
        x = random_bits(5000)
        expected = kernels.fake_quantize(x, one(2.0), E4M3)
        assert kernels.fake_quantize(x, one(2.0), E4M3, out=x) is x
    assert torch.equal(bits(x), bits(expected))


@each
@each_code
def test_decode_is_exact_for_every_code(name, fmt):
    codes = torch.arange(2**fmt.value.bits, dtype=torch.int32).to(torch.int16 if fmt is FP16 else torch.uint8)
    oracle = codes.numpy().view(exhaustive.ORACLE[fmt]).astype(np.float32)
    expected = torch.from_numpy(np.where(np.isnan(oracle), np.float32(np.nan), oracle))
    with kernels.use(name):
        assert torch.equal(bits(kernels.decode(codes.view(fmt.value.dtype), torch.float32)), bits(expected))
        narrow = kernels.decode(codes.view(fmt.value.dtype), torch.bfloat16)
    rounded = torch.from_numpy(expected.numpy().astype(ml_dtypes.bfloat16).view(np.int16))
    assert torch.equal(bits(narrow)[~expected.isnan()], rounded[~expected.isnan()])


@settings(deadline=None, max_examples=200)
@given(amax=st.floats(0, exclude_min=True, width=32), margin=st.integers(0, 4), fmt=st.sampled_from([E4M3, E5M2, FP16]))
def test_current_scale_never_saturates(amax, margin, fmt):
    if math.isinf(amax):
        assert kernels.current_scale(one(amax), fmt, margin) == 1
        return
    scale = kernels.current_scale(one(amax), fmt, margin)
    assert torch.equal(scale, kernels.current_scale(one(amax), fmt) / 2**margin) or scale == torch.finfo().max
    assert not overflows(one(amax) * scale, fmt)
    with kernels.use("eager"):
        assert torch.equal(scale, kernels.current_scale(one(amax), fmt, margin))
    with np.errstate(over="ignore"):
        exact = np.float32(fmt.value.max) / np.float32(amax) / np.float32(2**margin)
    assert scale.item() == min(exact, np.finfo(np.float32).max)


@each
def test_current_scale_at_the_edges(name):
    with kernels.use(name):
        for amax in (0.0, -0.0, math.inf, math.nan):
            assert kernels.current_scale(one(amax), E4M3, margin=3) == 1
        assert kernels.current_scale(one(1e-40), E4M3) == torch.finfo(torch.float32).max
        assert kernels.current_scale(one(2.0), E4M3, margin=1) == 112


def function_of(x, scale):
    amax, counts = kernels.amax(x), torch.zeros(5, dtype=torch.int64)
    q, carried = kernels.quantize(
        x, kernels.current_scale(amax, E4M3), E4M3, carrier=torch.bfloat16, statistics=Statistics(counts=counts)
    )
    return carried, kernels.decode(q, torch.float32), kernels.fake_quantize(x, scale, TF32), counts


def test_torch_compile_takes_the_operators_without_a_graph_break():
    x = torch.randn(33, 5, generator=torch.Generator().manual_seed(0))
    got = torch.compile(function_of, fullgraph=True, backend="aot_eager")(x, one())
    assert all(torch.equal(left, right) for left, right in zip(got, function_of(x, one()), strict=True))


def test_fake_and_meta_tensors_get_shapes_and_types():
    with FakeTensorMode():
        x = torch.empty(4, 6, dtype=torch.bfloat16).t()
        q, carried = kernels.quantize(x, torch.ones(()), E5M2, carrier=torch.float32)
        assert (q.shape, q.dtype, q.is_contiguous()) == ((6, 4), torch.float8_e5m2, True)
        assert (carried.shape, carried.dtype) == ((6, 4), torch.float32)
        assert (kernels.amax(x).shape, kernels.amax(x).dtype) == ((), torch.float32)
    meta = kernels.fake_quantize(torch.empty(3, device="meta"), torch.empty((), device="meta"), TF32)
    assert (meta.shape, meta.is_meta) == ((3,), True)


def test_gradients_do_not_flow_through():
    x = torch.randn(8, requires_grad=True)
    for name in ("c", "eager") if not c.missing(CPU) else ("eager",):
        with kernels.use(name):
            assert not kernels.fake_quantize(x, one(), E4M3).requires_grad
            assert not kernels.amax(x).requires_grad


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda x: kernels.quantize(x, one(), TF32), "choose one of fp16, fp8_e4m3, fp8_e5m2"),
        (lambda x: kernels.quantize(x, one(), FP16, carrier=torch.bfloat16), "use carrier=torch.float32"),
        (lambda x: kernels.quantize(x.double(), one(), E4M3), "not torch.float64"),
        (lambda x: kernels.quantize(x, one().double(), E4M3), "scale must be one float32"),
        (lambda x: kernels.quantize(x, torch.ones(2), E4M3), "scale must be one float32"),
        (lambda x: kernels.quantize(x, one(), E4M3, statistics=Statistics(counts=torch.zeros(4))), r"int64\[5\]"),
        (
            lambda x: kernels.quantize(x, one(), E4M3, statistics=Statistics(amax=torch.zeros(2))),
            "amax must be one float32",
        ),
        (lambda x: kernels.fake_quantize(x, one(), Format.int8), "does not round to int8"),
        (lambda x: kernels.fake_quantize(x, one(), E4M3, out=torch.empty(4, 3).t()), "out must be contiguous"),
        (lambda x: kernels.decode(x, torch.float32), "decode turns FP8 and FP16"),
        (lambda x: kernels.current_scale(one(), E4M3, margin=999), "margin is a power of two"),
    ],
)
def test_wrong_arguments_say_what_would_work(call, says):
    with pytest.raises(ValueError, match=says):
        call(torch.ones(3, 4))


def test_choosing_an_implementation(monkeypatch):
    assert set(kernels.why_not()) == set(kernels.IMPLEMENTATIONS)
    assert kernels.why_not()["eager"] == ""
    with pytest.raises(ValueError, match="unknown kernels 'rust'"), kernels.use("rust"):
        pass
    with kernels.use("triton"), pytest.raises(ValueError, match="cannot serve cpu"):
        kernels.amax(torch.ones(1))
    monkeypatch.setattr(kernels.choice, "_chosen", {})
    monkeypatch.setenv("MPTRAIN_KERNELS", "eager")
    assert kernels.implementation(CPU) == "eager"
    monkeypatch.setattr(kernels.choice, "_chosen", {})
    monkeypatch.setenv("MPTRAIN_KERNELS", "numpy")
    with pytest.raises(ValueError, match="MPTRAIN_KERNELS: unknown kernels 'numpy'"):
        kernels.implementation(CPU)


def test_exhaustive_check_sees_agreement_and_difference(monkeypatch):
    assert exhaustive.mismatches(0x43DF0000, 1 << 17, E4M3) == 0  # around E4M3's maximum
    monkeypatch.setitem(exhaustive.ORACLE, E4M3, ml_dtypes.float8_e4m3fnuz)
    assert exhaustive.mismatches(0x43000000, 1000, E4M3) == 1000

"""The statistics of one pass against counts of single elements in Python, for every implementation, bit for bit."""

import math
import struct
from collections import Counter

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from mptrain import kernels
from mptrain.formats import Format
from mptrain.kernels import bins, c

CPU = torch.device("cpu")
TYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMATS = [Format.fp8_e4m3, Format.fp8_e5m2, Format.fp16, Format.tf32, Format.bf16]
CASTS = {
    Format.fp8_e4m3: ml_dtypes.float8_e4m3fn,
    Format.fp8_e5m2: ml_dtypes.float8_e5m2,
    Format.fp16: np.float16,
    Format.bf16: ml_dtypes.bfloat16,
}
SHAPES = {"counts": (5,), "histogram": (bins.N_BINS,), "errors": (2,), "blocks": (2, 256), "amax": ()}

needs_c = pytest.mark.skipif(bool(c.missing(CPU)), reason=f"C kernels: {c.missing(CPU)}")
each = pytest.mark.parametrize("name", [pytest.param("c", marks=needs_c), "eager"])
each_type = pytest.mark.parametrize("dtype", TYPES, ids=str)
each_format = pytest.mark.parametrize("fmt", FORMATS, ids=str)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=generator()).to(dtype)


def one(value):
    return torch.tensor(value, dtype=torch.float32)


def all_16_bit(dtype):
    return torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)


def random_bits(n):
    """FP32 of uniformly random bit patterns."""
    return torch.randint(-(2**31), 2**31, (n,), generator=generator()).to(torch.int32).view(torch.float32)


def tables(*names):
    kinds = {"errors": torch.float64, "amax": torch.float32}
    return {name: torch.zeros(SHAPES[name], dtype=kinds.get(name, torch.int64)) for name in names}


def observed(name, x, fmt=None, scale=None, wanted=tuple(SHAPES)):
    found = tables(*(wanted if fmt else ["histogram", "blocks", "amax"]))
    with kernels.use(name):
        kernels.observe(x, fmt=fmt, scale=None if scale is None else one(scale), **found)
    return found


def histogram(name, x):
    found = tables("histogram")
    with kernels.use(name):
        kernels.observe(x, **found)
    return found["histogram"]


def bin_of(value):
    """The definition once more, from the bytes of a Python float."""
    (bits,) = struct.unpack("<I", struct.pack("<f", abs(value)))
    if value != value:
        return bins.NAN
    return bins.ZERO if bits == 0 else bins.INF if math.isinf(value) else (bits - 1) >> 20


def oracle(x):
    wanted = torch.zeros(bins.N_BINS, dtype=torch.int64)
    for value, count in Counter(bin_of(value) for value in x.flatten().tolist()).items():
        wanted[value] = count
    return wanted


def assert_same(left, right):
    assert left.keys() == right.keys()
    errors = [found.get("errors", torch.zeros(2)) for found in (left, right)]
    torch.testing.assert_close(*errors, rtol=1e-5, atol=0, equal_nan=True)
    assert [key for key in left if key != "errors" and not same_bits(left[key], right[key])] == []


def same_bits(left, right):
    return (
        torch.equal(left.view(torch.uint8), right.view(torch.uint8))
        if left.dim()
        else same_bits(left[None], right[None])
    )


PLANTED = {
    "ties and ends": [448.0, 448.1, 464.0, -464.0001, 2.0**-10, 2.0**-10 * 1.0000001, 65519.0, 65520.0, 61440.0],
    "powers of two": [2.0**k for k in range(-149, 128)] + [-(2.0**k) * 1.125 for k in range(-146, 127)],
    "subnormals": [1e-45, -1e-44, 1e-40, 1.1754942e-38, 2.0**-126],
    "zeros": [0.0, -0.0, 0.0],
    "the largest": [3.4028234663852886e38, -3.3961775292304957e38],
    "nothing finite": [math.inf, -math.inf, math.nan, math.inf],
    "one of a kind": [0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, -1e-45, 3.4028234663852886e38],
}


@each
@pytest.mark.parametrize("values", PLANTED.values(), ids=PLANTED)
def test_planted_values_are_in_their_bins(name, values):
    for repeat in (1, 13, 700):
        x = torch.tensor(values * repeat)
        assert torch.equal(histogram(name, x), oracle(x[: len(values)]) * repeat)


@each
def test_nan_payloads_of_both_signs_and_the_end_of_a_bin(name):
    x = torch.tensor([0x7F800001, 0x7FFFFFFF, -1, -0x7FFFFF, 0x7FC00000], dtype=torch.int32).view(torch.float32)
    found = histogram(name, x)
    assert found[bins.NAN] == found.sum() == 5
    ends = bins.edges()
    assert ends[-1] == 2.0**128
    inside = histogram(name, ends[1:-1].float())  # each in the bin that it closes
    assert inside[: bins.N_MAGNITUDES].tolist() == [1] * (bins.N_MAGNITUDES - 1) + [0]
    above = torch.nextafter(ends[:-1].float(), one(math.inf))
    assert (histogram(name, above)[: bins.N_MAGNITUDES] == 1).all()


@each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_input(name, dtype):
    x = all_16_bit(dtype)
    wanted = oracle(x)
    assert torch.equal(histogram(name, x), wanted)
    shuffled = x[torch.randperm(65536, generator=generator())]
    assert torch.equal(histogram(name, shuffled.view(256, 256).t()), wanted)


@each
@each_type
def test_every_small_size(name, dtype):
    values = (normal(200) * 3).exp().to(dtype)
    values[::7] = 0
    for n in range(201):
        assert torch.equal(histogram(name, values[:n]), oracle(values[:n])), n


DISTRIBUTIONS = {
    "normal": lambda: normal(70_003),
    "half zeros": lambda: normal(30_000).relu(),
    "all zeros": lambda: torch.zeros(20_000),
    "bits": lambda: random_bits(20_000),
    "outliers": lambda: normal(20_000) * torch.where(torch.rand(20_000, generator=generator(1)) < 1e-3, 1000.0, 1.0),
    "wide": lambda: (normal(20_000) * 3).exp(),
    "wider": lambda: (normal(20_000) * 25).exp2(),
    "a step": lambda: torch.cat([normal(9_000) * 1e-30, normal(9_000)]),
    "constant": lambda: torch.full((30_000,), 0.1),
    "tiny": lambda: normal(20_000) * 1e-38,
}


@needs_c
@each_type
@pytest.mark.parametrize("make", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)
def test_c_equals_eager_for_every_distribution_format_and_thread(make, dtype):
    x = make().to(dtype)
    threads = torch.get_num_threads()
    try:
        scales = (1.0, 2.0**-20, 3.7, 1e30, 1e-42, -2.0, 3e38, math.inf, math.nan, 0.0)
        for fmt, scale, count in zip(FORMATS * 2, scales, (1, 2) * 5, strict=True):
            torch.set_num_threads(count)
            assert_same(observed("c", x, fmt, scale), observed("eager", x, fmt, scale))
    finally:
        torch.set_num_threads(threads)


LAYOUTS = {
    "no elements": lambda: torch.empty(0, 3),
    "no dimensions": lambda: one(-3.5),
    "long odd rows": lambda: normal(14, 5001),
    "short odd rows": lambda: normal(2000, 37),
    "one more than a block": lambda: normal(70, 129).bfloat16(),
    "a row in blocks": lambda: normal(40, 3, 640).half(),
    "rows of one": lambda: normal(999, 1),
    "transposed": lambda: normal(61, 130).t(),
    "every third": lambda: normal(6, 40, 50)[:, ::3, 1:],
    "expanded": lambda: normal(1, 1, 70).expand(3, 4, 70),
}


def exponent_oracle(x):
    found = torch.zeros(2, 256, dtype=torch.int64)
    rows = x.float().reshape(-1, x.shape[-1] if x.dim() else 1).abs().numpy().view(np.int32) if x.numel() else []
    for row in rows:
        for index, size in enumerate((32, 128)):
            for start in range(0, len(row), size):
                found[index, int(row[start : start + size].max()) >> 23] += 1
    return found


@each
@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)
def test_blocks_end_with_rows(name, make):
    x = make()
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found = observed(name, x)
            assert torch.equal(found["blocks"], exponent_oracle(x))
            assert torch.equal(found["histogram"], oracle(x))
    finally:
        torch.set_num_threads(threads)


@each
def test_blocks_of_nothing_but_zeros_and_with_one_infinity(name):
    x = torch.zeros(3, 256)
    x[1, 40], x[2, 130] = math.inf, 1.5
    blocks = observed(name, x)["blocks"]
    assert (blocks[0, 0], blocks[0, 255], blocks[0, 127], blocks[0].sum()) == (22, 1, 1, 24)
    assert (blocks[1, 0], blocks[1, 255], blocks[1, 127], blocks[1].sum()) == (4, 1, 1, 6)


@each
@each_type
def test_one_infinity_and_one_nan_in_a_million(name, dtype):
    x = torch.full((1_000_003,), 1.5, dtype=dtype)
    x[777_777], x[1_000_002] = -math.inf, math.nan
    found = observed(name, x, Format.fp8_e4m3, 1.0)
    assert found["counts"].tolist() == [1_000_003, 0, 0, 1, 1]
    assert {int(i): int(found["histogram"][i]) for i in found["histogram"].nonzero()} == {
        bin_of(1.5): 1_000_001,
        bins.INF: 1,
        bins.NAN: 1,
    }
    assert found["errors"].tolist() == [1_000_001 * 2.25, 0]


@each
@each_format
@pytest.mark.parametrize("scale", [1.0, 2.0**7, 3.7])
def test_counts_and_errors_equal_ml_dtypes(name, fmt, scale):
    x = torch.cat([all_16_bit(torch.bfloat16).float(), random_bits(9_000), normal(9_000) * 300])
    y = (x * scale).numpy()
    with np.errstate(over="ignore", invalid="ignore"):
        if fmt is Format.tf32:
            step = np.exp2(np.maximum(np.frexp(y.astype(np.float64))[1] - 1, -126) - 10.0)
            unbounded = np.where(np.isfinite(y), np.rint(y / step) * step, y)
            rounded = np.where(np.abs(unbounded) < 2.0**128, unbounded, np.copysign(np.inf, y)).astype(np.float32)
        else:
            clamped = np.clip(y, -fmt.value.max, fmt.value.max) if fmt.value.bits == 8 else y
            rounded = clamped.astype(CASTS[fmt]).astype(np.float32)
        back = rounded * (np.float32(1) / np.float32(scale))
    finite = np.isfinite(x.numpy())
    magnitude = np.abs(y)
    beyond = magnitude >= fmt.value.overflow_at if fmt.value.tie_overflows else magnitude > fmt.value.overflow_at
    found = observed(name, x, fmt, scale)
    flushed = (finite & (x.numpy() != 0) & (rounded == 0)).sum()
    assert found["counts"].tolist() == [len(x), (finite & beyond).sum(), flushed, x.isinf().sum(), x.isnan().sum()]
    both = finite & np.isfinite(back)
    wide, off = x.numpy()[both].astype(np.float64), (x.numpy()[both].astype(np.float64) - back[both])
    np.testing.assert_allclose(found["errors"].numpy(), [(wide**2).sum(), (off**2).sum()], rtol=1e-5)
    # The bins tell exactly what a power-of-two scale flushes, down to FP32's subnormals, whose bins are wider.
    if math.frexp(scale)[0] == 0.5 and fmt.value.underflow_at > 2.0**-126:
        bin_flushed = found["histogram"][: bins.N_MAGNITUDES][bins.edges()[1:] * scale <= fmt.value.underflow_at].sum()
        assert bin_flushed == flushed


@needs_c
@settings(deadline=None, max_examples=100)
@given(
    left=st.lists(st.floats(width=32), max_size=150),
    right=st.lists(st.floats(-10, 10, width=32), max_size=150),
    repeat=st.integers(1, 60),
    dtype=st.sampled_from(TYPES),
)
def test_histograms_add_up(left, right, repeat, dtype):
    a, b = (torch.tensor(values * repeat, dtype=torch.float32).to(dtype) for values in (left, right))
    whole = histogram("c", torch.cat([a, b]))
    assert torch.equal(whole, histogram("c", a) + histogram("c", b))
    assert torch.equal(whole, histogram("eager", torch.cat([a, b])))
    assert whole.sum() == len(a) + len(b)


@each
@each_type
def test_fused_is_separate(name, dtype):
    x = normal(260, 272, dtype=dtype)  # enough for two threads
    for fmt in FORMATS[:4]:
        alone = observed(name, x, fmt, 3.7)
        plain, fused, copied = tables(*SHAPES), tables(*SHAPES), x.clone()
        with kernels.use(name):
            wanted = kernels.fake_quantize(x, one(3.7), fmt)
            assert torch.equal(kernels.fake_quantize(copied, one(3.7), fmt, out=copied, **fused), wanted)
            assert_same(fused, alone)
            if fmt is Format.tf32:
                continue
            codes, _ = kernels.quantize(x, one(3.7), fmt)
            assert torch.equal(kernels.quantize(x, one(3.7), fmt, **plain)[0].float(), codes.float())
            assert_same(plain, alone)
            if fmt.value.bits == 8:
                turned = tables(*SHAPES)
                kernels.operands(x, one(3.7), fmt, carrier=torch.bfloat16, **turned)
                assert_same(turned, alone)


@needs_c
def test_plain_c_equals_the_vector_code(monkeypatch, tmp_path):
    """No instruction set beyond the ABI's: what runs on another processor."""
    monkeypatch.setenv("MPTRAIN_CACHE", str(tmp_path))
    monkeypatch.setattr(c, "_variants", lambda: iter([(("-O1", "-fPIC", *c.ARITHMETIC), ())]))
    library, reason = c._library.__wrapped__()
    assert reason == ""
    inputs = [make() for make in DISTRIBUTIONS.values()] + [normal(n) for n in (0, 1, 5, 63, 64, 65)]
    inputs += [normal(70, 257), all_16_bit(torch.bfloat16), all_16_bit(torch.float16)]
    expected = [observed("c", x, Format.fp8_e5m2, 3.7) for x in inputs]
    monkeypatch.setattr(c, "_loaded", lambda: library)
    for x, wanted in zip(inputs, expected, strict=True):
        assert_same(observed("c", x, Format.fp8_e5m2, 3.7), wanted)


def test_torch_compile_and_fake_tensors_take_it():
    def function(x):
        found = tables("histogram", "counts")
        kernels.observe(x, fmt=Format.bf16, scale=torch.ones(()), **found)
        return found["histogram"], found["counts"]

    x = normal(1000)
    for got, wanted in zip(torch.compile(function, fullgraph=True, backend="aot_eager")(x), function(x), strict=True):
        assert torch.equal(got, wanted)
    with FakeTensorMode():
        kernels.observe(torch.empty(3, 4), **tables("histogram", "blocks", "amax"))
        kernels.quantize(torch.empty(3, 4), torch.ones(()), Format.fp8_e4m3, **tables("errors"))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda x: kernels.observe(x, counts=torch.zeros(5, dtype=torch.int64)), "give fmt and scale"),
        (lambda x: kernels.observe(x, errors=torch.zeros(2, dtype=torch.float64), fmt=Format.bf16), "give fmt and"),
        (lambda x: kernels.observe(x, fmt=Format.int8), "does not round to int8; choose one of bf16, fp16"),
        (lambda x: kernels.observe(x.double()), "not torch.float64"),
        (lambda x: kernels.observe(x, histogram=torch.zeros(2043)), r"histogram must be contiguous int64\[2043\]"),
        (lambda x: kernels.observe(x, histogram=torch.zeros(2042, dtype=torch.int64)), r"int64\[2043\]"),
        (lambda x: kernels.observe(x, histogram=torch.zeros(4086, dtype=torch.int64)[::2]), "contiguous"),
        (lambda x: kernels.observe(x, errors=torch.zeros(2)), r"errors must be contiguous float64\[2\]"),
        (lambda x: kernels.observe(x, blocks=torch.zeros(256, 2, dtype=torch.int64).t()), r"int64\[2, 256\]"),
        (lambda x: kernels.quantize(x, one(1.0), Format.fp16, blocks=torch.zeros(2)), r"int64\[2, 256\]"),
        (lambda x: kernels.fake_quantize(x, one(1.0), Format.bf16), "does not round to bf16"),
    ],
)
def test_wrong_arguments_say_what_would_work(call, says):
    with pytest.raises(ValueError, match=says):
        call(torch.ones(3, 4))

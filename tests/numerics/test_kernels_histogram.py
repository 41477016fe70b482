"""The statistics of one pass against counts of single elements in Python, for every implementation, bit for bit."""

import math
import struct
from collections import Counter

import ml_dtypes
import numpy as np
import pytest
import torch
from histograms import (
    DISTRIBUTIONS,
    FORMATS,
    all_16_bit,
    assert_same,
    each,
    each_type,
    generator,
    histogram,
    needs_c,
    normal,
    observed,
    one,
    random_bits,
)

from mptrain.formats import Format
from mptrain.kernels import bins

CASTS = {
    Format.fp8_e4m3: ml_dtypes.float8_e4m3fn,
    Format.fp8_e5m2: ml_dtypes.float8_e5m2,
    Format.fp16: np.float16,
    Format.bf16: ml_dtypes.bfloat16,
}

each_format = pytest.mark.parametrize("fmt", FORMATS, ids=str)


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

"""Histograms against numpy's binning, and shares against casts of ml_dtypes and the definitions of formats.py."""

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mptrain.formats import Format, overflows, underflows
from mptrain.kernels.bins import INF, N_BINS, N_MAGNITUDES, NAN, ZERO, edges
from mptrain.telemetry.histogram import JUDGED, Histogram, Histograms

EVERY = (*JUDGED, Format.tf32, Format.fp32)
CASTS = {
    Format.fp16: np.float16,
    Format.bf16: ml_dtypes.bfloat16,
    Format.fp8_e4m3: ml_dtypes.float8_e4m3fn,
    Format.fp8_e5m2: ml_dtypes.float8_e5m2,
    Format.fp4_e2m1: ml_dtypes.float4_e2m1fn,
}


def numpy_bins(x):
    """int64 [N_BINS] by searching FP64 edges made from FP32 bit patterns: none of the arithmetic under test."""
    x = np.abs(np.asarray(x, dtype=np.float64))
    ends = (np.arange(2041, dtype=np.uint32) << 20).view(np.float32).astype(np.float64)
    counts = np.zeros(N_BINS, dtype=np.int64)
    finite = x[np.isfinite(x) & (x > 0)]
    np.add.at(counts, np.searchsorted(ends, finite, side="left") - 1, 1)
    counts[ZERO], counts[INF], counts[NAN] = (x == 0).sum(), np.isinf(x).sum(), np.isnan(x).sum()
    return counts


def spread_out(n=20_000, seed=0, centre=1.0, octaves=6.0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=generator) * torch.exp2(octaves * torch.randn(n, generator=generator)) * centre
    x[::97] = 0
    return x


def truth(x, fmt, scale):
    """Shares of saturated, flushed and subnormal elements by the definitions, elementwise in FP64."""
    y = x.double() * scale
    size = y.abs()
    flushed = underflows(y, fmt)
    low = (size > 0) & (size < fmt.value.min_normal) & ~flushed
    subnormal = torch.zeros_like(low) if fmt.value.integer else low
    return [float(kind.sum()) / max(1, x.numel()) for kind in (overflows(y, fmt), flushed, subnormal)]


def shares(histogram, fmt, scale):
    return [getattr(histogram, f"{kind}_frac")(fmt, scale) for kind in ("saturated", "flushed", "subnormal")]


def test_edges_are_fp32_values_eight_to_an_octave():
    ends = edges()
    assert ends.dtype == torch.float64
    assert ends.shape == (N_MAGNITUDES + 1,)
    assert ends[0] == 0
    assert ends[1] == 2.0**-129
    assert ends[-1] in (2.0**128, math.inf)
    one = int(torch.searchsorted(ends, torch.tensor(1.0, dtype=torch.float64)))
    assert ends[one : one + 9].tolist() == [1 + k / 8 for k in range(9)]


def test_every_edge_and_its_neighbours_are_binned_as_numpy_does():
    bits = (torch.arange(2041, dtype=torch.int64) << 20)[:, None] + torch.tensor([-1, 0, 1])
    x = bits.clamp(0, 0x7F7FFFFF).int().flatten().view(torch.float32)
    x = torch.cat([x, -x, torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, -math.nan])])
    assert torch.equal(Histogram.of(x).counts, torch.from_numpy(numpy_bins(x.numpy())))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_every_code_of_the_narrow_dtypes_is_binned_as_numpy_does(dtype):
    codes = torch.arange(2 ** (8 * dtype.itemsize), dtype=torch.int32)
    x = codes.to(torch.uint8 if dtype.itemsize == 1 else torch.uint16).view(dtype)
    wide = x.double().numpy()
    histogram = Histogram.of(x)
    assert torch.equal(histogram.counts, torch.from_numpy(numpy_bins(wide)))
    assert histogram.amax == np.abs(wide[np.isfinite(wide)]).max()


def test_fp64_and_shapes_and_strides_are_taken():
    x = spread_out(600).double().reshape(20, 30)[:, ::2]
    assert torch.equal(Histogram.of(x).counts, torch.from_numpy(numpy_bins(x.float().numpy().ravel())))
    assert Histogram.of(torch.empty(0)).elements == 0
    assert Histogram.of(torch.tensor(3.0)).amax == 3.0


def test_the_parts_of_a_histogram_add_up_and_merging_is_exact(monkeypatch):
    x = spread_out(30_001)
    x[:7], x[7:10] = math.nan, math.inf
    whole = Histogram.of(x)
    finite = x[x.isfinite()].abs()
    assert (whole.elements, whole.nan, whole.inf) == (30_001, 7, 3)
    assert whole.zeros == int((x == 0).sum())
    assert whole.amax == float(finite.max())
    merged = Histogram.of(x[:123]) + Histogram.of(x[123:])
    assert torch.equal(merged.counts, whole.counts)
    assert merged.amax == whole.amax
    monkeypatch.setattr("mptrain.telemetry.histogram.CHUNK", 1000)
    assert torch.equal(Histogram.of(x).counts, whole.counts)
    low, high = whole.span
    smallest = float(finite[finite > 0].min())
    assert low < smallest <= low * 1.125
    assert high == whole.amax


@pytest.mark.parametrize("fmt", CASTS, ids=str)
@pytest.mark.parametrize("power", [-9, 0, 5])
def test_flushed_is_exact_and_equals_the_zeros_of_ml_dtypes(fmt, power):
    limit = fmt.value.underflow_at / 2.0**power
    x = torch.cat([spread_out(centre=limit), limit * torch.tensor([0.5, 1.0, -1.0, 1.0000001, 1.125, 2.0])])
    if fmt is Format.bf16:
        x = x[(x == 0) | (x.abs() > 2.0**-129)]  # below, BF16's limit is inside a bin: see the bounds
        x = x[(x * 2.0**power).double() == x.double() * 2.0**power]  # the oracle casts from FP32
    cast = (x.numpy() * np.float32(2.0**power)).astype(CASTS[fmt]).astype(np.float32)
    share = Histogram.of(x).flushed_frac(fmt, 2.0**power)
    assert share.exact
    assert share.low == float(((cast == 0) & (x.numpy() != 0)).sum()) / len(x)
    if fmt is not Format.bf16:
        assert 0.1 < share.low < 0.9


@pytest.mark.parametrize("fmt", [Format.fp16, Format.bf16, Format.fp8_e5m2], ids=str)
def test_saturated_brackets_the_infinities_of_ml_dtypes(fmt):
    limit = fmt.value.overflow_at
    x = spread_out(centre=min(limit, 2.0**125))
    x = torch.cat([x[x.isfinite()], torch.tensor([limit, -limit, fmt.value.max]), torch.full((50,), limit * 0.9999)])
    with np.errstate(over="ignore"):
        cast = x.numpy().astype(CASTS[fmt]).astype(np.float32)
    actual = float(np.isinf(cast).sum()) / len(x)
    share = Histogram.of(x).saturated_frac(fmt)
    assert share.low <= actual <= share.high
    assert share.low < share.high
    assert share.low > 0


@pytest.mark.parametrize("fmt", [Format.fp8_e5m2, Format.fp4_e2m1, Format.int4], ids=str)
def test_where_the_limit_is_an_edge_the_estimate_is_exact_but_for_the_tie(fmt):
    x = spread_out(centre=fmt.value.max)
    assert not bool((x.abs() == fmt.value.overflow_at).any())
    share, (actual, _, _) = Histogram.of(x).saturated_frac(fmt), truth(x, fmt, 1.0)
    assert share.estimate == share.low == actual
    tied = torch.cat([x, torch.full((10,), fmt.value.overflow_at)])
    share, (actual, _, _) = Histogram.of(tied).saturated_frac(fmt), truth(tied, fmt, 1.0)
    assert share.low < actual <= share.high
    assert actual - share.low == pytest.approx(10 / len(tied))


@pytest.mark.parametrize("fmt", EVERY, ids=str)
def test_nothing_is_said_to_saturate_below_the_limit_and_something_above_it(fmt):
    """By the amax, which is exact: the values are in the one bin whose counts decide nothing."""
    spec = fmt.value
    below = torch.tensor(min(spec.overflow_at, 2.0**127 * 1.99)).nextafter(torch.tensor(0.0))
    share = Histogram.of(below.repeat(3)).saturated_frac(fmt)
    assert (share.low, share.high) == (0, 0)
    if fmt is not Format.fp32:  # whose limit FP32 does not hold
        above = torch.tensor(spec.overflow_at).nextafter(torch.tensor(math.inf))
        share = Histogram.of(torch.stack([below, above])).saturated_frac(fmt)
        assert share.low <= 0.5 <= share.high
        assert share.low > 0


@pytest.mark.parametrize("fmt", JUDGED, ids=str)
@pytest.mark.parametrize("power", [-3, 0, 4])
def test_subnormal_is_exact_but_for_the_smallest_normal(fmt, power):
    x = spread_out(centre=fmt.value.min_normal / 2.0**power)
    x = x[x.abs() > 2.0**-129]
    share, (_, _, actual) = Histogram.of(x).subnormal_frac(fmt, 2.0**power), truth(x, fmt, 2.0**power)
    assert share.estimate == actual
    assert share.low <= actual <= share.high
    if fmt.value.integer:
        assert (share.low, share.high) == (0, 0)


magnitudes = st.floats(width=32, allow_nan=True, allow_infinity=True, allow_subnormal=True)
near = st.sampled_from(
    [limit for f in EVERY for limit in (f.value.overflow_at, f.value.underflow_at, f.value.min_normal)]
)
planted = st.builds(lambda x, k: x * (1 + k * 2.0**-23), near, st.integers(-2, 2))
scales = st.one_of(st.integers(-40, 40).map(lambda k: 2.0**k), st.floats(2.0**-40, 2.0**40, width=32))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(magnitudes, planted), min_size=1, max_size=30), scales, st.sampled_from(EVERY), st.booleans())
def test_bounds_bracket_the_true_shares_at_any_scale(values, scale, fmt, near_limits):
    x = torch.tensor(values, dtype=torch.float64).float()
    if near_limits:  # so that values meet the limits at this scale too
        x = (x.double() / scale).float()
    for share, actual in zip(shares(Histogram.of(x), fmt, scale), truth(x, fmt, scale), strict=True):
        assert share.low - 1e-12 <= actual <= share.high + 1e-12
        assert share.low <= share.estimate <= share.high


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(2.0**-30, 2.0**30, width=32), min_size=1, max_size=20), st.floats(0.25, 4, width=32))
def test_bounds_hold_for_products_rounded_to_fp32_too(values, factor):
    """The kernels multiply in FP32: at 448 / amax such a product can land on a limit that the exact one misses."""
    x = torch.tensor(values)
    for fmt in (Format.fp8_e4m3, Format.fp8_e5m2, Format.int8):
        scale = float(torch.tensor(fmt.value.max) / x.max() * factor)
        rounded = x * torch.tensor(scale)
        saturated, flushed, _ = shares(Histogram.of(x), fmt, scale)
        assert saturated.low - 1e-12 <= float(overflows(rounded, fmt).double().mean()) <= saturated.high + 1e-12
        assert flushed.low - 1e-12 <= float(underflows(rounded, fmt).double().mean()) <= flushed.high + 1e-12


@settings(max_examples=100, deadline=None)
@given(st.one_of(st.floats(2.0**-100, 2.0**100, width=32), planted.filter(lambda x: 2.0**-100 < x < 2.0**100)))
def test_the_best_scale_is_the_largest_that_saturates_nothing(amax):
    x = torch.tensor([amax, amax / 3], dtype=torch.float64).float()
    histogram = Histogram.of(x)
    for fmt in JUDGED:
        scale = histogram.best_scale(fmt)
        assert math.frexp(scale)[0] == 0.5
        assert not bool(overflows(x.double() * scale, fmt).any())
        assert bool(overflows(x.double() * scale * 2, fmt).any()) or scale == 2.0**127
        assert histogram.saturated_frac(fmt, scale).high == 0


def test_scales_and_headroom_of_tensors_at_the_ends():
    empty = Histogram.of(torch.tensor([0.0, math.nan]))
    assert empty.best_scale(Format.fp8_e4m3) == 1
    assert empty.headroom_bits(Format.fp8_e4m3) == math.inf
    assert [share.high for share in shares(empty, Format.fp16, 1.0)] == [0, 0, 0]
    tiny = Histogram.of(torch.tensor([2.0**-149]))
    assert tiny.best_scale(Format.fp8_e4m3) == 2.0**127
    assert Histogram.of(torch.tensor([7.0])).headroom_bits(Format.fp8_e4m3, 16.0) == pytest.approx(2.0)
    assert Histogram.of(torch.tensor([448.0])).headroom_bits(Format.fp8_e4m3, 4.0) == pytest.approx(-2.0)


@pytest.mark.parametrize("q", [0, 1, 25, 50, 99, 100])
def test_a_percentile_is_within_a_bin_of_numpys(q):
    x = spread_out().abs()
    wanted = np.percentile(x[x > 0].numpy(), q, method="inverted_cdf")
    assert Histogram.of(x).percentile(q) == pytest.approx(wanted, rel=0.126)
    assert math.isnan(Histogram.of(torch.zeros(3)).percentile(q))


def test_judging_together_is_judging_one_by_one():
    tensors = [spread_out(500, seed, 10.0 ** (seed - 4), 2.0) for seed in range(9)]
    tensors.append(torch.zeros(4))
    each = [Histogram.of(x) for x in tensors]
    together = Histograms(torch.stack([h.counts for h in each]), torch.tensor([h.amax for h in each]).double())
    for fmt in JUDGED:
        scale = together.best_scale(fmt) * 2
        verdicts = together.judge(fmt, scale)
        for index, histogram in enumerate(each):
            found = [part.row(index) for part in verdicts[1:]]
            assert found == shares(histogram, fmt, float(scale[index]))


def test_octaves_are_powers_of_two():
    x = torch.tensor([2.0**-126, 2.0**-130, 1.0, 1.0000001, 1.5, 2.0, 2.0**127 * 1.5])
    octaves = Histograms(Histogram.of(x).counts[None], torch.tensor([1.0])).octaves()[0]
    assert {int(i) - 127: int(octaves[i]) for i in octaves.nonzero()} == {-127: 2, -1: 1, 0: 3, 127: 1}


def test_a_recorded_amax_that_cannot_be_right_is_replaced_by_its_bins_end():
    counts = torch.stack([Histogram.of(torch.tensor([1.0, 3.3])).counts] * 4 + [Histogram.of(torch.zeros(2)).counts])
    amax = torch.tensor([3.3, math.inf, math.nan, 2.0, math.inf])
    expected = [float(torch.tensor(3.3)), 3.5, 3.5, 3.5, 0.0]
    assert Histograms.of_tables(counts, amax).amax.tolist() == expected
    assert Histograms.of_tables(counts).amax.tolist() == [3.5] * 4 + [0.0]
    assert Histograms.of_tables(Histogram.of(torch.tensor([3.4e38])).counts[None]).amax.item() < 2.0**128


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan])
def test_a_scale_that_is_none_is_refused(scale):
    with pytest.raises(ValueError, match="scale="):
        Histogram.of(torch.ones(2)).flushed_frac(Format.fp16, scale)


def test_what_has_no_magnitudes_is_refused():
    with pytest.raises(ValueError, match=r"torch\.int64"):
        Histogram.of(torch.arange(3))
    with pytest.raises(ValueError, match="percentile"):
        Histogram.of(torch.ones(3)).percentile(101)

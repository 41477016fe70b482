"""Histograms add up, fused and by parts, under torch.compile and on fake tensors."""

import pytest
import torch
from histograms import (
    DISTRIBUTIONS,
    FORMATS,
    SHAPES,
    TYPES,
    all_16_bit,
    assert_same,
    each,
    each_type,
    histogram,
    needs_c,
    normal,
    observed,
    one,
    tables,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from mptrain import kernels
from mptrain.formats import Format
from mptrain.kernels import Statistics, c


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
            assert torch.equal(
                kernels.fake_quantize(copied, one(3.7), fmt, out=copied, statistics=Statistics(**fused)), wanted
            )
            assert_same(fused, alone)
            if fmt is Format.tf32:
                continue
            codes, _ = kernels.quantize(x, one(3.7), fmt)
            assert torch.equal(
                kernels.quantize(x, one(3.7), fmt, statistics=Statistics(**plain))[0].float(), codes.float()
            )
            assert_same(plain, alone)
            if fmt.value.bits == 8:
                turned = tables(*SHAPES)
                kernels.operands(x, one(3.7), fmt, carrier=torch.bfloat16, statistics=Statistics(**turned))
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
        kernels.observe(x, Statistics(**found), fmt=Format.bf16, scale=torch.ones(()))
        return found["histogram"], found["counts"]

    x = normal(1000)
    for got, wanted in zip(torch.compile(function, fullgraph=True, backend="aot_eager")(x), function(x), strict=True):
        assert torch.equal(got, wanted)
    with FakeTensorMode():
        kernels.observe(torch.empty(3, 4), Statistics(**tables("histogram", "blocks", "amax")))
        kernels.quantize(torch.empty(3, 4), torch.ones(()), Format.fp8_e4m3, statistics=Statistics(**tables("errors")))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda x: kernels.observe(x, Statistics(counts=torch.zeros(5, dtype=torch.int64))), "give fmt and scale"),
        (
            lambda x: kernels.observe(x, Statistics(errors=torch.zeros(2, dtype=torch.float64)), fmt=Format.bf16),
            "give fmt and",
        ),
        (
            lambda x: kernels.observe(x, Statistics(), fmt=Format.int8),
            "does not round to int8; choose one of bf16, fp16",
        ),
        (lambda x: kernels.observe(x.double(), Statistics()), "not torch.float64"),
        (
            lambda x: kernels.observe(x, Statistics(histogram=torch.zeros(2043))),
            r"histogram must be contiguous int64\[2043\]",
        ),
        (lambda x: kernels.observe(x, Statistics(histogram=torch.zeros(2042, dtype=torch.int64))), r"int64\[2043\]"),
        (lambda x: kernels.observe(x, Statistics(histogram=torch.zeros(4086, dtype=torch.int64)[::2])), "contiguous"),
        (lambda x: kernels.observe(x, Statistics(errors=torch.zeros(2))), r"errors must be contiguous float64\[2\]"),
        (
            lambda x: kernels.observe(x, Statistics(blocks=torch.zeros(256, 2, dtype=torch.int64).t())),
            r"int64\[2, 256\]",
        ),
        (
            lambda x: kernels.quantize(x, one(1.0), Format.fp16, statistics=Statistics(blocks=torch.zeros(2))),
            r"int64\[2, 256\]",
        ),
        (lambda x: kernels.fake_quantize(x, one(1.0), Format.bf16), "does not round to bf16"),
    ],
)
def test_wrong_arguments_say_what_would_work(call, says):
    with pytest.raises(ValueError, match=says):
        call(torch.ones(3, 4))

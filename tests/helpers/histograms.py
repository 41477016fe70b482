"""Observed tensors and their histograms."""

import pytest
import torch

from mptrain import kernels
from mptrain.formats import Format
from mptrain.kernels import Statistics, bins, c

CPU = torch.device("cpu")
TYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMATS = [Format.fp8_e4m3, Format.fp8_e5m2, Format.fp16, Format.tf32, Format.bf16]
SHAPES = {"counts": (5,), "histogram": (bins.N_BINS,), "errors": (2,), "blocks": (2, 256), "amax": ()}
needs_c = pytest.mark.skipif(bool(c.missing(CPU)), reason=f"C kernels: {c.missing(CPU)}")
each = pytest.mark.parametrize("name", [pytest.param("c", marks=needs_c), "eager"])
each_type = pytest.mark.parametrize("dtype", TYPES, ids=str)


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
        kernels.observe(x, Statistics(**found), fmt=fmt, scale=None if scale is None else one(scale))
    return found


def histogram(name, x):
    found = tables("histogram")
    with kernels.use(name):
        kernels.observe(x, Statistics(**found))
    return found["histogram"]


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

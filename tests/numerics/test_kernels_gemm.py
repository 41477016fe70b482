"""What the GEMMs around the quantizer need: a carrier, grad_output both ways round, and the bias gradient."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mptrain import Precision, kernels
from mptrain.formats import Format
from mptrain.kernels import Statistics
from mptrain.precision.backends.emulated.gemm import carrier_dtype

SHAPES = [(1, 16), (33, 48), (300, 272), (2048, 384)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_operands_are_quantize_and_its_transpose(shape, dtype):
    x, scale = torch.randn(shape).to(dtype), torch.tensor(7.3)
    for fmt in (Format.fp8_e4m3, Format.fp8_e5m2):
        counts, amax = [torch.zeros(5, dtype=torch.int64) for _ in range(2)], [torch.zeros(()) for _ in range(2)]
        got, turned = kernels.operands(
            x, scale, fmt, carrier=torch.bfloat16, statistics=Statistics(counts=counts[0], amax=amax[0])
        )
        _, wanted = kernels.quantize(
            x, scale, fmt, carrier=torch.bfloat16, statistics=Statistics(counts=counts[1], amax=amax[1])
        )
        assert torch.equal(got, wanted)
        assert torch.equal(turned, wanted.t())
        assert torch.equal(counts[0], counts[1])
        assert torch.equal(amax[0], amax[1])


@pytest.mark.parametrize("shape", [(1, 64), (15, 64), (17, 128), (300, 192), (4100, 1152), (65537, 64)])
def test_column_sums_are_torch_s(shape):
    x = torch.randn(shape).to(torch.bfloat16)
    wanted = x.sum(0, dtype=torch.float64)
    got = kernels.column_sums(x)
    assert got.dtype is torch.float32
    torch.testing.assert_close(got.double(), wanted, rtol=1e-6, atol=1e-6 * x.abs().sum(0).max().item())


@pytest.fixture
def carrier(monkeypatch):
    """A function that forces the carrier, as a new process would with MPTRAIN_CARRIER."""

    def force(name):
        monkeypatch.setenv("MPTRAIN_CARRIER", name)
        carrier_dtype.cache_clear()

    yield force
    carrier_dtype.cache_clear()


@pytest.mark.parametrize("precision", ["fp8", "fp8-delayed", "fp8-rowwise", "fp8-block"])
def test_either_carrier_multiplies_the_same(carrier, precision):
    """Of small whole numbers, whose sums are exact in any order."""
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randint(-4, 5, (128, 128), generator=generator).float() for _ in range(2))
    found = {}
    for name in ("bf16", "fp32"):
        carrier(name)
        model = nn.Sequential(nn.Linear(128, 128, bias=False))
        model[0].weight.data.copy_(weight)
        ours = Precision(precision).prepare(model)
        assert ours.backend.carrier.startswith({"bf16": "bfloat16", "fp32": "float32"}[name])
        with ours.forward():
            out = model(x)
        ours.backward(out.float().sum())
        found[name] = out, model[0].weight.grad
    assert torch.equal(found["bf16"][0], found["fp32"][0])
    assert torch.equal(found["bf16"][1], found["fp32"][1])


def test_a_carrier_that_is_none_is_refused(carrier):
    carrier("fp16")
    with pytest.raises(ValueError, match=r"^MPTRAIN_CARRIER=fp16 .*set it to bf16 or fp32, or unset it$"):
        Precision("fp8").prepare(nn.Sequential(nn.Linear(16, 16)))

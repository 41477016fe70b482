"""What the GEMMs around the quantizer need: grad_output both ways round, and the bias gradient."""

from __future__ import annotations

import pytest
import torch

from mptrain import kernels
from mptrain.formats import Format

SHAPES = [(1, 16), (33, 48), (300, 272), (2048, 384)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_operands_are_quantize_and_its_transpose(shape, dtype):
    x, scale = torch.randn(shape).to(dtype), torch.tensor(7.3)
    for fmt in (Format.fp8_e4m3, Format.fp8_e5m2):
        counts, amax = [torch.zeros(5, dtype=torch.int64) for _ in range(2)], [torch.zeros(()) for _ in range(2)]
        got, turned = kernels.operands(x, scale, fmt, carrier=torch.bfloat16, counts=counts[0], amax=amax[0])
        _, wanted = kernels.quantize(x, scale, fmt, carrier=torch.bfloat16, counts=counts[1], amax=amax[1])
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

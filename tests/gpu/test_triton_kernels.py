"""The Triton kernels against the CPU kernels, bit for bit."""

import math

import pytest
import torch

from mptrain import kernels
from mptrain.formats import Format
from mptrain.kernels import Statistics

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
FORMATS = [Format.fp8_e4m3, Format.fp8_e5m2, Format.fp16, Format.tf32]
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def bits(x):
    return x.view(BITS[x.element_size()]).cpu()


def inputs():
    narrow = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    generator = torch.Generator().manual_seed(0)
    wide = torch.randint(-(2**31), 2**31, (100_003,), generator=generator).to(torch.int32)
    return [narrow.view(torch.bfloat16), narrow.view(torch.float16), wide.view(torch.float32)]


def everything(x, scale, fmt):
    """Bits of all outputs for ``x``, copied to the CPU."""
    scale = torch.tensor(scale, dtype=torch.float32, device=x.device)
    counts, amax = torch.zeros(5, dtype=torch.int64, device=x.device), torch.empty((), device=x.device)
    results = [
        kernels.fake_quantize(x, scale, fmt, statistics=Statistics(counts=counts, amax=amax)),
        kernels.amax(x),
        amax,
    ]
    for carrier in (None, torch.float32, torch.bfloat16):
        if fmt is not Format.tf32 and not (fmt is Format.fp16 and carrier is torch.bfloat16):
            q, carried = kernels.quantize(x, scale, fmt, carrier=carrier, statistics=Statistics(counts=counts))
            results += [q, kernels.decode(q, torch.float32), *([] if carried is None else [carried])]
    return [*map(bits, results), counts.cpu()]


@pytest.mark.parametrize("name", ["triton", "eager"])
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("scale", [1.0, 3.7, 1e-5, 3e38, 1e-42, -2.0, math.inf, math.nan])
def test_gpu_equals_cpu(name, fmt, scale):
    for x in inputs():
        with kernels.use("eager"):
            expected = everything(x, scale, fmt)
        with kernels.use(name):
            got = everything(x.cuda(), scale, fmt)
        assert [torch.equal(left, right) for left, right in zip(got, expected, strict=True)] == [True] * len(got)


def test_triton_is_the_default_and_current_scale_agrees():
    assert kernels.implementation(torch.device("cuda")) == "triton"
    for amax in (0.0, 1e-45, 1e-40, 0.3, 448.0, 3e38, math.inf, math.nan):
        for margin in (0, 3, -2):
            value = torch.tensor(amax, dtype=torch.float32)
            expected = kernels.current_scale(value, Format.fp8_e4m3, margin)
            assert torch.equal(kernels.current_scale(value.cuda(), Format.fp8_e4m3, margin).cpu(), expected)


def test_empty_and_strided():
    assert kernels.amax(torch.empty(0, device="cuda")) == 0
    x = torch.randn(70, 90, device="cuda", generator=torch.Generator("cuda").manual_seed(0)).t()[:, 1:]
    q, _ = kernels.quantize(x, torch.ones((), device="cuda"), Format.fp8_e4m3)
    assert torch.equal(
        bits(q), bits(kernels.quantize(x.contiguous(), torch.ones((), device="cuda"), Format.fp8_e4m3)[0])
    )


@pytest.mark.parametrize("fmt", [*FORMATS, Format.bf16], ids=str)
def test_statistics_of_the_gpu_equal_the_cpu_s(fmt):
    def statistics(x):
        integers = {"histogram": (2043,), "counts": (5,), "blocks": (2, 256)}
        found = {name: torch.zeros(shape, dtype=torch.int64, device=x.device) for name, shape in integers.items()}
        errors, amax = torch.zeros(2, dtype=torch.float64, device=x.device), torch.empty((), device=x.device)
        scale = torch.tensor(3.7, device=x.device)
        kernels.observe(x, Statistics(errors=errors, amax=amax, **found), fmt=fmt, scale=scale)
        if fmt is not Format.bf16:
            kernels.fake_quantize(x, scale, fmt, statistics=Statistics(errors=errors, amax=amax, **found))
        return [*(table.cpu() for table in found.values()), bits(amax)], errors.cpu()

    for x in [*inputs(), torch.randn(3, 700_001), torch.randn(1), torch.empty(0, 3)]:
        (expected, wide), (got, found) = statistics(x), statistics(x.cuda())
        assert [torch.equal(left, right) for left, right in zip(got, expected, strict=True)] == [True] * len(got)
        torch.testing.assert_close(found, wide, rtol=1e-5, atol=0)

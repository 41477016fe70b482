"""Quantization on a GPU: what a CPU lacks, and that the codes are the CPU's."""

import pytest
import torch
from torch import nn

from mptrain.quantization import methods, quantize_model

CUDA = torch.device("cuda")
NO_GPU = "" if torch.cuda.is_available() else "no CUDA GPU here"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(NO_GPU), reason=NO_GPU or "there is one")]


def layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 256)).eval()


@pytest.mark.parametrize("method", [name for name, made in methods.METHODS.items() if not made.cast])
def test_a_method_on_the_gpu(method):
    why = methods.missing(method, CUDA)
    if why:
        pytest.skip(why)
    model, x = layers().to(CUDA), torch.randn(16, 256, device=CUDA)
    with torch.no_grad():
        wanted = model(x)
        report = quantize_model(model, method, batches=[{"input": x}])
        found = model(x)
    assert len(report.quantized) == 2
    assert 0 < (found - wanted).square().mean() < 0.05 * wanted.square().mean()


@pytest.mark.parametrize("method", ["int8", "int4", "fp8"])
def test_the_codes_are_those_of_a_cpu(method):
    here, there = layers(), layers().to(CUDA)
    quantize_model(here, method)
    quantize_model(there, method)
    same = here[0].weight.qdata.view(torch.uint8) == there[0].weight.qdata.view(torch.uint8).cpu()
    assert same.float().mean() > 0.999  # a tie may be rounded the other way

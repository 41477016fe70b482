"""What is chosen for FP32 GEMMs is as exact as the default, on whatever CPU this is."""

import pytest
import torch
from torch import nn

from mptrain.tools import machine

SWITCH = torch.backends.mkldnn.matmul


@pytest.fixture(autouse=True)
def _setting():
    before = SWITCH.fp32_precision
    yield
    SWITCH.fp32_precision = before


def test_shapes_of_the_three_gemms_of_each_layer():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 8), nn.Linear(8, 24))
    shapes = machine.gemm_shapes(model, 100)
    assert sorted(shapes) == sorted({(100, 8, 24), (100, 24, 8), (24, 100, 8), (8, 100, 24)})


def test_the_choice_is_as_exact_as_the_default_and_is_in_force():
    model = nn.Sequential(nn.Linear(256, 512), nn.Linear(512, 256))
    chosen = machine.choose_fp32_gemm(model, torch.device("cpu"))
    assert SWITCH.fp32_precision == {"blas": "ieee", "onednn": "tf32"}[chosen]
    x, weight = torch.randn(512, 256), torch.randn(512, 256)
    exact = x.double() @ weight.double().t()
    error = (nn.functional.linear(x, weight).double() - exact).abs().max() / exact.abs().max()
    assert error < 2e-6  # BF16 products would be off by 2e-3, TF32's by 3e-4


def test_a_setting_that_rounds_operands_is_refused(monkeypatch):
    """Products of BF16 operands, in place of TF32's: the probe must see their error."""
    monkeypatch.setattr(machine, "OTHER", "bf16")
    model = nn.Linear(256, 512)
    x, weight = torch.randn(512, 256), torch.randn(512, 256)
    exact = nn.functional.linear(x, weight)
    SWITCH.fp32_precision = "bf16"
    differs = not torch.equal(exact, nn.functional.linear(x, weight))
    SWITCH.fp32_precision = "ieee"
    if not differs:
        pytest.skip("this CPU has no BF16 unit: the switch changes nothing here")
    assert machine.choose_fp32_gemm(model, torch.device("cpu")) == "blas"
    assert SWITCH.fp32_precision == "ieee"


def test_devices():
    assert machine.pick_device("cpu") == torch.device("cpu")
    assert machine.describe(torch.device("cpu"))
    if not torch.cuda.is_available():
        assert machine.pick_device("auto") == torch.device("cpu")
        with pytest.raises(ValueError, match="use device=auto or device=cpu"):
            machine.pick_device("cuda")

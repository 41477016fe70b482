"""Methods of quantization: codes, packing, the settings that torchao documents."""

import importlib.metadata

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quantized_layers import layers
from torch import nn

from mptrain.quantization import apply, methods, packing, quantize_model
from mptrain.tools.quiet import quiet_import

with quiet_import():
    from torchao.quantization import Int8WeightOnlyConfig
CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


def test_torchao_that_is_missing_or_old_is_said(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.14.1")
    with pytest.raises(ValueError, match=r"int8 needs torchao 0.18 or newer, not 0.14.1: pip install -U torchao"):
        quantize_model(layers(), "int8")
    monkeypatch.setattr(methods.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match='needs torchao, which is not installed: pip install "mptrain'):
        quantize_model(layers(), "int8")
    assert methods.missing("bf16", CPU) is None
    quantize_model(layers(), "bf16")


def test_no_method_touches_settings_of_the_process():
    for method in methods.METHODS.values():
        if not method.cast:
            assert not getattr(method.config(), "set_inductor_config", False), method.name


def test_half_a_step_is_judged_by_the_scale_of_each_group():
    """The proof can fail: one step of a small group's scale is found, a hundredth of another group's."""
    weight = torch.randn(4, 256)
    weight[:, :128] *= 100
    model = nn.Sequential(nn.Linear(256, 4)).eval()
    model[0].weight = nn.Parameter(weight.clone())
    quantize_model(model, "int4")
    model[0].weight.qdata[0, 200] += 1 if model[0].weight.qdata[0, 200] < 7 else -1
    with pytest.raises(ValueError, match=r"half steps"):
        apply._verified("0", model[0], weight, methods.named("int4"))


@given(st.lists(st.integers(-8, 7), max_size=67), st.integers(0, 3))
def test_packed_codes_come_back(codes, lead):
    tensor = torch.tensor(codes, dtype=torch.int8).reshape(*(1,) * lead, -1)
    packed = packing.pack(tensor)
    assert packed.nbytes == (len(codes) + 1) // 2
    assert torch.equal(packing.unpack(packed, tuple(tensor.shape)), tensor)


def test_the_first_code_is_in_the_low_half_of_the_byte():
    codes = torch.tensor([[1, -2, 7], [-8, 0, -1]], dtype=torch.int8)
    assert packing.pack(codes).tolist() == [0xE1, 0x87, 0xF0]


def test_what_does_not_fit_is_not_unpacked():
    with pytest.raises(ValueError, match=r"3 bytes of torch.uint8 do not hold 4 codes"):
        packing.unpack(torch.zeros(3, dtype=torch.uint8), (2, 2))


def test_int8_config_is_the_documented_one():
    config = methods.named("int8").config()
    assert isinstance(config, Int8WeightOnlyConfig)
    assert config.version == 2


@pytest.mark.parametrize("name", ["fp8", "int8", "int4"])
def test_a_row_of_zeros_stays_zero(name):
    """torchao divides it by its amax of 0 in FP8, so there the layer is kept, with the reason."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    with torch.no_grad():
        model[0].weight[3] = 0.0
    report = quantize_model(model, methods.METHODS[name], group_size=32 if name == "int4" else None, keep="")
    held = model[0].weight.dequantize() if hasattr(model[0].weight, "dequantize") else model[0].weight
    assert not held[3].any()
    assert [layer.name for layer in report.kept] == (["0"] if name == "fp8" else [])

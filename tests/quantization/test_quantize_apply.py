"""Codes, scales and errors against their definitions; and every way in which nothing, or the wrong thing, was done."""

import copy
import math
import re

import ml_dtypes
import numpy as np
import pytest
import torch
from quantized_layers import layers
from small_models import inputs, small
from torch import nn

from mptrain.quantization import quantize_model
from mptrain.tools.quiet import quiet_import

with quiet_import():
    import torchao.quantization

pytestmark = pytest.mark.usefixtures("one_thread")


def rows(layer):
    return layer.weight.detach().double().numpy()


@pytest.mark.parametrize(
    ("method", "size", "top"),
    [("int8", None, 127.5), ("int8", 64, 127.5), ("int4", 128, 7.5), ("int4-dynamic", 32, 7.5)],
)
def test_integer_codes_are_the_nearest_multiples_of_each_scale(method, size, top):
    model = layers()
    was = [rows(layer) for layer in (model[0], model[2])]
    report = quantize_model(model, method, group_size=size)
    for weight, layer, told in zip(was, (model[0], model[2]), report.layers, strict=True):
        groups = weight.reshape(len(weight), -1, size or weight.shape[1])
        scale = np.abs(groups).max(-1) / top
        np.testing.assert_allclose(layer.weight.scale.numpy(), scale, rtol=1e-6)
        codes = layer.weight.qdata.numpy().reshape(groups.shape)
        assert codes.dtype == np.int8
        assert -math.ceil(top) <= codes.min() < -top / 2
        assert top / 2 < codes.max() <= math.floor(top)
        exact = groups / scale[..., None]
        assert np.abs(codes - exact)[exact < top - 0.5].max() <= 0.5 + 1e-4
        np.testing.assert_array_equal(codes[exact >= top - 0.5], math.floor(top))
        error = groups - codes * scale[..., None]
        assert told.sqnr_db == pytest.approx(10 * np.log10((groups**2).sum() / (error**2).sum()), abs=1e-3)


def test_fp8_codes_are_those_of_an_independent_cast():
    model = layers()
    was = model[0].weight.detach().numpy().copy()
    quantize_model(model, "fp8")
    scale = np.abs(was).max(-1, keepdims=True) / np.float32(448)
    np.testing.assert_allclose(model[0].weight.scale.numpy(), scale, rtol=1e-6)
    codes = model[0].weight.qdata.view(torch.uint8).numpy()
    wanted = (was / model[0].weight.scale.numpy()).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    assert (codes == wanted).mean() > 0.999  # a product by the reciprocal may round a tie the other way


@pytest.mark.parametrize("method", ["int8", "int4", "fp8"])
def test_a_layer_multiplies_by_its_codes(method):
    model = layers()
    x = torch.randn(3, 5, 256, dtype=torch.float64)
    quantize_model(model, method)
    weight = model[0].weight
    codes = weight.qdata.double().reshape(256, weight.scale.shape[1], -1)
    wanted = x @ (codes * weight.scale.double()[..., None]).reshape(256, 256).T + model[0].bias.detach().double()
    assert (model[0](x.float()) - wanted).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("method", "size", "wanted"),
    [
        ("int8", None, lambda n_out, n_in: n_out * n_in + n_out * 5),
        ("int8-dynamic", None, lambda n_out, n_in: n_out * n_in + n_out * 5),
        ("int4", 128, lambda n_out, n_in: n_out * n_in // 2 + n_out * n_in // 128 * 5),
        ("fp8", None, lambda n_out, n_in: n_out * n_in + n_out * 4),
        ("bf16", None, lambda n_out, n_in: 2 * n_out * n_in),
        ("fp32", None, lambda n_out, n_in: 4 * n_out * n_in),
    ],
)
def test_bytes_are_codes_scales_and_zero_points(method, size, wanted):
    model = layers(384, 256)
    report = quantize_model(model, method, group_size=size)
    assert [layer.bytes for layer in report.layers] == [wanted(256, 384), wanted(256, 256)]
    assert [layer.bytes_fp32 for layer in report.layers] == [4 * 256 * 384, 4 * 256 * 256]
    assert report.rest_elements == 512
    assert report.bytes == wanted(256, 384) + wanted(256, 256) + (2 if method == "bf16" else 4) * 512
    low, high = {"int8": (0.25, 0.27), "int4": (0.129, 0.15)}.get(method, (0, 1))
    assert low <= report.quantized_frac <= high


def test_what_is_kept_is_named_with_its_reason():
    model = small("gpt", n_embd=48, n_head=4)
    report = quantize_model(model, "int8", keep=r"blocks\.1\..*")
    assert {layer.name: layer.kept for layer in report.kept} == {
        "embed": "an embedding, and the weight of head (tied)",
        "position": "an embedding: it is looked up",
        **{f"blocks.1.{name}": "matches --keep" for name in ("attention.qkv", "attention.out", "mlp.up", "mlp.down")},
    }
    assert {layer.name for layer in report.quantized} == {
        f"blocks.0.{name}" for name in ("attention.qkv", "attention.out", "mlp.up", "mlp.down")
    }
    assert type(model.blocks[1].mlp.up.weight) is nn.Parameter
    assert model.head.weight is model.embed.weight
    images = quantize_model(small("vit"), "int4", group_size=32)
    assert {layer.name: layer.kept for layer in images.kept} == {
        "embed": "in_features=4 are too few for a scale: rows of 32 and more are worth it",
        "position": "an embedding: it is looked up",
    }
    assert "head" in {layer.name for layer in images.quantized}


class Experts(nn.Module):
    """As in transformers' mixtures of experts: one parameter for all of them, and no layer."""

    def __init__(self):
        super().__init__()
        self.gate_up = nn.Parameter(torch.randn(4, 64, 64))
        self.norm = nn.LayerNorm(64)


def test_weights_that_are_in_no_layer_are_not_passed_over_in_silence():
    model = nn.Sequential(nn.Linear(64, 64), Experts())
    report = quantize_model(model, "int8")
    (kept,) = report.kept
    assert (kept.name, kept.format, kept.bytes) == ("1.gate_up", "fp32", 4 * 4 * 64 * 64)
    assert kept.kept == "gate_up of Experts, which is not a linear layer"
    assert report.rest_bytes == 4 * 3 * 64
    assert report.frac > 0.8


def test_layers_that_groups_do_not_divide_are_kept_and_the_others_quantized():
    model = nn.Sequential(nn.Linear(96, 128), nn.Linear(128, 64)).eval()
    report = quantize_model(model, "int4")
    (kept,) = report.kept
    assert kept.kept == "in_features=96 is not a multiple of --group-size 128; --group-size 96 would"
    assert [layer.name for layer in report.quantized] == ["1"]


@pytest.mark.parametrize(
    ("model", "method", "settings", "wanted"),
    [
        (layers, "int8", {"keep": ".*"}, "int8 would quantize nothing: 0, 2: matches --keep"),
        (lambda: layers(96, 96), "int4", {}, "--group-size 128; --group-size 96 would"),
        (lambda: layers(16, 16), "int8", {}, "in_features=16 are too few for a scale"),
        (lambda: nn.Sequential(nn.Embedding(4, 64)), "int8", {}, "would quantize nothing: it has no linear layers"),
        (lambda: nn.Linear(64, 64), "int8", {}, "wrap it in nn.Sequential"),
        (layers, "int7", {}, "unknown method 'int7': did you mean 'int"),
        (layers, "int8-dynamic", {"group_size": 64}, "no groups: leave --group-size out, or use --to int8 or int4"),
        (layers, "int4", {"group_size": -1}, "--group-size=-1 cannot work: it must be at least 8"),
        (layers, "bf16", {"keep": "0"}, "bf16 is a change of the whole model: leave --keep out"),
        (layers, "int8-smooth", {}, "int8-smooth must see activations: give quantize_model batches="),
        (layers, "fp8-dynamic", {}, "FP8 units and a CPU has none: use --to fp8 (weights only) or int8-dynamic"),
    ],
)
def test_what_cannot_be_done_is_one_message_that_names_the_setting(model, method, settings, wanted):
    with pytest.raises(ValueError, match=re.escape(wanted)):
        quantize_model(model(), method, **settings)


def test_a_quantization_that_does_nothing_is_found_out(monkeypatch):
    monkeypatch.setattr(torchao.quantization, "quantize_", lambda model, config, filter_fn: None)
    with pytest.raises(
        ValueError, match=r"int8 did not quantize 0 \(a Parameter, not Int8Tensor\): keep it with --keep 0"
    ):
        quantize_model(layers(), "int8")


def planted(monkeypatch, spoil):
    """torchao's conversion, and something after it."""
    real = torchao.quantization.quantize_

    def quantize(model, config, filter_fn):
        real(model, config, filter_fn=filter_fn)
        spoil(model)

    monkeypatch.setattr(torchao.quantization, "quantize_", quantize)


def test_another_layers_codes_are_found_out(monkeypatch):
    planted(monkeypatch, lambda model: model[0].weight.qdata.copy_(model[0].weight.qdata.roll(1, 0)))
    with pytest.raises(ValueError, match=r"moved a weight of 0 by .* half steps"):
        quantize_model(layers(), "int8")


def test_one_code_that_is_off_by_one_is_found_out(monkeypatch):
    planted(monkeypatch, lambda model: model[2].weight.qdata[3, 5].add_(1))
    with pytest.raises(ValueError, match=r"moved a weight of 2 by"):
        quantize_model(layers(), "int4")


def test_eight_bits_in_the_place_of_four_are_found_out(monkeypatch):
    real = torchao.quantization.quantize_
    eight = torchao.quantization.IntxWeightOnlyConfig(granularity=torchao.quantization.PerGroup(128))
    monkeypatch.setattr(torchao.quantization, "quantize_", lambda model, config, **rest: real(model, eight, **rest))
    with pytest.raises(ValueError, match=r"int4 made 8 bits of torch.int8, \[256, 256\] of 0"):
        quantize_model(layers(), "int4")


def test_weights_that_were_quantized_before_are_not_called_quantized_now():
    model = layers()
    with pytest.raises(ValueError, match=r"quantized already: quantize the original"):
        quantize_model(model, "int4") and quantize_model(model, "int4")
    for layer in (model[0], model[2]):  # the same values as plain weights
        layer.weight = nn.Parameter(torch.zeros(256, 256))
    with pytest.raises(ValueError, match=r"int8 changed no weight by a bit"):
        quantize_model(model, "int8")


def test_a_weight_that_is_not_finite_is_refused():
    model = layers()
    with torch.no_grad():
        model[2].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"2 holds Inf or NaN"):
        quantize_model(model, "int8")


def test_of_two_names_one_that_matches_keep_keeps_the_layer():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).eval()
    model.append(model[0])
    report = quantize_model(model, "int8", keep="2")
    assert [(layer.name, layer.kept) for layer in report.layers] == [("0", "matches --keep"), ("1", "")]
    assert type(model[2].weight) is nn.Parameter


def test_a_module_in_two_places_stays_one():
    shared = nn.Linear(64, 64)
    for method, batches in (("int8", ()), ("int8-smooth", [{"input": torch.randn(2, 3, 64)}])):
        model = nn.Sequential(nn.Sequential(copy.deepcopy(shared)), nn.Linear(64, 64)).eval()
        model.append(nn.Sequential(model[0][0]))
        report = quantize_model(model, method, batches=batches)
        assert [layer.name for layer in report.layers] == ["0.0", "1"]
        assert model[2][0] is model[0][0]
        assert type(model[2][0].weight).__name__ == "Int8Tensor"


def test_two_layers_of_one_weight_are_kept():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)).eval()
    model[2].weight = model[0].weight
    report = quantize_model(model, "int8")
    assert {layer.name: layer.kept for layer in report.kept} == {"0": "its weight is also that of 2 (tied)"}
    assert model[2].weight is model[0].weight


@pytest.mark.parametrize(("method", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_a_cast_changes_every_parameter_and_no_tie(method, dtype):
    model = small("gpt")
    was = model.blocks[0].mlp.up.weight.detach().clone()
    report = quantize_model(model, method)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert torch.equal(model.blocks[0].mlp.up.weight, was.to(dtype))
    assert model.head.weight is model.embed.weight
    assert not report.kept
    assert model(**inputs(model)).isfinite().all()


def test_a_weight_beyond_fp16_is_refused():
    model = layers()
    with torch.no_grad():
        model[2].weight[0, 0] = -1e5
    with pytest.raises(ValueError, match=r"2.weight holds 1e\+05, beyond fp16: use --to bf16"):
        quantize_model(model, "fp16")


def test_smoothing_moves_what_the_batches_showed():
    model = layers(64, 64)
    batches = [{"input": torch.randn(2, 3, 64) * torch.linspace(0.1, 10, 64)} for _ in range(2)]
    seen = torch.cat([batch["input"] for batch in batches]).abs().amax((0, 1))
    factor = (seen / model[0].weight.abs().amax(0)).sqrt()
    moved = model[0].weight.detach() * factor
    quantize_model(model, "int8-smooth", batches=batches)
    weight = model[0].weight
    torch.testing.assert_close(weight.act_pre_scale, 1 / factor, rtol=1e-4, atol=0)
    torch.testing.assert_close(weight.scale[:, 0], moved.abs().amax(1) / 127.5, rtol=1e-4, atol=0)


def test_a_static_scale_is_the_largest_activation_of_the_batches():
    model = layers(64, 64)
    batches = [{"input": torch.randn(2, 3, 64) * scale} for scale in (1, 3)]
    largest = max(batch["input"].abs().max() for batch in batches)
    quantize_model(model, "int8-static", batches=batches)
    assert model[0].weight.act_quant_scale.item() == pytest.approx(largest.item() / 127.5, rel=1e-5)
    louder = batches[0]["input"] * 1000  # beyond the scale: it saturates
    assert model[0](louder).abs().max() < 0.1 * (louder.abs().max() * 64)
    torch.testing.assert_close(model[0](louder), model[0](louder * 2), rtol=0.2, atol=20.0)

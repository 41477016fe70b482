"""Quantization-aware fine-tuning: it rounds what is asked, trains through it, and gives back what INT2 takes."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from test_deploy_matrix import VIT, run
from torch import nn

from mptrain import cli, data
from mptrain.models import gpt, vit
from mptrain.quantization import judging, load, qat
from mptrain.quantization.apply import quantize_model, selected
from mptrain.quantization.evaluate import evaluate
from mptrain.quantization.methods import METHODS
from mptrain.quantization.packing import pack, unpack

pytestmark = pytest.mark.usefixtures("one_thread")


def small(tied=False):
    torch.manual_seed(0)
    return gpt.build(gpt.Config(29, 16, n_layer=1, n_head=2, n_embd=32, tied=tied))


def batches(seed=0):
    draw = torch.Generator().manual_seed(seed)
    while True:
        found = torch.randint(29, (4, 17), generator=draw)
        yield {"tokens": found[:, :-1], "targets": found[:, 1:]}


@pytest.mark.parametrize("method", ["int4", "int4-dynamic", "int2"])
def test_rounding_in_training_is_that_of_the_quantized_model(method):
    """The forward in training, with rounded weights, gives the logits of what quantize_model makes of the weights."""
    model = small()
    quantized = copy.deepcopy(model)
    report = quantize_model(quantized, method, group_size=32)
    names = [layer.name for layer in report.quantized]
    plain = model(next(batches())["tokens"])
    qat.fake_quantize(model, METHODS[method].config(32), names)
    tokens = next(batches())["tokens"]
    with torch.no_grad():
        training, deployed = model(tokens), quantized(tokens)
    assert len(names) == 5
    torch.testing.assert_close(training, deployed, rtol=1e-4, atol=1e-4)
    assert (training - plain).abs().max() > 100 * (training - deployed).abs().max()


@pytest.mark.parametrize("tied", [False, True])
def test_the_weights_move_and_the_model_is_plain_again(tied):
    model = small(tied)
    before = copy.deepcopy(model)
    tuned = qat.finetune(model, "int4", batches(), 6, group_size=32, keep="head", lr=1e-3)
    assert tuned.layers == tuple(f"blocks.0.{n}" for n in ("attention.qkv", "attention.out", "mlp.up", "mlp.down"))
    assert (len(tuned.losses), tuned.skipped) == (6, 0)
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]
    assert (model.head.weight is model.embed.weight) == tied
    moved = dict(before.named_parameters())
    assert all(not torch.equal(parameter, moved[name]) for name, parameter in model.named_parameters())
    assert not model.training
    report = quantize_model(model, "int4", group_size=32, keep="head")
    assert [layer.name for layer in report.quantized] == list(tuned.layers)


def test_gradients_pass_the_rounding_as_if_it_were_not_there():
    """Straight through: a rounded layer's gradient is the plain one's, but none for a weight that was clipped."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 8, bias=False))
    x, cotangent = torch.randn(16, 32), torch.randn(16, 8)
    qat.fake_quantize(model, METHODS["int4"].config(32), ["0"])
    model(x).backward(cotangent)
    weight, grad, plain = model[0].weight.detach(), model[0].weight.grad, cotangent.T @ x
    largest = weight == weight.abs().amax(1, keepdim=True)  # 7.5 steps: clipped to 7, unless it rounds to 7 by a hair
    torch.testing.assert_close(grad[~largest], plain[~largest])
    assert 0 < (grad[largest] == 0).sum() <= largest.sum() < 8  # where a row's largest is positive


def test_fine_tuning_gives_back_what_two_bits_take():
    """Beside a control with as many further steps, which alone would make the model better."""
    module = data.load("digits")
    digits = module.build(module.Config())
    torch.manual_seed(0)
    trained = vit.build(vit.Config(8, 1, 10, n_layer=1, n_head=2, n_embd=32))
    stream = [digits.batch(step, batch_size=64, seed=0) for step in range(150)]
    qat.train(trained, stream, 150, lr=1e-2)
    control, tuned = copy.deepcopy(trained), copy.deepcopy(trained)
    qat.train(control, stream[:40], 40, lr=3e-3)
    qat.finetune(tuned, "int2", stream[:40], 40, lr=3e-3)
    rounded = copy.deepcopy(control)
    for model in (rounded, tuned):
        quantize_model(model, "int2")
    held_out = [digits.validation_at(list(range(digits.validation_samples)))]
    lost, left, none = (evaluate(model, control, held_out, repeats=0) for model in (rounded, tuned, control))
    assert lost.loss_delta.low > 0.05
    assert left.loss_delta.high < 0.5 * lost.loss_delta.low
    assert "% of what quantization at once loses" in judging.regained(lost, left)
    assert "too little to say" in judging.regained(none, left)


@pytest.mark.parametrize(
    ("method", "settings", "said"),
    [
        ("int4", {}, "would quantize no layer"),  # rows of 32 have no groups of 128, and mlp.down is kept
        ("bf16", {}, "nothing to round for bf16"),
        ("int8", {}, "torchao cannot fine-tune for Int8WeightOnlyConfig: use --to int4"),
        ("int2", {"lr": 0.0}, "--finetune-lr"),
        ("int2", {"steps": 0}, "--finetune"),
    ],
)
def test_what_cannot_be_tuned_is_said(method, settings, said):
    steps = settings.pop("steps", 2)
    with pytest.raises(ValueError, match=said):
        qat.finetune(small(), method, batches(), steps, keep=".*down", **settings)


@pytest.mark.parametrize("count", [0, 1, 3, 4, 9])
def test_two_bits_are_four_to_a_byte(count):
    codes = torch.arange(count, dtype=torch.int8) % 4 - 2
    packed = pack(codes, 2)
    assert packed.numel() == -(-count // 4)
    assert torch.equal(unpack(packed, (count,), 2), codes)
    if count == 4:  # -2, -1, 0, 1 in two's complement: 10, 11, 00, 01, the first lowest
        assert packed.item() == 0b01_00_11_10
    with pytest.raises(ValueError, match="two bits"):
        unpack(packed, (count + 4,), 2)


def test_the_command_tunes_judges_and_writes(tmp_path, capsys):
    folder = run(tmp_path / "run", model=VIT)
    out, figures = tmp_path / "out", tmp_path / "figures.json"
    words = ["--to", "int2", "--finetune", "3", "--evaluate", "2", "--out", str(out), "--json", str(figures)]
    assert cli.main(["quantize", str(folder), *words]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for text in (
        "fine-tuned 5 rounded layers for 3 steps",
        "int2 at once vs.",
        "int2 after 3 steps vs.",
        "top-1",
    ):
        assert text in printed
    found = json.loads(figures.read_text())["evaluations"]
    assert list(found) == ["int2 at once", "int2 after 3 steps"]
    assert found["int2 after 3 steps"]["samples"] == 128
    assert len(found["int2 after 3 steps"]["latencies"]) == 2
    batch = next(iter(data.load("digits").build(data.load("digits").Config()).validation(64, 1)))
    model = load(out)
    loss = F.cross_entropy(model(batch["images"]), batch["labels"]).item()
    assert math.isfinite(loss)
    names = set(selected(vit.build(vit.Config(8, 1, 10, n_layer=1, n_head=2, n_embd=32)), METHODS["int2"], 32, "")[0])
    assert {n for n, m in model.named_modules() if "Intx" in type(getattr(m, "weight", None)).__name__} == names


@pytest.mark.parametrize("words", [["--evaluate", "-1"], ["--finetune", "-1"]])
def test_negative_counts_are_one_clear_line(words, tmp_path, capsys):
    with pytest.raises(SystemExit) as leaving:
        cli.main(["quantize", str(run(tmp_path / "run", model=VIT)), "--to", "int2", *words])
    assert leaving.value.code == 2
    assert f"{words[0]}=-1 cannot work" in capsys.readouterr().err

"""Images from end to end: the digits, the Vision Transformer against torch's own layers, accuracy beside the loss."""

import json
import math

import commands
import pytest
import torch
import torch.nn.functional as F
from commands import events_of, rows_of, summary_of, train
from sklearn.datasets import load_digits
from torch import nn

from mptrain import Precision, cli
from mptrain.data import digits
from mptrain.loggers.console import progress_line
from mptrain.models import vit

SIZES = vit.Config(image_size=8, channels=1, classes=10, patch_size=4, n_layer=2, n_head=2, n_embd=64)
pytestmark = pytest.mark.usefixtures("command_line")


@pytest.fixture(scope="module")
def data():
    return digits.build(digits.Config())


def test_digits_are_scikit_learns_in_exact_steps(data):
    raw = load_digits()
    pictures = {image.tobytes() for part in (data.train, data.held_out) for image in part.images}
    assert pictures == {(image / 8 - 1).astype("float32").tobytes() for image in raw.images}
    assert len(data.train.labels) + len(data.held_out.labels) == len(raw.target) == 1797
    images = torch.from_numpy(data.train.images)
    assert torch.equal(images.bfloat16().float(), images)
    assert data.sizes == {"image_size": 8, "channels": 1, "classes": 10}
    assert "1,442 + 355 images of 1 x 8 x 8 in 10 classes" in data.describe()


def test_another_split_is_another_fingerprint(data):
    fewer = digits.build(digits.Config(validation_frac=0.1))
    assert 170 <= len(fewer.held_out.labels) <= 180
    assert fewer.fingerprint != data.fingerprint
    with pytest.raises(ValueError, match=r"validation_frac=1.0 must be in \(0, 1\); try data.validation_frac=0.2"):
        digits.Config(validation_frac=1.0)
    with pytest.raises(ValueError, match="no validation image of class 0"):
        digits.build(digits.Config(validation_frac=0.001))


def reference(model):
    """The same function from torch's own layers, with the same weights: a convolution cuts the patches."""
    config = model.config
    embed = nn.Conv2d(config.channels, config.n_embd, config.patch_size, stride=config.patch_size)
    embed.weight.data = model.embed.weight.view_as(embed.weight)
    embed.bias = model.embed.bias
    layers = []
    for block in model.blocks:
        layer = nn.TransformerEncoderLayer(
            config.n_embd,
            config.n_head,
            4 * config.n_embd,
            dropout=0.0,
            activation=lambda x: F.gelu(x, approximate="tanh"),
            batch_first=True,
            norm_first=True,
        )
        for name in ("weight", "bias"):  # torch's rows are all q, all k, all v; ours each head's q, k, v
            heads = getattr(block.attention.qkv, name).chunk(3 * config.n_head)
            rows = torch.cat([head for part in (0, 1, 2) for head in heads[part::3]])
            setattr(layer.self_attn, f"in_proj_{name}", nn.Parameter(rows))
        layer.self_attn.out_proj.weight, layer.self_attn.out_proj.bias = (
            block.attention.out.weight,
            block.attention.out.bias,
        )
        layer.linear1, layer.linear2, layer.norm1, layer.norm2 = block.mlp.up, block.mlp.down, block.norm1, block.norm2
        layers.append(layer)

    def forward(images):
        x = embed(images).flatten(2).transpose(1, 2) + model.position.weight
        for layer in layers:
            x = layer(x)
        return model.head(model.norm(x).mean(1))

    return forward


@pytest.mark.parametrize(("channels", "patch"), [(1, 2), (3, 4)])
def test_logits_and_gradients_are_those_of_torchs_own_layers(channels, patch):
    torch.manual_seed(0)
    model = vit.build(vit.Config(8, channels, 10, patch, n_layer=2, n_head=4, n_embd=32)).double()
    with torch.no_grad():
        for parameter in model.parameters():  # far from the first values: a wrong wiring shows
            parameter.add_(torch.randn_like(parameter) * 0.2)
    images = torch.randn(5, channels, 8, 8, dtype=torch.double, requires_grad=True)
    cotangent = torch.randn(5, 10, dtype=torch.double)
    ours, theirs = model(images), reference(model.double())(images)
    torch.testing.assert_close(ours, theirs)
    gradients = [torch.autograd.grad(logits, [images], cotangent, retain_graph=True)[0] for logits in (ours, theirs)]
    torch.testing.assert_close(*gradients)


def test_images_of_another_size_name_the_settings():
    with pytest.raises(ValueError, match=r"set model.channels=3 model.image_size=16"):
        vit.build(SIZES)(torch.zeros(1, 3, 16, 16))
    for name in ("image_size", "channels", "classes"):
        with pytest.raises(ValueError, match=rf"vit: {name}=0: without data to set it, try model.{name}="):
            vit.build(vit.Config(**{"image_size": 8, "channels": 1, "classes": 10, name: 0}))


def test_fp8_takes_every_inner_layer_and_keeps_both_ends():
    with torch.device("meta"):
        shell = vit.build(SIZES)
    model = shell.to_empty(device="cpu")
    model.reset_parameters()
    report = Precision("fp8").prepare(model).report
    inner = [f"blocks.{n}.{part}" for n in (0, 1) for part in ("attention.qkv", "attention.out", "mlp.up", "mlp.down")]
    assert sorted(report.converted) == sorted(inner)
    linear = {name: why for name, why in report.kept.items() if name not in report.others}
    assert linear == dict.fromkeys(("embed", "head"), "matches precision.keep_default")


@pytest.mark.parametrize("name", ["fp32", "fp8"])
def test_a_small_model_learns_to_read(data, name):
    torch.manual_seed(0)
    model = vit.build(SIZES)
    precision = Precision(name).prepare(model)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    steps = 150
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 4e-3 * min((step + 1) / 10, 1 - step / steps)
        with precision.forward():
            loss = model(**data.batch(step, batch_size=64, seed=0))
        precision.backward(loss)
        precision.step(optimizer, clip=1.0)
        optimizer.zero_grad()
    model.eval()
    with precision.evaluating():
        measured = model.measure(**next(data.validation(355, 1)))
    assert measured["top1_frac"] > 0.9
    assert measured["loss"] < 0.4


TINY = (
    "data=digits",
    "model=vit-nano",
    "model.patch_size=4",
    "model.n_layer=2",
    "model.n_head=2",
    "model.n_embd=32",
    "trainer.max_steps=6",
    "trainer.batch_size=8",
    "trainer.eval_every=4",
    "trainer.eval_batches=2",
    "telemetry.every=2",
)


@pytest.fixture
def on_images(monkeypatch, tmp_path):
    """train.py on the digits."""
    monkeypatch.setattr(commands, "TINY", TINY)
    return lambda *overrides, code=0: train(monkeypatch, tmp_path, *overrides, code=code)


def test_runs_report_accuracy_and_compare_it_with_the_fp32_runs(on_images, tmp_path):
    text = on_images("precision=fp32", f"run_dir={tmp_path / 'runs' / 'fp32'}")
    fp32 = summary_of(tmp_path / "runs" / "fp32")
    assert "6 steps of 8 images" in text
    assert "img/s" in text
    assert math.isfinite(fp32["val_top1_frac"])
    assert fp32["val_top1_frac_masters"] is None
    text = on_images("precision=fp8", "optim.ema_decay=0.5", f"run_dir={tmp_path / 'runs' / 'mean'}", "baseline=none")
    last = [row for row in rows_of(tmp_path / "runs" / "mean") if "val/loss" in row][-1]
    names = [f"val/{name}{of}" for of in ("", "_masters", "_average") for name in ("loss", "top1_frac")]
    assert [name for name in last if name.startswith("val/")] == names
    assert all(0 <= last[name] <= 1 and (16 * last[name]).is_integer() for name in names if "top1" in name)
    text = on_images("precision=fp8", f"run_dir={tmp_path / 'runs' / 'fp8'}")
    summary = summary_of(tmp_path / "runs" / "fp8")
    assert summary["unit"] == "images"
    assert summary["baseline"]["fp32_val_top1_frac"] == fp32["val_top1_frac"]
    assert summary["val_top1_frac_masters"] == last["val/top1_frac_masters"]
    assert f"top-1 {summary['val_top1_frac']:.1%}" in text
    assert "validation top-1 (%)" in text
    assert "images/s (emulation)" in text
    assert events_of(tmp_path / "runs" / "fp8") == []


def test_a_run_on_images_resumes_bit_for_bit_also_recomputing(on_images, tmp_path):
    given = ["precision=fp8-delayed", "baseline=none", "checkpoint.every=3", "checkpoint.keep=3"]
    on_images(*given, f"run_dir={tmp_path / 'whole'}")
    middle = tmp_path / "whole" / "checkpoints" / "step-00000003"
    on_images(*given, "trainer.checkpointing=true", f"run_dir={tmp_path / 'half'}", f"resume={middle}")
    whole, half = summary_of(tmp_path / "whole"), summary_of(tmp_path / "half")
    assert whole["val_loss"] == half["val_loss"]
    assert whole["train_loss"] == half["train_loss"]


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        (["model=gpt-nano"], "model.kind=gpt takes tokens and data=digits holds images: use data=stdlib or tokens"),
        (["data=stdlib"], "model.kind=vit takes images and data=stdlib holds tokens: use data=digits, or a model of"),
        (["model.classes=9"], "model.classes=9 is less than the 10 of data=digits: leave it out, or set"),
        (
            ["model.image_size=16"],
            "images of (1, 8, 8) do not fit a model for (1, 16, 16); set model.channels=1 model.im",
        ),
        (["model.patch_size=3"], "image_size=8 is not a multiple of patch_size=3; try model.patch_size=2"),
    ],
)
def test_what_does_not_go_together_is_one_message(on_images, monkeypatch, tmp_path, overrides, wanted):
    if overrides == ["model=gpt-nano"]:
        monkeypatch.setattr(commands, "TINY", ("data=digits",))
    text = on_images(*overrides, code=2)
    (error,) = [line for line in text.splitlines() if line.startswith("error: ")]
    assert wanted in error
    assert not (tmp_path / "runs").exists()


def test_doctor_audits_a_step_on_images(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    assert cli.main(["doctor", "--audit", "precision=fp8", *TINY[:6]]) == 0
    text = capsys.readouterr().out
    assert "random images (32 x 1 x 8 x 8)" in text
    assert "OK: every GEMM" in text


def test_inspect_reads_a_run_on_images(on_images, tmp_path, capsys):
    on_images("precision=bf16", "baseline=none", f"run_dir={tmp_path / 'run'}")
    assert cli.main(["inspect", str(tmp_path / "run"), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {("embed", "input"), ("blocks.1.mlp.up", "weight"), ("head", "grad_output")} <= {
        (row["layer"], row["role"]) for row in rows
    }


def test_the_progress_line_counts_images():
    values = {"train/loss": 1.0, "val/top1_frac": 0.9719, "speed/tokens_per_s": 1234.5}
    assert progress_line(values, "images") == "loss 1.0000  top-1 97.2%  1,234 img/s"
    assert progress_line({"train/loss": 1.0, "speed/tokens_per_s": 1e4}) == "loss 1.0000  10,000 tok/s"


def test_weights_stored_in_bf16_are_trained_and_evaluated(on_images, tmp_path):
    on_images("precision=bf16", "optim=adamw-bf16", "baseline=none", f"run_dir={tmp_path / 'run'}")
    assert summary_of(tmp_path / "run")["val_loss_masters"] > 0

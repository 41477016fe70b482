"""``mptrain quantize`` from a run's folder to one that is loaded, and what it says when it cannot."""

import json

import pytest
import torch
from small_models import inputs, run_of, small

from mptrain import cli
from mptrain.quantization import load, open_source

pytestmark = pytest.mark.usefixtures("command_line")


@pytest.fixture
def run(tmp_path):
    return run_of(tmp_path / "run", small("gpt"))


def quantize(*words):
    assert cli.main(["quantize", *map(str, words)]) == 0


@pytest.fixture
def refused(capsys):
    def call(*words):
        with pytest.raises(SystemExit) as leaving:
            cli.main(["quantize", *map(str, words)])
        assert leaving.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return call


def noise_db(folder, run):
    """Of the logits, against those of the FP32 model."""
    model = open_source(run).model
    batch = inputs(model)
    with torch.no_grad():
        wanted, found = model(**batch), load(folder)(**batch)
    return 20 * torch.log10(wanted.norm() / (found - wanted).norm()).item()


def test_a_run_becomes_a_folder_that_loads(run, capsys, tmp_path):
    quantize(run, "--to", "int8", "--json", tmp_path / "figures.json")
    said = capsys.readouterr().out
    assert "8 layers are 26.46 % of their FP32 bytes" in said
    assert "int8 vs. original" in said, "judged by the run's validation data"
    assert "embed: an embedding, and the weight of head (tied)" in said
    out = run / "quantized-int8"
    assert str(out) in said
    assert noise_db(out, run) > 30
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["quantized_frac"] == pytest.approx((512 * 69 + 64 * 261) / (4 * (512 * 64 + 64 * 256)))
    assert figures["file_bytes"] == (out / "quantized.safetensors").stat().st_size
    assert [row["format"] for row in figures["layers"] if not row["kept"]] == ["int8"] * 8


def test_settings_reach_the_model_and_the_worst_layers_come_first(run, capsys, tmp_path):
    quantize(run, "--to", "int4", "--group-size", 16, "--keep", ".*attention.*", "--out", tmp_path / "out",
             "--evaluate", 0)  # fmt: skip
    said = capsys.readouterr().out
    assert "beside its reference" not in said
    assert "int4, groups of 16" in said
    assert "blocks.0.attention.qkv, blocks.0.attention.out, blocks.1.attention.qkv, ... (4): matches --keep" in said
    errors = [float(line.split()[-1]) for line in said.splitlines() if line.strip().startswith("blocks.")]
    assert len(errors) == 4
    assert errors == sorted(errors)
    assert 10 < noise_db(tmp_path / "out", run) < 30


def test_a_method_that_is_calibrated_sees_the_training_data_of_the_run(run):
    quantize(run, "--to", "int8-static", "--calibrate", 1)
    weight = load(run / "quantized-int8-static").blocks[0].mlp.up.weight
    source = open_source(run)
    seen = []
    source.model.blocks[0].mlp.up.register_forward_pre_hook(lambda module, x: seen.append(x[0]))
    source.model(**source.dataset().batch(0, batch_size=8, seed=0))
    assert weight.act_quant_scale.item() == pytest.approx(seen[0].abs().max().item() / 127.5, rel=1e-5)


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (("--to", "fp32"), "--to fp32 quantizes nothing"),
        (("--to", "int5"), "unknown method 'int5': did you mean"),
        (("--to", "int4", "--group-size", "512"), "int4 would quantize nothing: blocks.0.attention.qkv, "),
        (
            ("--to", "int4", "--group-size", "512"),
            "in_features=64 is not a multiple of --group-size 512; --group-size 64",
        ),
        (("--to", "int8", "--keep", ".*"), "would quantize nothing"),
        (("--to", "int8", "--keep", "("), "--keep=( is not a regular expression: missing )"),
        (("--to", "int8", "--average"), "has no running average"),
        (("--to", "int8-smooth", "--calibrate", "0"), "--calibrate=0 cannot work"),
        (("--to", "fp8-dynamic", "--device", "cpu"), "a CPU has none"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_leaves_nothing(words, wanted, run, refused):
    assert wanted in refused(run, *words)
    assert {path.name for path in run.iterdir()} == {"config.json", "checkpoints"}


def test_a_folder_that_holds_something_is_left_alone(run, refused):
    assert "is not an empty folder: choose another OUT" in refused(run, "--to", "int8", "--out", run / "checkpoints")

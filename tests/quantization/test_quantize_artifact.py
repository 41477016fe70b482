"""A folder gives back the model that was saved, bit for bit, and says so when it is not whole."""

import json
import re

import pytest
import torch
from safetensors import SafetensorError, safe_open
from small_models import inputs, run_of, small

from mptrain.quantization import artifact, load, methods, open_source, quantize_model, save

CPU = torch.device("cpu")
METHODS = [name for name in methods.METHODS if methods.missing(name, CPU) is None]
pytestmark = pytest.mark.usefixtures("one_thread")


def written(folder, kind="gpt", method="int4", **settings):
    """(the quantized model in memory, its report, where it was saved)"""
    source = open_source(run_of(folder / "run", small(kind, **settings), kind))
    batches = [inputs(source.model)]
    size = 32 if methods.named(method).group_default else None
    report = quantize_model(source.model, method, group_size=size, batches=batches)
    return source.model, report, save(folder / "out", source, report)


@pytest.fixture
def saved(tmp_path):
    return written(tmp_path)[-1]


@pytest.mark.parametrize("method", METHODS)
def test_what_is_loaded_computes_the_same_bits(method, tmp_path):
    model, report, out = written(tmp_path, "gpt", method)
    again = load(out)
    batch = inputs(model)
    with torch.no_grad():
        wanted, found = model(**batch), again(**batch)
    assert wanted.dtype == found.dtype
    assert torch.equal(wanted, found)
    assert not again.training
    assert again.head.weight is again.embed.weight
    assert {name: type(tensor) for name, tensor in again.state_dict().items()} == {
        name: type(tensor) for name, tensor in model.state_dict().items()
    }
    with safe_open(out / artifact.WEIGHTS, framework="pt") as file:
        sizes = {name: file.get_tensor(name).nbytes for name in file.keys()}  # noqa: SIM118 (not a dict)
    assert sum(sizes.values()) == report.bytes
    for layer in report.layers:
        assert layer.bytes == sum(
            n for name, n in sizes.items() if name.startswith((f"{layer.name}.weight", f"{layer.name}._weight"))
        )
    assert artifact.size_bytes(out) - report.bytes < 16_000  # the file's table of names


@pytest.mark.parametrize(("kind", "method"), [("llama", "int4"), ("vit", "int8"), ("vit", "bf16")])
def test_other_architectures_come_back_too(kind, method, tmp_path):
    model, _, out = written(tmp_path, kind, method)
    batch = inputs(model)
    with torch.no_grad():
        assert torch.equal(model(**batch), load(out)(**batch))


def test_four_bits_are_half_a_byte_in_the_file(tmp_path):
    model, _, out = written(tmp_path)
    with safe_open(out / artifact.WEIGHTS, framework="pt") as file:
        packed = file.get_tensor("blocks.0.mlp.up._weight_qdata.packed")
    codes = model.blocks[0].mlp.up.weight.qdata.flatten().tolist()
    assert packed.tolist() == [(low & 15) | (high & 15) << 4 for low, high in zip(codes[::2], codes[1::2], strict=True)]


def test_the_folder_says_what_it_is(saved):
    about = json.loads((saved / "quantization.json").read_text())
    assert (about["version"], about["method"], about["group_size"], about["kind"]) == (1, "int4", 32, "run")
    assert about["source"].startswith("gpt, the weights of ")
    assert {layer["name"] for layer in about["layers"] if not layer["kept"]} == {
        name.removesuffix(".weight") for name in about["quantized"]
    }
    settings = json.loads((saved / "config.json").read_text())
    assert settings["model"]["vocab_size"] == 256
    assert settings["data"]["kind"] == "stdlib"


def break_file(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-3])


def edited(**changes):
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("file", "spoil", "wanted"),
    [
        (artifact.WEIGHTS, cut, "is truncated or not a safetensors file"),
        (artifact.WEIGHTS, break_file, "is damaged: its checksum is not that of quantization.json"),
        (artifact.WEIGHTS, lambda path: path.unlink(), "lacks quantized.safetensors"),
        ("quantization.json", lambda path: path.unlink(), "is not a quantized model: it has no quantization.json"),
        ("quantization.json", cut, "quantization.json is incomplete or corrupt"),
        ("quantization.json", edited(version=2), "is of version 2 and this mptrain reads 1: quantize again"),
        ("quantization.json", edited(method="int3"), "unknown method 'int3'"),
        ("quantization.json", edited(ties={}), "cannot be restored"),
        ("config.json", lambda path: path.unlink(), "cannot be restored"),
        ("config.json", edited(model={"kind": "gpt", "vocab_size": 256, "n_embd": 32}), "cannot be restored"),
    ],
)
def test_a_folder_that_is_not_whole_is_one_message(file, spoil, wanted, saved):
    spoil(saved / file)
    with pytest.raises(ValueError, match=re.escape(wanted)) as raised:
        load(saved)
    assert "\n" not in str(raised.value)


def test_nothing_is_overwritten_and_nothing_half_written_stays(tmp_path, monkeypatch):
    _, _, out = written(tmp_path)
    source = open_source(tmp_path / "run")
    report = quantize_model(source.model, "int8")
    with pytest.raises(ValueError, match=r"exists and is not an empty folder"):
        save(out, source, report)
    assert json.loads((out / "quantization.json").read_text())["method"] == "int4"

    def full(*_, **__):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(artifact, "save_file", full)
    with pytest.raises(ValueError, match=r"cannot be written .*No space left"):
        save(tmp_path / "other", source, report)
    assert {path.name for path in tmp_path.iterdir()} == {"run", "out"}


def test_a_quantized_folder_is_not_quantized_again(saved):
    with pytest.raises(ValueError, match=r"is quantized already .*: quantize the original"):
        open_source(saved)
    with pytest.raises(ValueError, match=r"is quantized already"):
        open_source(saved / artifact.WEIGHTS)

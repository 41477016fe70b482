"""What can be named to be quantized: runs, their checkpoints, and folders of Hugging Face."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import inputs, run_of, small

from mptrain.checkpoint.checkpoints import Checkpoints
from mptrain.quantization import huggingface, load, load_quantized, open_source, quantize_model, save
from mptrain.tools.quiet import quiet_import

with quiet_import():
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS = torch.arange(24).reshape(2, 12) * 7 % 50
SPECIAL = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def gpt2():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_positions=32, n_embd=64, n_layer=2, n_head=2, initializer_range=0.2, **SPECIAL)
    )
    return model.eval()


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, num_key_value_heads=1, **sizes, **SPECIAL)).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """gpt2 in one file, llama in shards."""
    at = tmp_path_factory.mktemp("hf")
    with huggingface._silent():
        gpt2().save_pretrained(at / "gpt2")
        llama().save_pretrained(at / "llama", max_shard_size="60KB")
    assert len(list((at / "llama").glob("*.safetensors"))) > 2
    return at


@pytest.fixture
def copied(folders, tmp_path):
    """A folder to spoil."""

    def copy(name):
        return shutil.copytree(folders / name, tmp_path / name)

    return copy


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def test_conv1d_becomes_linear_with_the_same_numbers():
    model = gpt2()
    was = model.transformer.h[1].mlp.c_fc.weight.detach().clone()
    wanted = logits(model)
    assert huggingface.as_linear(model) == 8
    assert huggingface.as_linear(model) == 0
    layer = model.transformer.h[1].mlp.c_fc
    assert type(layer) is torch.nn.Linear
    assert (layer.in_features, layer.out_features) == (64, 256)
    assert torch.equal(layer.weight, was.T)
    assert layer.weight.is_contiguous()
    torch.testing.assert_close(logits(model), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize(("name", "made", "count"), [("gpt2", gpt2, 8), ("llama", llama, 15)])
def test_a_folder_is_quantized_in_one_line(name, made, count, folders):
    model = load_quantized(folders / name, "int8")
    quantized = [layer for layer in model.modules() if type(getattr(layer, "weight", None)).__name__ == "Int8Tensor"]
    assert len(quantized) == count
    assert not model.training
    wanted, found = logits(made()), logits(model)
    noise = (found - wanted).square().mean() / wanted.square().mean()
    assert 1e-9 < noise < 1e-2  # 20 dB and more, and not the same


@pytest.mark.parametrize(("name", "method"), [("gpt2", "int4"), ("llama", "int8-dynamic"), ("gpt2", "bf16")])
def test_a_folder_saved_and_loaded_computes_the_same_bits(name, method, folders, tmp_path):
    source = open_source(folders / name)
    report = quantize_model(source.model, method, group_size=32 if method == "int4" else None)
    again = load(save(tmp_path / "out", source, report))
    assert torch.equal(logits(again), logits(source.model))
    tied = again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert tied == (name == "gpt2")


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_shell_holds_no_weights_and_every_buffer(name, folders):
    shell, whole = huggingface.shell(folders / name), open_source(folders / name).model
    assert all(parameter.is_meta for parameter in shell.parameters())
    buffers = dict(whole.named_buffers())
    assert buffers.keys() == dict(shell.named_buffers()).keys()
    assert all(torch.equal(buffer, buffers[at]) for at, buffer in shell.named_buffers())
    assert not torch.nn.Linear(2, 2).weight.is_meta


def test_what_stands_beside_the_weights_comes_along(copied, tmp_path):
    folder = copied("llama")
    (folder / "tokenizer.json").write_text("{}")
    source = open_source(folder)
    out = save(tmp_path / "out", source, quantize_model(source.model, "int8"))
    assert {path.name for path in out.iterdir()} == {
        "config.json", "generation_config.json", "quantization.json", "quantized.safetensors", "tokenizer.json",
    }  # fmt: skip
    assert json.loads((out / "config.json").read_text()) == json.loads((folder / "config.json").read_text())


def test_transformers_does_not_take_a_quantized_folder_for_a_model_of_its_own(folders, tmp_path):
    """It loads a model.safetensors that lacks weights, with random ones in their place."""
    source = open_source(folders / "llama")
    out = save(tmp_path / "out", source, quantize_model(source.model, "int8"))
    with pytest.raises(OSError, match=r"model\.safetensors"), huggingface._silent():
        LlamaForCausalLM.from_pretrained(out)


def test_one_file_beside_a_config_is_enough(copied):
    folder = copied("gpt2")
    (folder / "model.safetensors").rename(folder / "mine.safetensors")
    wanted = logits(gpt2())
    assert torch.equal(logits(open_source(folder / "mine.safetensors").model), wanted)


def test_weights_in_sixteen_bits_are_opened_in_fp32(tmp_path):
    with huggingface._silent():
        llama().bfloat16().save_pretrained(tmp_path / "bf16")
    model = open_source(tmp_path / "bf16").model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.lm_head.weight, llama().lm_head.weight.bfloat16().float())


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def drop(folder, name):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors, path, metadata={"format": "pt"})


def cut(path):
    path.write_bytes(path.read_bytes()[:-3])


@pytest.mark.parametrize(
    ("name", "spoil", "wanted"),
    [
        (
            "llama",
            lambda at: (at / "model-00002-of-00007.safetensors").unlink(),
            "lacks model-00002-of-00007.safetensors",
        ),
        ("llama", lambda at: cut(at / "model-00002-of-00007.safetensors"), "00007.safetensors is truncated"),
        (
            "llama",
            lambda at: cut(at / "model.safetensors.index.json"),
            "index.json is incomplete or corrupt",
        ),
        ("gpt2", lambda at: cut(at / "model.safetensors"), "model.safetensors is truncated"),
        ("gpt2", lambda at: (at / "model.safetensors").unlink(), "has neither model.safetensors nor"),
        ("gpt2", lambda at: edit(at, model_type="gtp2"), "model_type=gtp2 is an architecture that transformers"),
        ("gpt2", lambda at: edit(at, architectures=["GPTToo"]), "has no architecture GPTToo"),
        ("gpt2", lambda at: edit(at, n_embd=32), "cannot be loaded"),
        ("gpt2", lambda at: edit(at, n_embd="wide"), "does not describe a gpt2"),
        ("gpt2", lambda at: edit(at, quantization_config={"quant_method": "gptq"}), "is quantized already"),
        (
            "gpt2",
            lambda at: drop(at, "transformer.ln_f.weight"),
            "lacks transformer.ln_f.weight: it does not belong to the model",
        ),
        (
            "gpt2",
            lambda at: (at / "config.json").write_text('{"model'),
            "config.json is incomplete, corrupt, or neither",
        ),
        ("gpt2", lambda at: (at / "config.json").unlink(), "no config.json"),
    ],
)
def test_a_folder_that_cannot_be_opened_is_one_message(name, spoil, wanted, copied):
    folder = copied(name)
    spoil(folder)
    with pytest.raises(ValueError, match=re.escape(wanted)) as raised:
        open_source(folder)
    assert "\n" not in str(raised.value)


def test_a_run_is_its_newest_checkpoint_and_a_checkpoint_is_itself(tmp_path):
    model = small("gpt")
    run = run_of(tmp_path / "run", model)
    was = model.position.weight.detach().clone()
    with torch.no_grad():
        model.position.weight.add_(1)
    at_12 = Checkpoints(run / "checkpoints", keep=9).save(12, {"model": model}, {})
    newest = open_source(run)
    assert torch.equal(newest.model.position.weight, was + 1)
    assert newest.description == f"gpt, the weights of {at_12.resolve()}"
    (at_3,) = [path for path in (run / "checkpoints").iterdir() if path != at_12]
    older = open_source(at_3)
    assert torch.equal(older.model.position.weight, was)
    assert older.model.head.weight is older.model.embed.weight
    with torch.no_grad():
        assert torch.equal(newest.model(**inputs(model)), model(**inputs(model)))


def test_the_data_of_a_run_are_its_own(tmp_path):
    for kind, name in (("gpt", "tokens"), ("vit", "images")):
        source = open_source(run_of(tmp_path / kind, small(kind), kind))
        batch = source.dataset().batch(0, batch_size=2, seed=0)
        assert name in batch
        assert source.model(**batch).isfinite()


class Average:
    """As an optimizer's running average is saved: a tied weight once."""

    def __init__(self, model):
        self._model = model

    def state_dict(self):
        return {name: parameter.detach() + 1 for name, parameter in self._model.named_parameters()}


def test_the_running_average_is_asked_for(tmp_path):
    model = small("gpt")
    run = run_of(tmp_path / "run", model, average=Average(model))
    found = open_source(run, average=True)
    assert torch.equal(found.model.embed.weight, model.embed.weight + 1)
    assert found.model.head.weight is found.model.embed.weight
    assert "the running average of" in found.description
    with pytest.raises(ValueError, match=r"has no running average"):
        open_source(run_of(tmp_path / "plain", model), average=True)


def test_what_is_no_model_is_one_message(tmp_path):
    with pytest.raises(ValueError, match=r"does not exist: pass a run, a checkpoint of one, or a Hugging Face model"):
        open_source(tmp_path / "missing")
    (tmp_path / "alone.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"there is no config.json next to it"):
        open_source(tmp_path / "alone.safetensors")
    run = run_of(tmp_path / "run", small("gpt"))
    settings = json.loads((run / "config.json").read_text())
    for changes, wanted in (
        ({"n_layer": 3}, "lacks blocks.2"),
        ({"n_layer": 1}, "holds blocks.1"),
        ({"n_embd": 32}, "does not fit its run's config"),
    ):
        (run / "config.json").write_text(json.dumps({"model": settings["model"] | changes}))
        with pytest.raises(ValueError, match=wanted):
            open_source(run)

"""``mptrain export``: transformers loads what it writes and gives our logits; what cannot be is refused in one line."""

import dataclasses
import json
import warnings
from pathlib import Path

import pytest
import torch
from commands import train
from safetensors import safe_open
from safetensors.torch import save_file

from mptrain import cli, models
from mptrain.checkpoint.checkpoints import Checkpoints, load

with warnings.catch_warnings():
    # transformers and what it imports use interfaces that newer Pythons deprecate: theirs to mend, not under test here.
    warnings.simplefilter("ignore", DeprecationWarning)
    warnings.simplefilter("ignore", FutureWarning)
    from transformers import AutoModelForCausalLM

VOCAB, BLOCK = 97, 32
KINDS = [kind for kind in models.kinds() if models.load(kind).hugging_face]
SETTINGS = {  # away from the defaults, here and there: what is not written down shows
    "tied": {"tied": True},
    "untied": {"tied": False},
    "no-bias": {"bias": False, "tied": True},
    "grouped": {"n_kv_head": 2, "rope_theta": 300.0, "norm_eps": 0.1, "n_ffn": 96},
}
pytestmark = pytest.mark.usefixtures("command_line")


def cases():
    for kind in KINDS:
        fields = {field.name for field in dataclasses.fields(models.load(kind).Config)}
        yield from (
            pytest.param(kind, own, id=f"{kind}-{name}") for name, own in SETTINGS.items() if own.keys() <= fields
        )


def perturbed(kind, settings):
    """A small model with weights far from their first values, and different in every parameter."""
    module = models.load(kind)
    torch.manual_seed(0)
    model = module.build(module.Config(VOCAB, BLOCK, n_layer=2, n_head=4, n_embd=64, **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def run_of(folder, model, kind="gpt", steps=(3,), **parts):
    """A run's folder: its settings as train.py writes them (without the data's vocabulary), and its checkpoints."""
    folder.mkdir()
    sizes = dataclasses.asdict(model.config) | {"vocab_size": 0}
    (folder / "config.json").write_text(json.dumps({"model": {"kind": kind, **sizes}}))
    for step in steps:
        Checkpoints(folder / "checkpoints", keep=9).save(step, {"model": model, **parts}, {})
    return folder


def loaded(out):
    """The model that transformers makes of the folder; it must find every weight it wants, and want every one."""
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def export(*words):
    assert cli.main(["export", *map(str, words)]) == 0


@pytest.fixture
def refused(capsys):
    def call(*words):
        with pytest.raises(SystemExit) as leaving:
            cli.main(["export", *map(str, words)])
        assert leaving.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return call


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(model, its run's folder)"""
    model = perturbed("gpt", {})
    return model, run_of(tmp_path_factory.mktemp("runs") / "small", model, steps=(3, 12))


@pytest.mark.parametrize(("kind", "settings"), [*cases()])
def test_transformers_gives_our_logits(kind, settings, tmp_path):
    model = perturbed(kind, settings)
    export(run_of(tmp_path / "run", model, kind), tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    theirs = loaded(tmp_path / "out")
    assert theirs.get_output_embeddings().weight.shape == (VOCAB, 64)
    assert (theirs.get_output_embeddings().weight is theirs.get_input_embeddings().weight) == model.config.tied
    tokens = torch.randint(VOCAB, (3, BLOCK), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, expected = model(tokens), theirs(tokens).logits
    assert expected.dtype == torch.float32
    assert expected.abs().max() > 1
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("word", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_a_dtype_is_that_of_every_tensor_and_of_what_is_loaded(word, dtype, small, tmp_path):
    model, run = small
    export(run, tmp_path / "out", "--dtype", word)
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    assert torch.equal(tensors["transformer.h.1.mlp.c_fc.weight"], model.blocks[1].mlp.up.weight.T.to(dtype))
    assert loaded(tmp_path / "out").dtype == dtype


def test_a_run_is_its_newest_whole_checkpoint_and_a_checkpoint_is_itself(small, tmp_path, monkeypatch, capsys):
    model, _ = small
    other = perturbed("gpt", {})
    run = run_of(tmp_path / "run", other, steps=(3,))
    with torch.no_grad():
        other.embed.weight.add_(1.0)
    at_12 = Checkpoints(run / "checkpoints", keep=9).save(12, {"model": other}, {})
    export(run, tmp_path / "newest")
    assert at_12.name in capsys.readouterr().out
    monkeypatch.chdir(run / "checkpoints")
    (at_3,) = [path for path in Path().iterdir() if path.name != at_12.name]
    export(at_3, tmp_path / "older")
    newest, older = (loaded(tmp_path / name).get_input_embeddings().weight for name in ("newest", "older"))
    assert torch.equal(newest, other.embed.weight)
    assert torch.equal(older, model.embed.weight)


def test_a_trained_model_and_its_running_average(monkeypatch, tmp_path):
    run = tmp_path / "run"
    train(monkeypatch, tmp_path, "precision=fp32", "optim.ema_decay=0.5", "baseline=none", f"run_dir={run}")
    state = load(Checkpoints(run / "checkpoints", 1).newest(), torch.device("cpu"))
    module = models.load("gpt")
    vocab_size = len(state["model"]["embed.weight"])
    model = module.build(module.Config(vocab_size, 32, n_layer=2, n_head=2, n_embd=32)).eval()
    tokens = torch.randint(vocab_size, (2, 32), generator=torch.Generator().manual_seed(1))
    found = []
    for name, words in (("model", ()), ("average", ("--average",))):
        export(run, tmp_path / name, *words)
        model.load_state_dict(state[name], strict=False)  # the average has a tied weight once
        with torch.no_grad():
            found.append(loaded(tmp_path / name)(tokens).logits)
            torch.testing.assert_close(model(tokens), found[-1], rtol=0, atol=1e-5)
    assert (found[0] - found[1]).abs().max() > 1e-3


def test_an_empty_folder_is_filled_and_what_a_killed_export_left_is_replaced(small, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "model.safetensors").write_text("half of it")
    export(small[1], tmp_path / "out")
    loaded(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_holds_something_is_left_alone(small, tmp_path, refused):
    (tmp_path / "notes.txt").write_text("mine")
    assert f"{tmp_path} exists and is not an empty folder: choose another OUT" in refused(small[1], tmp_path)
    assert "is not an empty folder" in refused(small[1], tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert "cannot be written" in refused(small[1], tmp_path / "notes.txt" / "out")


def test_what_cannot_be_exported_is_one_message_and_leaves_nothing(small, tmp_path, refused):
    _, run = small
    out = tmp_path / "out"
    assert "does not exist" in refused(tmp_path / "missing", out)
    assert "no config.json" in refused(tmp_path, out)
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text("{}")
    assert f"{bare} has no complete checkpoint" in refused(bare, out)
    assert "has no running average (the run had optim.ema_decay=0)" in refused(run, out, "--average")
    broken = run_of(tmp_path / "broken", small[0], steps=(3, 12))
    older, newer = sorted((broken / "checkpoints").iterdir())
    for path in (newer, older):
        (shard,) = path.glob("rank-*.safetensors")
        shard.write_bytes(shard.read_bytes()[:-1])
        assert f"checkpoint {path} is damaged: {shard.name} has" in refused(path, out)
    assert f"{broken} has no complete checkpoint" in refused(broken, out)
    first = broken / "checkpoints" / "step-00000001.safetensors"
    save_file({"model/embed.weight": torch.zeros(3)}, first, metadata={"mptrain": "1"})
    for source in (broken, first):
        assert f"{first} was written by an older mptrain (version 1)" in refused(source, out)
    images = models.load("vit").build(models.load("vit").Config(8, 1, 10))
    wanted = f"model.kind=vit cannot be exported to Hugging Face's transformers; supported: {', '.join(KINDS)}"
    assert wanted in refused(run_of(tmp_path / "images", images, "vit"), out)
    large = perturbed("gpt", {})
    with torch.no_grad():
        large.blocks[1].mlp.up.weight[0, 0] = -1e5
    line = refused(run_of(tmp_path / "large", large), out, "--dtype", "fp16")
    assert "transformer.h.1.mlp.c_fc.weight holds 1e+05, beyond fp16: use --dtype fp32" in line
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("out")]

"""Every architecture in mptrain/models and every size in conf/model keeps the same promises. Adding a file tests it."""

import dataclasses
import functools
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from mptrain import models

YAMLS = sorted((Path(__file__).parents[2] / "conf" / "model").glob("*.yaml"))
VOCAB, BLOCK, BATCH = 61, 16, 3
SIZE, CHANNELS, CLASSES = 8, 3, 7
PARAMETERS = {  # published sizes, at the published vocabulary and block size
    "gpt-small": (50257, 1024, 124_439_808),
    "gpt-medium": (50257, 1024, 354_823_168),
    "gpt-large": (50257, 1024, 774_030_080),
    "gpt-xl": (50257, 1024, 1_557_611_200),
    "llama-1b": (128256, 256, 1_235_814_400),
    "llama-8b": (128256, 256, 8_030_261_248),
}
BAD_SETTINGS = [
    ("gpt", {"n_embd": 250}, "model.n_embd=248"),
    ("gpt", {"n_head": 0}, "n_head=0 must be positive; try model.n_head=4"),
    ("gpt", {"dropout": 1.0}, "dropout=1.0"),
    ("llama", {"n_embd": 248}, "model.n_embd=256"),
    ("llama", {"n_kv_head": 3}, "model.n_kv_head=2"),
    ("llama", {"n_kv_head": 16}, "model.n_kv_head=8"),
    ("llama", {"rope_theta": 0.0}, "rope_theta=0.0"),
    ("hf", {}, "model.config=PATH"),
    ("hf", {"config": "x", "n_layer": -1}, "n_layer=-1 must be at least 0; try model.n_layer=0"),
    ("hf", {"config": "x", "vocab_size": -2}, "try model.vocab_size=-1"),
    ("hf", {"config": "x", "block_size": 0}, "try model.block_size=256"),
    ("vit", {"n_embd": 126}, "model.n_embd=128"),
    ("vit", {"patch_size": 0}, "patch_size=0 must be positive; try model.patch_size=2"),
    ("vit", {"image_size": 9, "patch_size": 4}, "model.patch_size=3"),
    ("vit", {"dropout": -0.1}, "dropout=-0.1"),
]
INPUTS = {kind: models.load(kind).INPUT for kind in models.kinds()}
TOKENS = [kind for kind, taken in INPUTS.items() if taken == "tokens"]
SIZES = {  # what the data decides, as small as can be
    "tokens": {"vocab_size": VOCAB, "block_size": BLOCK},
    "images": {"image_size": SIZE, "channels": CHANNELS, "classes": CLASSES},
}
CHOICES = {"tokens": VOCAB, "images": CLASSES}  # of the label
HF = {  # of a Llama; a GPT-2 takes what it knows of them
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 384, "max_position_embeddings": 256},
    **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
}


@pytest.fixture(scope="module", autouse=True)
def config_json(tmp_path_factory):
    """Writes the file that a tiny model of kind hf is built from."""
    global write_config
    folder = tmp_path_factory.mktemp("hf")

    def write(model_type="llama", tied=False, n_embd=256, **others):
        sizes = {"vocab_size": 7, "hidden_size": n_embd, "num_hidden_layers": 3, "tie_word_embeddings": tied}
        path = folder / "config.json"
        path.write_text(json.dumps({"model_type": model_type, **HF, **sizes}))
        return str(path)

    write_config = write


def tiny(kind, **settings):
    """A model of two layers (where a kind has layers to choose) and the Config's other defaults.

    ``settings`` that a kind does not have are left out; those of hf's file go into it.
    """
    module = models.load(kind)
    if kind == "hf":
        settings["config"] = write_config(**settings)
    fields = {field.name for field in dataclasses.fields(module.Config)}
    sizes = {**SIZES[module.INPUT], "n_layer": 2, **settings}
    torch.manual_seed(0)
    return module.build(module.Config(**{name: size for name, size in sizes.items() if name in fields}))


def sample(length=BLOCK):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(VOCAB, (2, BATCH, length), generator=generator).unbind()


def pictures():
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(BATCH, CHANNELS, SIZE, SIZE, generator=generator)
    return images, torch.randint(CLASSES, (BATCH,), generator=generator)


def batch_of(kind):
    """Inputs and labels for a tiny model of this kind."""
    return sample() if INPUTS[kind] == "tokens" else pictures()


@pytest.fixture(autouse=True)
def one_thread():
    """These models are so small that threads only wait for each other: 4 times slower on two busy cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("kind", models.kinds())
def test_a_file_and_its_model_have_all_that_the_contract_names(kind):
    module = models.load(kind)
    assert isinstance(module, models.Architecture)
    model = tiny(kind)
    assert isinstance(model, models.Model)
    assert isinstance(model.config, models.BaseConfig)
    assert module.grows_evenly(model.config, 1, 1) in (True, False)


@pytest.fixture(params=models.kinds())
def kind(request):
    return request.param


def test_logits_loss_and_targets_agree(kind):
    model = tiny(kind)
    inputs, labels = batch_of(kind)
    logits, loss = model(inputs), model(inputs, labels)
    choices = CHOICES[INPUTS[kind]]
    assert logits.shape == (*labels.shape, choices)
    assert loss.shape == ()
    torch.testing.assert_close(loss, F.cross_entropy(logits.reshape(-1, choices), labels.reshape(-1)))
    assert abs(loss.item() - math.log(choices)) < 0.2


def test_an_example_is_a_batch_of_about_the_rows_asked_for(kind):
    model = tiny(kind)
    batch = model.example(4 * BLOCK)
    inputs, labels = batch.values()
    assert labels.max() < CHOICES[INPUTS[kind]]
    torch.testing.assert_close(model(**batch), model(inputs, labels))
    rows = []
    model.blocks[0].mlp.register_forward_pre_hook(lambda layer, given: rows.append(given[0].flatten(0, -2).shape[0]))
    model(**batch)
    assert rows == [4 * BLOCK]


def test_what_a_model_measures_starts_with_the_loss(kind):
    """Only some kinds measure more than the loss; those say the same loss as forward, and no accuracy by chance."""
    model = tiny(kind).eval()
    inputs, labels = batch_of(kind)
    if not hasattr(model, "measure"):
        assert kind in TOKENS
        return
    measured = model.measure(**dict(zip(model.example(BLOCK), (inputs, labels), strict=True)))
    assert next(iter(measured)) == "loss"
    torch.testing.assert_close(measured["loss"], model(inputs, labels))
    best = model(inputs).argmax(-1)
    for wrong in range(BATCH + 1):
        given = torch.cat(((best[:wrong] + 1) % CLASSES, best[wrong:]))
        assert model.measure(inputs, given)["top1_frac"].item() == pytest.approx(1 - wrong / BATCH)


@pytest.mark.parametrize("kind", TOKENS)
def test_no_logit_sees_a_later_token(kind):
    model = tiny(kind).eval()
    tokens, other = sample()
    for position in (1, BLOCK // 2, BLOCK - 1):
        changed = torch.cat((tokens[:, :position], other[:, position:]), dim=1)
        before, after = model(tokens), model(changed)
        torch.testing.assert_close(before[:, :position], after[:, :position])
        assert (before[:, position] != after[:, position]).any()


@pytest.mark.parametrize("kind", TOKENS)
def test_the_order_of_earlier_tokens_matters(kind):
    model = tiny(kind).eval()
    tokens, _ = sample()
    swapped = tokens[:, [1, 0, *range(2, BLOCK)]]
    assert (model(tokens)[:, -1] - model(swapped)[:, -1]).abs().max() > 1e-4


def test_random_cotangents_reach_every_parameter(kind):
    model = tiny(kind)
    logits = model(batch_of(kind)[0])
    logits.backward(torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)))
    dead = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == []


def test_directional_derivative_matches_the_gradient(kind):
    model = tiny(kind, model_type="gpt2").double()  # of hf: its Llama's norms compute in FP32 in any format
    inputs, labels = batch_of(kind)
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    model(inputs, labels).backward()
    generator = torch.Generator().manual_seed(3)
    direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in model.parameters()]
    slope = sum((p.grad * d).sum() for p, d in zip(model.parameters(), direction, strict=True)).item()

    def loss_at(step):
        moved = {n: p.detach() + step * d for (n, p), d in zip(model.named_parameters(), direction, strict=True)}
        return torch.func.functional_call(model, moved, (inputs, labels)).item()

    # The rotation tables and the tanh stay in single precision at most: 1e-5 of the slope is far above both.
    assert (loss_at(1e-5) - loss_at(-1e-5)) / 2e-5 == pytest.approx(slope, rel=1e-5)


def layer_of(ran):
    """transformers binds what a layer takes beside its input."""
    return ran.args[0] if isinstance(ran, functools.partial) else ran


def test_recompute_runs_each_block_in_training_only_and_changes_no_gradient(kind):
    plain, hooked = tiny(kind), tiny(kind)
    inputs, labels = batch_of(kind)
    seen = []

    def recompute(block, *inputs):
        seen.append(block)
        return checkpoint(block, *inputs, use_reentrant=False)

    hooked.recompute = recompute
    for model in (plain, hooked):
        model(inputs, labels).backward()
    assert [layer_of(ran) for ran in seen] == list(hooked.blocks)
    for (name, p), q in zip(plain.named_parameters(), hooked.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name
    hooked.eval()(inputs)
    assert len(seen) == len(hooked.blocks)


@pytest.mark.parametrize("settings", [{"tied": True}, {"tied": False}, {"n_layer": 3, "n_embd": 128}], ids=str)
def test_flops_are_those_that_torch_counts(kind, settings):
    """Unfused attention is counted in full; pixels that require a gradient let the first product have all three."""
    model = tiny(kind, **settings)
    inputs, labels = batch_of(kind)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(inputs.requires_grad_(inputs.is_floating_point()), labels).backward()
    assert model.flops_per_token() * labels.numel() == counter.get_total_flops()


def test_every_matrix_weight_is_a_linear_or_an_embedding(kind):
    model = tiny(kind, tied=False)
    owned = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Linear | torch.nn.Embedding)}
    assert [name for name, p in model.named_parameters() if p.ndim == 2 and id(p) not in owned] == []


def test_a_meta_model_can_be_filled(kind):
    with torch.device("meta"):
        model = tiny(kind)
    model.to_empty(device="cpu").reset_parameters()
    assert abs(model(*batch_of(kind)).item() - math.log(CHOICES[INPUTS[kind]])) < 0.2


@pytest.mark.parametrize("kind", TOKENS)
def test_tying_shares_one_parameter_also_on_meta(kind):
    with torch.device("meta"):
        model = tiny(kind, tied=True)
    model.to_empty(device="cpu").reset_parameters()
    assert model.head.weight is model.embed.weight
    assert abs(model(*sample()).item() - math.log(VOCAB)) < 0.2
    untied = tiny(kind, tied=False)
    assert untied.head.weight is not untied.embed.weight


def test_training_on_one_batch_learns_it(kind):
    model = tiny(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = batch_of(kind)
    for _ in range(30):
        optimizer.zero_grad()
        model(*batch).backward()
        optimizer.step()
    assert model(*batch).item() < 0.5


@pytest.mark.parametrize("kind", TOKENS)
def test_a_missing_vocabulary_and_a_long_sequence_are_errors_with_the_setting(kind):
    with pytest.raises(ValueError, match=r"vocab_size=0.*model.vocab_size="):
        tiny(kind, vocab_size=0)
    with pytest.raises(ValueError, match=f"model.block_size={BLOCK + 1}"):
        tiny(kind)(sample(BLOCK + 1)[0])


@pytest.mark.parametrize(("kind", "settings", "says"), BAD_SETTINGS)
def test_impossible_settings_name_one_that_works(kind, settings, says):
    with pytest.raises(ValueError, match=rf"^{kind}: .*{says.replace('.', '[.]')}"):
        models.load(kind).Config(**settings)


def test_an_unknown_kind_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'llama'"):
        models.load("lama")
    with pytest.raises(ValueError, match="known: gpt, hf, llama, vit"):
        models.load("_decoder")


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_yaml_builds_and_has_the_published_size(path):
    lines = path.read_text().splitlines()
    settings = yaml.safe_load(path.read_text())
    assert len(lines) <= 20
    assert next(iter(settings)) == "kind"
    module = models.load(settings.pop("kind"))
    of_data = " data=digits" if module.INPUT == "images" else ""
    needed = " model.config=PATH" if settings.get("config") == "???" else ""
    assert lines[0] == f"# python train.py{of_data} model={path.stem}{needed}"
    assert settings.get("block_size", 256) == 256
    if needed:
        settings["config"] = write_config()
    vocab_size, block_size, parameters = PARAMETERS.get(path.stem, (256, 256, None))
    sizes = {"tokens": {"vocab_size": vocab_size, "block_size": block_size}, "images": SIZES["images"]}
    with torch.device("meta"):
        model = module.build(module.Config(**{**settings, **sizes[module.INPUT]}))
    count = sum(p.numel() for p in model.parameters())
    assert count == (parameters or count)
    assert all(p.device.type == "meta" for p in model.parameters())
    # Widths that low-precision kernels accept: multiples of 16 everywhere.
    assert all(size % 16 == 0 for p in model.blocks.parameters() for size in p.shape)

"""Every architecture in mptrain/models and every size in conf/model keeps the same promises. Adding a file tests it."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch.utils.checkpoint import checkpoint

from mptrain import models

YAMLS = sorted((Path(__file__).parents[2] / "conf" / "model").glob("*.yaml"))
VOCAB, BLOCK, BATCH = 61, 16, 3
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
]


def tiny(kind, **settings):
    """A model of two layers (where a kind has layers to choose) and the Config's other defaults."""
    module = models.load(kind)
    fields = {field.name for field in dataclasses.fields(module.Config)}
    sizes = {"vocab_size": VOCAB, "block_size": BLOCK, **({"n_layer": 2} if "n_layer" in fields else {}), **settings}
    torch.manual_seed(0)
    return module.build(module.Config(**sizes))


def sample(length=BLOCK):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(VOCAB, (2, BATCH, length), generator=generator).unbind()


@pytest.fixture(autouse=True)
def one_thread():
    """These models are so small that threads only wait for each other: 4 times slower on two busy cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=models.kinds())
def kind(request):
    return request.param


def test_logits_loss_and_targets_agree(kind):
    model = tiny(kind)
    tokens, targets = sample()
    logits, loss = model(tokens), model(tokens=tokens, targets=targets)
    assert logits.shape == (BATCH, BLOCK, VOCAB)
    assert loss.shape == ()
    torch.testing.assert_close(loss, F.cross_entropy(logits.reshape(-1, VOCAB), targets.reshape(-1)))
    assert abs(loss.item() - math.log(VOCAB)) < 0.2


def test_no_logit_sees_a_later_token(kind):
    model = tiny(kind).eval()
    tokens, other = sample()
    for position in (1, BLOCK // 2, BLOCK - 1):
        changed = torch.cat((tokens[:, :position], other[:, position:]), dim=1)
        before, after = model(tokens), model(changed)
        torch.testing.assert_close(before[:, :position], after[:, :position])
        assert (before[:, position] != after[:, position]).any()


def test_the_order_of_earlier_tokens_matters(kind):
    model = tiny(kind).eval()
    tokens, _ = sample()
    swapped = tokens[:, [1, 0, *range(2, BLOCK)]]
    assert (model(tokens)[:, -1] - model(swapped)[:, -1]).abs().max() > 1e-4


def test_random_cotangents_reach_every_parameter(kind):
    model = tiny(kind)
    tokens, _ = sample()
    logits = model(tokens)
    logits.backward(torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)))
    dead = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == []


def test_directional_derivative_matches_the_gradient(kind):
    model = tiny(kind).double()
    tokens, targets = sample()
    model(tokens, targets).backward()
    generator = torch.Generator().manual_seed(3)
    direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in model.parameters()]
    slope = sum((p.grad * d).sum() for p, d in zip(model.parameters(), direction, strict=True)).item()

    def loss_at(step):
        moved = {n: p.detach() + step * d for (n, p), d in zip(model.named_parameters(), direction, strict=True)}
        return torch.func.functional_call(model, moved, (tokens, targets)).item()

    # The rotation tables and the tanh stay in single precision at most: 1e-5 of the slope is far above both.
    assert (loss_at(1e-5) - loss_at(-1e-5)) / 2e-5 == pytest.approx(slope, rel=1e-5)


def test_recompute_runs_each_block_in_training_only_and_changes_no_gradient(kind):
    plain, hooked = tiny(kind), tiny(kind)
    tokens, targets = sample()
    seen = []

    def recompute(block, *inputs):
        seen.append(block)
        return checkpoint(block, *inputs, use_reentrant=False)

    hooked.recompute = recompute
    for model in (plain, hooked):
        model(tokens, targets).backward()
    assert seen == list(hooked.blocks)
    for (name, p), q in zip(plain.named_parameters(), hooked.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name
    hooked.eval()(tokens)
    assert len(seen) == len(hooked.blocks)


def test_flops_count_every_linear_weight_and_attention(kind):
    model = tiny(kind)
    config = model.config
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    attention = 12 * config.n_layer * config.n_embd * config.block_size
    assert model.flops_per_token() == 6 * weights + attention
    assert tiny(kind, tied=True).flops_per_token() == tiny(kind, tied=False).flops_per_token()


def test_every_matrix_weight_is_a_linear_or_an_embedding(kind):
    model = tiny(kind, tied=False)
    owned = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Linear | torch.nn.Embedding)}
    assert [name for name, p in model.named_parameters() if p.ndim == 2 and id(p) not in owned] == []


def test_tying_shares_one_parameter_and_a_meta_model_can_be_filled(kind):
    with torch.device("meta"):
        model = tiny(kind, tied=True)
    model.to_empty(device="cpu").reset_parameters()
    assert model.head.weight is model.embed.weight
    loss = model(*sample()).item()
    assert abs(loss - math.log(VOCAB)) < 0.2
    untied = tiny(kind, tied=False)
    assert untied.head.weight is not untied.embed.weight


def test_training_on_one_batch_learns_it(kind):
    model = tiny(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = sample()
    for _ in range(30):
        optimizer.zero_grad()
        model(*batch).backward()
        optimizer.step()
    assert model(*batch).item() < 0.5


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
    with pytest.raises(ValueError, match="known: gpt, llama"):
        models.load("_decoder")


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_yaml_builds_and_has_the_published_size(path):
    lines = path.read_text().splitlines()
    settings = yaml.safe_load(path.read_text())
    assert len(lines) <= 20
    assert lines[0] == f"# python train.py model={path.stem}"
    assert next(iter(settings)) == "kind"
    assert settings["block_size"] == 256
    module = models.load(settings.pop("kind"))
    vocab_size, block_size, parameters = PARAMETERS.get(path.stem, (256, 256, None))
    with torch.device("meta"):
        model = module.build(module.Config(**{**settings, "vocab_size": vocab_size, "block_size": block_size}))
    count = sum(p.numel() for p in model.parameters())
    assert count == (parameters or count)
    assert all(p.device.type == "meta" for p in model.parameters())
    # Widths that low-precision kernels accept: multiples of 16 everywhere.
    assert all(size % 16 == 0 for p in model.blocks.parameters() for size in p.shape)

"""Architectures from config.json count what transformers counts; what cannot be is refused in one line."""

import json
import random
import re
import warnings

import pytest
import torch
import yaml

from mptrain.memory.inference import catalogue
from mptrain.memory.inference.architecture import GROUPS
from mptrain.memory.inference.huggingface import FAMILIES, from_config, read

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    warnings.simplefilter("ignore", FutureWarning)
    from transformers import AutoConfig, AutoModelForCausalLM

MODELS = [model.name for model in catalogue.models()]
SPECIAL = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}  # inside the small vocabularies


def random_config(kind, seed):
    """A small config away from the defaults: biases, ties, groups of heads, experts, ranks at random."""
    draw = random.Random(f"{kind}{seed}")

    def flip():
        return draw.random() < 0.5

    heads = draw.choice([2, 4, 8])
    layers, vocabulary = draw.randint(1, 4), draw.randint(30, 90)
    if kind == "gpt2":
        return SPECIAL | {
            "n_embd": heads * draw.randint(3, 9),
            "n_head": heads,
            "n_layer": layers,
            "vocab_size": vocabulary,
            "n_positions": draw.randint(8, 40),
            "n_inner": draw.choice([None, 48]),
            "tie_word_embeddings": flip(),
        }
    config = SPECIAL | {
        "hidden_size": heads * draw.choice([4, 6, 10]),
        "intermediate_size": draw.randint(9, 50),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": draw.choice([n for n in (1, 2, 4, 8) if heads % n == 0]),
        "vocab_size": vocabulary,
        "tie_word_embeddings": flip(),
    }
    if kind in ("llama", "qwen3"):
        config |= {"attention_bias": flip(), "head_dim": draw.choice([4, 6])}
    if kind == "llama":
        config |= {"mlp_bias": flip()}
    if kind == "mixtral":
        config |= {"num_local_experts": draw.randint(2, 6), "num_experts_per_tok": draw.randint(1, 2)}
    if kind.startswith("deepseek"):
        ranks = {name: draw.randint(2, 20) for name in ("kv_lora_rank", "qk_nope_head_dim", "v_head_dim")}
        config |= ranks | {
            "num_key_value_heads": heads,
            "q_lora_rank": draw.choice([None, 11]),
            "qk_rope_head_dim": draw.choice([2, 4]),
            "moe_intermediate_size": draw.randint(3, 20),
            "n_routed_experts": draw.choice([4, 8]),
            "n_shared_experts": draw.randint(1, 3),
            "num_experts_per_tok": draw.randint(1, 3),
            "first_k_dense_replace": draw.randint(0, 4),
            "n_group": 2,
            "topk_group": 1,
            "attention_bias": flip(),
        }
    if kind == "deepseek_v2":
        config |= {"mlp_bias": flip()}
    return config


def built(kind, config):
    """transformers' own model, on the meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config))


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("kind", FAMILIES)
def test_small_models_of_every_family_have_the_parameters_that_transformers_counts(kind, tmp_path):
    for seed in range(6):
        model = built(kind, random_config(kind, seed))
        model.config.save_pretrained(tmp_path)  # as transformers writes it
        ours = read(tmp_path)
        assert ours.parameters == count(model), (seed, model.config)
        assert read(tmp_path / "config.json") == ours
        groups = ours.by_group()
        assert set(groups) <= set(GROUPS)
        norms = sum(p.numel() for name, p in model.named_parameters() if "norm" in name or ".ln_" in name)
        assert groups["norm"] == norms
        experts = sum(p.numel() for name, p in model.named_parameters() if "expert" in name)
        assert groups.get("experts", 0) == experts
        if not ours.experts.routed and ours.tied:
            positions = ours.learned_positions * (ours.context - 1) * ours.hidden
            assert ours.activated == ours.parameters - positions, "the embedding is the head"


@pytest.mark.parametrize("name", MODELS)
def test_the_catalogue_agrees_with_transformers_and_with_what_was_published(name):
    model = catalogue.model(name)
    config = dict(yaml.safe_load((catalogue.HERE / f"{name}.yaml").read_text())["config"])
    made = built(config.pop("model_type"), config)
    assert model.architecture.parameters == count(made)
    assert model.source.startswith("https://")
    for stated, exact in ((model.parameters, model.architecture.parameters), (model.activated, None)):
        if stated.endswith("B"):
            assert f"{(exact or model.architecture.activated) / 1e9:.0f}B" == stated
        elif stated:
            assert int(stated) == exact
    if name == "deepseek-v3":  # what is quoted has the routing bias in it, which is no parameter in transformers
        biases = sum(buffer.numel() for key, buffer in made.named_buffers() if key.endswith("correction_bias"))
        assert model.architecture.parameters + biases == 671_026_419_200


def test_known_figures():
    known = {
        "gpt2": 124_439_808,
        "gpt2-medium": 354_823_168,
        "gpt2-large": 774_030_080,
        "gpt2-xl": 1_557_611_200,
        "llama-3-8b": 8_030_261_248,
        "llama-3-70b": 70_553_706_496,
        "llama-3.1-405b": 405_853_388_800,
        "qwen2.5-7b": 7_615_616_512,
        "mixtral-8x7b": 46_702_792_704,
    }
    assert {name: catalogue.model(name).architecture.parameters for name in known} == known
    assert f"{catalogue.model('deepseek-v3').architecture.activated / 1e9:.1f}" == "36.6", "its README_WEIGHTS.md"
    # bytes a token in BF16, arXiv 2505.09343, table 1
    published = {"deepseek-v3": 70_272, "qwen2.5-72b": 327_680, "llama-3.1-405b": 516_096}
    for name, size in published.items():
        made = catalogue.model(name).architecture
        assert 2 * made.kv_elements * made.kv_tokens(1) == size


SMALL = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 64,
} | SPECIAL
MLA = {"kv_lora_rank": 12, "q_lora_rank": None, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
CACHES = {  # a twin in transformers whose cache is counted after 24 tokens
    "multi-head": ("gpt2", {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 32, "vocab_size": 64} | SPECIAL),
    "grouped-query": ("llama", SMALL | {"num_key_value_heads": 2}),
    "multi-query": ("mistral", SMALL | {"num_key_value_heads": 1, "sliding_window": None}),
    "latent": ("deepseek_v3", SMALL | MLA | {"moe_intermediate_size": 8, "n_routed_experts": 8, "n_group": 2}),
}
WINDOWED = {
    "mistral": SMALL | {"num_key_value_heads": 4, "sliding_window": 8},
    "qwen2": SMALL
    | {"num_key_value_heads": 4, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
}


def cached(kind, config, tokens=24):
    """(our architecture, elements in transformers' cache after a sequence)."""
    made = AutoConfig.for_model(kind, **config, **({"topk_group": 1} if kind.startswith("deepseek") else {}))
    model = AutoModelForCausalLM.from_config(made).eval()
    with torch.no_grad():
        cache = model(torch.randint(0, 64, (1, tokens)), use_cache=True).past_key_values
    elements = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    return from_config(made.to_dict(), "twin"), elements


@pytest.mark.parametrize("attention", CACHES)
def test_the_cache_has_the_elements_that_transformers_keeps(attention, one_thread):
    ours, elements = cached(*CACHES[attention])
    assert ours.attention == attention
    assert ours.kv_tokens(24) * ours.kv_elements == elements


@pytest.mark.parametrize("kind", WINDOWED)
def test_a_sliding_window_bounds_the_cache(kind, one_thread):
    ours, elements = cached(kind, WINDOWED[kind])
    next_token = ours.windowed * ours.kv_elements  # between steps transformers keeps one token less than the window
    assert ours.windowed == {"mistral": 3, "qwen2": 2}[kind]
    assert ours.kv_tokens(24) * ours.kv_elements == elements + next_token


LLAMA = {"model_type": "llama", **SMALL}


def test_an_old_config_without_later_settings_means_what_it_meant():
    assert not {"num_key_value_heads", "head_dim", "tie_word_embeddings"} & LLAMA.keys()
    ours = from_config(LLAMA, "old")
    assert ours.parameters == count(built("llama", SMALL))
    assert ours.attention == "multi-head"
    assert from_config(LLAMA | {"num_key_value_heads": None, "head_dim": None}, "old") == ours


REFUSED = {
    "unknown": (LLAMA | {"model_type": "lama"}, "model_type 'lama' is not supported: did you mean 'llama'?"),
    "odd": (LLAMA | {"model_type": ["llama"]}, "model_type ['llama'] is not supported"),
    "no type": ({"hidden_size": 4}, "has no model_type"),
    "missing": ({k: v for k, v in LLAMA.items() if k != "vocab_size"}, "has no vocab_size"),
    "negative": (LLAMA | {"hidden_size": -32}, "hidden_size=-32 must be a whole number from 1"),
    "zero": (LLAMA | {"num_hidden_layers": 0}, "num_hidden_layers=0 must be a whole number from 1 to 10000"),
    "absurd": (LLAMA | {"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000 must be"),
    "huge": (LLAMA | {"vocab_size": 10**2000}, "vocab_size=a huge number must be"),
    "all huge": (LLAMA | {"hidden_size": 10**8, "intermediate_size": 10**8}, "sizes that cannot be meant"),
    "text": (LLAMA | {"hidden_size": "32"}, "hidden_size=32 must be a whole number"),
    "fraction": (LLAMA | {"hidden_size": 32.0}, "hidden_size=32.0 must be a whole number"),
    "truth": (LLAMA | {"hidden_size": True}, "hidden_size=True must be a whole number"),
    "flag": (LLAMA | {"tie_word_embeddings": 1}, "tie_word_embeddings=1 must be true or false"),
    "heads": (LLAMA | {"num_key_value_heads": 3}, "num_key_value_heads=3 must divide num_attention_heads=4"),
    "width": (LLAMA | {"hidden_size": 33}, "num_attention_heads=4 must divide hidden_size=33"),
    "qwen2": (LLAMA | {"model_type": "qwen2"}, "has no num_key_value_heads"),
    "experts": (
        LLAMA | {"model_type": "mixtral", "num_key_value_heads": 4, "num_local_experts": 4, "num_experts_per_tok": 5},
        "num_experts_per_tok=5 must be a whole number from 1 to 4",
    ),
    "cross": ({"model_type": "gpt2", "n_embd": 8, "n_head": 2, "add_cross_attention": True}, "add_cross_attention"),
    "list": ([1], "holds no mapping"),
}


@pytest.mark.parametrize(("config", "wanted"), REFUSED.values(), ids=REFUSED)
def test_a_config_that_cannot_be_is_refused(config, wanted, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*{re.escape(wanted)}"):
        read(path)


def test_torn_and_missing_files_are_refused(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(ValueError, match=r"no config\.json can be read at .*No such file"):
        read(tmp_path)
    for torn in (b'{"model_type": "lla', b"", b"\xff\xfe\x00", b"[" * 100_000, b'{"vocab_size": ' + b"9" * 5000 + b"}"):
        path.write_bytes(torn)
        with pytest.raises(ValueError, match="is not whole JSON"):
            read(tmp_path)

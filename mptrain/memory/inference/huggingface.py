"""The :class:`Architecture` behind a Hugging Face ``config.json``, read without transformers.

Defaults of absent keys are those of transformers' own configuration classes where these are safe to take; sizes must
be there. What transformers counts as parameters is what is counted (buffers, such as DeepSeek's routing bias, are not).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mptrain.memory.inference.architecture import Architecture, Biases, Experts, Latent
from mptrain.tools.settings import did_you_mean

MOST = 10**8  # of any size; layers apart
MOST_LAYERS = 10_000
MOST_PARAMETERS = 10**15
NONE = Biases()


def read(path: Path) -> Architecture:
    """Read a ``config.json``, or the folder it is in."""
    path = path / "config.json" if path.is_dir() else path
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"no config.json can be read at {path} ({error.strerror}): set --model") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not whole JSON ({error}): set --model to another, or fetch it again") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no mapping of settings: set --model to a model's config.json")
    return from_config({"_name_or_path": path.absolute().parent.name} | values, str(path))


def from_config(values: Mapping[str, Any], where: str) -> Architecture:
    """The architecture of a config; ``where`` names it in errors. ValueError for what is unknown or cannot be."""
    kind = values.get("model_type")
    if kind is None:
        raise ValueError(f"{where} has no model_type: it is not the config.json of a model")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(f"{where}: model_type {kind!r} is not supported{did_you_mean(str(kind), sorted(FAMILIES))}")
    architecture = FAMILIES[kind](_Reader(values, where))
    if architecture.parameters > MOST_PARAMETERS:
        raise ValueError(f"{where} has {architecture.parameters:,} parameters: sizes that cannot be meant")
    return architecture


class _Reader:
    """Checked values of a config; every message says where."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where = values, where

    def size(self, key: str, default: int | None = None, *, least: int = 1, most: int = MOST) -> int:
        """A whole number; ``default``, where there is one, for null and absent ones."""
        value = self.values.get(key)
        if value is None:
            if default is None:
                raise ValueError(f"{self.where} has no {key}: a {self.values['model_type']} needs it")
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            shown = str(value) if not isinstance(value, int) or abs(value) < 10**30 else "a huge number"
            raise ValueError(f"{self.where}: {key}={shown} must be a whole number from {least} to {most}")
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise ValueError(f"{self.where}: {key}={value} must be true or false")
        return value

    def divides(self, small: str, small_size: int, large: str, large_size: int) -> None:
        if large_size % small_size:
            raise ValueError(f"{self.where}: {small}={small_size} must divide {large}={large_size}")

    def name(self) -> str:
        """Return the name that the config has, or its folder's."""
        named = self.values.get("_name_or_path")
        return named if isinstance(named, str) and named else str(self.values["model_type"])


def _gpt2(of: _Reader) -> Architecture:
    hidden, heads = of.size("n_embd"), of.size("n_head")
    of.divides("n_head", heads, "n_embd", hidden)
    if of.flag("add_cross_attention"):
        raise ValueError(f"{of.where}: add_cross_attention=true is a decoder of an encoder, which is not supported")
    return Architecture(
        of.name(),
        layers=of.size("n_layer", most=MOST_LAYERS),
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        vocabulary=of.size("vocab_size"),
        ffn=of.size("n_inner", 4 * hidden),
        gated=False,
        tied=of.flag("tie_word_embeddings", True),
        context=of.size("n_positions"),
        learned_positions=True,
        biases=Biases(qkv=True, out=True, mlp=True, norm=True),
    )


def _llama(of: _Reader, biases: Biases = NONE, *, kv_heads_needed: bool = True) -> Architecture:
    """The common shape; ``kv_heads_needed``: transformers has a number of its own for an absent one."""
    hidden, heads = of.size("hidden_size"), of.size("num_attention_heads")
    layers = of.size("num_hidden_layers", most=MOST_LAYERS)
    kv_heads = of.size("num_key_value_heads", None if kv_heads_needed else heads, most=heads)
    of.divides("num_key_value_heads", kv_heads, "num_attention_heads", heads)
    if of.values.get("head_dim") is None:
        of.divides("num_attention_heads", heads, "hidden_size", hidden)
    return Architecture(
        of.name(),
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=of.size("head_dim", hidden // heads),
        vocabulary=of.size("vocab_size"),
        ffn=of.size("intermediate_size"),
        tied=of.flag("tie_word_embeddings"),
        context=of.size("max_position_embeddings", 0),
        biases=biases,
    )


def _plain_llama(of: _Reader) -> Architecture:
    attention = of.flag("attention_bias")
    biases = Biases(qkv=attention, out=attention, mlp=of.flag("mlp_bias"))
    return _llama(of, biases, kv_heads_needed=False)


def _mistral(of: _Reader) -> Architecture:
    return _windowed(of, _llama(of), all_layers=True)


def _qwen2(of: _Reader) -> Architecture:
    return _windowed(of, _llama(of, Biases(qkv=True)))


def _qwen3(of: _Reader) -> Architecture:
    of.size("head_dim")  # transformers' own default is 128, whatever the hidden size
    attention = of.flag("attention_bias")
    return replace(_windowed(of, _llama(of, Biases(qkv=attention, out=attention))), qk_norm=True)


def _mixtral(of: _Reader) -> Architecture:
    routed = of.size("num_local_experts", most=10**5)
    active = of.size("num_experts_per_tok", most=routed)
    experts = Experts(routed, active, ffn=of.size("intermediate_size"))
    return replace(_windowed(of, _llama(of), all_layers=True), experts=experts)


def _windowed(of: _Reader, architecture: Architecture, *, all_layers: bool = False) -> Architecture:
    """Return the same with what a sliding window spares of the cache; ``all_layers``: wherever there is a window."""
    window, kinds = of.size("sliding_window", 0), of.values.get("layer_types")
    if not window or not (all_layers or of.flag("use_sliding_window")):
        return architecture
    if all_layers:
        return replace(architecture, window=window, windowed=architecture.layers)
    if isinstance(kinds, list):
        return replace(architecture, window=window, windowed=min(architecture.layers, kinds.count("sliding_attention")))
    full = min(architecture.layers, of.size("max_window_layers", least=0))
    return replace(architecture, window=window, windowed=architecture.layers - full)


def _deepseek(of: _Reader) -> Architecture:
    """DeepSeek-V2 and V3, without the module for multi-token prediction."""
    if of.size("moe_layer_freq", 1) != 1:
        raise ValueError(f"{of.where}: moe_layer_freq={of.values['moe_layer_freq']} is not supported; 1 is")
    latent = Latent(
        kv_rank=of.size("kv_lora_rank"),
        q_rank=of.size("q_lora_rank", 0),
        rope=of.size("qk_rope_head_dim"),
        nope=of.size("qk_nope_head_dim"),
        value=of.size("v_head_dim"),
    )
    layers, routed = of.size("num_hidden_layers", most=MOST_LAYERS), of.size("n_routed_experts", most=10**5)
    experts = Experts(
        routed,
        of.size("num_experts_per_tok", most=routed),
        of.size("n_shared_experts", least=0),
        of.size("moe_intermediate_size"),
        min(layers, of.size("first_k_dense_replace", least=0)),
    )
    bias, heads = of.flag("attention_bias"), of.size("num_attention_heads")
    return Architecture(
        of.name(),
        layers=layers,
        hidden=of.size("hidden_size"),
        heads=heads,
        kv_heads=heads,
        head_dim=latent.nope + latent.rope,
        vocabulary=of.size("vocab_size"),
        ffn=of.size("intermediate_size"),
        tied=of.flag("tie_word_embeddings"),
        context=of.size("max_position_embeddings", 0),
        biases=Biases(out=bias, latent=bias, mlp=of.values["model_type"] == "deepseek_v2" and of.flag("mlp_bias")),
        latent=latent,
        experts=experts,
    )


FAMILIES: dict[str, Callable[[_Reader], Architecture]] = {
    "gpt2": _gpt2,
    "llama": _plain_llama,
    "mistral": _mistral,
    "mixtral": _mixtral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek,
}

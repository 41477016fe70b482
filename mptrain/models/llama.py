"""Llama 3 (Grattafiori et al. 2024): RMSNorm, rotary positions, SwiGLU, grouped key and value heads, no biases."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mptrain.models._base import BaseConfig
from mptrain.models._base import all_blocks_alike as grows_evenly  # noqa: F401 - of the contract
from mptrain.models._decoder import Decoder, require_vocabulary
from mptrain.models._decoder import sizes as sizes
from mptrain.models._transformer import require_positive

INPUT = "tokens"
TENSOR_PARALLEL = {
    "blocks.*.attention.[qkv]": "columns",
    "blocks.*.attention.out": "rows",
    "blocks.*.mlp.gate": "columns",
    "blocks.*.mlp.up": "columns",
    "blocks.*.mlp.down": "rows",
}
TWINS = {  # layers of a block, here and in Hugging Face's Llama
    "norm1": "input_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.out": "self_attn.o_proj",
    "norm2": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}


@dataclass(frozen=True)
class Config(BaseConfig):
    """Sizes of a Llama. ``vocab_size`` 0 means: the data's. ValueError names the setting that cannot work."""

    vocab_size: int = 0
    block_size: int = 256
    n_layer: int = 4
    n_head: int = 8
    n_kv_head: int = 2
    n_embd: int = 256
    n_ffn: int = 768
    rope_theta: float = 500000.0
    norm_eps: float = 1e-5
    tied: bool = False

    def __post_init__(self) -> None:
        sizes = ("block_size", "n_layer", "n_head", "n_kv_head", "n_embd", "n_ffn")
        require_positive("llama", self, *sizes, "rope_theta", "norm_eps")
        pairs = 2 * self.n_head
        if self.n_embd % pairs:  # rotary positions turn pairs of channels
            works = pairs * max(1, round(self.n_embd / pairs))
            raise ValueError(
                f"llama: n_embd={self.n_embd} is not a multiple of 2 * n_head={pairs}; try model.n_embd={works}"
            )
        if self.n_head % self.n_kv_head:
            works = max(d for d in range(1, self.n_head + 1) if self.n_head % d == 0 and d <= self.n_kv_head)
            raise ValueError(
                f"llama: n_head={self.n_head} is not a multiple of n_kv_head={self.n_kv_head}; "
                f"try model.n_kv_head={works}"
            )


def rotation(length: int, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary positions (Su et al. 2021), each [length, head_dim].

    Made in each forward and kept nowhere: a few microseconds, and no buffer that a meta build leaves empty, a
    checkpoint carries or a cast of the whole model rounds.
    """
    frequency = theta ** -(torch.arange(0, head_dim, 2, device=device) / head_dim)
    angle = torch.arange(length, device=device)[:, None] * frequency
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn channel i of each head of ``x`` [B, H, T, D] with channel i + D / 2: the pairs of Hugging Face's weights."""
    first, second = x.chunk(2, dim=-1)
    turned = x * cos + torch.cat((-second, first), dim=-1) * sin
    return turned.type_as(x)  # the tables must not widen what goes into attention


class Attention(nn.Module):
    """Causal self-attention whose n_head query heads share n_kv_head heads of keys and values."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.head_dim = config.n_embd // config.n_head
        self.group = config.n_head // config.n_kv_head
        self.q = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.k = nn.Linear(config.n_embd, config.n_kv_head * self.head_dim, bias=False)
        self.v = nn.Linear(config.n_embd, config.n_kv_head * self.head_dim, bias=False)
        self.out = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[B, T, n_embd] and the rotation [T, head_dim] twice -> [B, T, n_embd]."""
        q, k, v = (part(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in (self.q, self.k, self.v))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        # Repeated, not enable_gqa=True: on CUDA the kernels that group heads do not take every type of input, and what
        # they do not take falls silently to the unfused kernel (23 ms; repeated, 7.5 ms: pytorch pull request 181528).
        # A comparison of speeds would then measure the fallback.
        k, v = k.repeat_interleave(self.group, dim=1), v.repeat_interleave(self.group, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020): down(silu(gate(x)) * up(x))."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate = nn.Linear(config.n_embd, config.n_ffn, bias=False)
        self.up = nn.Linear(config.n_embd, config.n_ffn, bias=False)
        self.down = nn.Linear(config.n_ffn, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, n_embd] -> the same."""
        out: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return out


class Block(nn.Module):
    """x + attention(norm1(x)), then x + mlp(norm2(x))."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.attention = Attention(config)
        self.norm2 = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[B, T, n_embd] and the rotation -> [B, T, n_embd]."""
        x = x + self.attention(self.norm1(x), cos, sin)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class Llama(Decoder):
    """The whole model: tokens in, logits or loss out."""

    def __init__(self, config: Config) -> None:
        blocks: list[nn.Module] = [Block(config) for _ in range(config.n_layer)]
        super().__init__(config, blocks, nn.RMSNorm(config.n_embd, eps=config.norm_eps))
        self.head_dim = config.n_embd // config.n_head
        self.rope_theta = config.rope_theta

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """``tokens``, ``targets`` [B, T] int64 -> mean loss in nats, or logits [B, T, vocab_size] without targets."""
        self.check_length(tokens.shape[1])
        cos, sin = rotation(tokens.shape[1], self.head_dim, self.rope_theta, tokens.device)
        return self.decode(self.embed(tokens), targets, cos, sin)


def build(config: Config) -> Llama:
    """A freshly initialized model on torch's default device, from torch's global random state."""
    require_vocabulary("llama", config.vocab_size)
    model = Llama(config)
    model.reset_parameters()
    return model


def hugging_face(config: Config, state: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The model as transformers' LlamaForCausalLM: its config.json, and its tensors by name from our ``state``."""
    places = {"embed": "model.embed_tokens", "norm": "model.norm"}
    for n in range(config.n_layer):
        places |= {f"blocks.{n}.{ours}": f"model.layers.{n}.{theirs}" for ours, theirs in TWINS.items()}
    if not config.tied:
        places["head"] = "lm_head"
    tensors = {f"{theirs}.weight": state[f"{ours}.weight"] for ours, theirs in places.items()}
    settings = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.block_size,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "hidden_size": config.n_embd,
        "intermediate_size": config.n_ffn,
        "hidden_act": "silu",
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        **dict.fromkeys(("bos_token_id", "eos_token_id")),  # the data's, which has no special tokens
    }
    return settings, tensors

"""GPT-2 (Radford et al. 2019): learned positions, pre-norm blocks, GELU (tanh form), biases, a tied head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mptrain.models._base import BaseConfig
from mptrain.models._base import all_blocks_alike as grows_evenly  # noqa: F401 - of the contract
from mptrain.models._decoder import Decoder, require_vocabulary
from mptrain.models._decoder import sizes as sizes
from mptrain.models._transformer import require_heads, require_positive

INPUT = "tokens"
TENSOR_PARALLEL = {  # the two products that end a branch sum over what the ones before them made
    "blocks.*.attention.qkv": "columns",
    "blocks.*.attention.out": "rows",
    "blocks.*.mlp.up": "columns",
    "blocks.*.mlp.down": "rows",
}
TWINS = {  # layers of a block, here and in Hugging Face's GPT-2
    "norm1": "ln_1",
    "attention.qkv": "attn.c_attn",
    "attention.out": "attn.c_proj",
    "norm2": "ln_2",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}


@dataclass(frozen=True)
class Config(BaseConfig):
    """Sizes of a GPT-2. ``vocab_size`` 0 means: the data's. ValueError names the setting that cannot work."""

    vocab_size: int = 0
    block_size: int = 256
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 256
    bias: bool = True
    dropout: float = 0.0
    tied: bool = True

    def __post_init__(self) -> None:
        require_positive("gpt", self, "block_size", "n_layer", "n_head", "n_embd")
        require_heads("gpt", self.n_embd, self.n_head)
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"gpt: dropout={self.dropout} must be in [0, 1); try model.dropout=0.1")


class BlockSizes(Protocol):
    """The part of a model's Config that a block reads."""

    @property
    def n_head(self) -> int: ...
    @property
    def n_embd(self) -> int: ...
    @property
    def bias(self) -> bool: ...
    @property
    def dropout(self) -> float: ...


class Attention(nn.Module):
    """Multi-head self-attention; one product makes query, key and value. ``causal``: a position sees only earlier ones.

    The product's rows go head by head, each head's query, key and value (Megatron's order; GPT-2's is all queries, all
    keys, all values): so any contiguous block of ``3 head_dim`` rows per head holds whole heads, and tensor parallelism
    can cut the weight into such blocks. ``forward`` takes the number of heads from the weight it has.
    """

    def __init__(self, config: BlockSizes, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.head_dim = config.n_embd // config.n_head
        self.dropout = config.dropout
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.out = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, n_embd] -> the same."""
        heads = self.qkv(x).unflatten(-1, (-1, 3, self.head_dim))  # [B, T, n_head, 3, head_dim]
        q, k, v = (part.transpose(1, 2) for part in heads.unbind(-2))
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=self.causal)
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out


class MLP(nn.Module):
    """Two products, four times as wide in the middle."""

    def __init__(self, config: BlockSizes) -> None:
        super().__init__()
        self.up = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.down = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, n_embd] -> the same."""
        out: Tensor = self.down(F.gelu(self.up(x), approximate="tanh"))
        return out


class Block(nn.Module):
    """x + attention(norm1(x)), then x + mlp(norm2(x))."""

    def __init__(self, config: BlockSizes, causal: bool = True) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attention = Attention(config, causal)
        self.norm2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, n_embd] -> the same."""
        x = x + self.dropout(self.attention(self.norm1(x)))
        out: Tensor = x + self.dropout(self.mlp(self.norm2(x)))
        return out


class GPT(Decoder):
    """The whole model: tokens in, logits or loss out."""

    def __init__(self, config: Config) -> None:
        blocks: list[nn.Module] = [Block(config) for _ in range(config.n_layer)]
        super().__init__(config, blocks, nn.LayerNorm(config.n_embd, bias=config.bias))
        self.position = nn.Embedding(config.block_size, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """``tokens``, ``targets`` [B, T] int64 -> mean loss in nats, or logits [B, T, vocab_size] without targets."""
        self.check_length(tokens.shape[1])
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        return self.decode(self.dropout(self.embed(tokens) + self.position(positions)), targets)


def build(config: Config) -> GPT:
    """A freshly initialized model on torch's default device, from torch's global random state."""
    require_vocabulary("gpt", config.vocab_size)
    model = GPT(config)
    model.reset_parameters()
    return model


def hugging_face(config: Config, state: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The model as transformers' GPT2LMHeadModel: its config.json, and its tensors by name from our ``state``.

    There the products' weights are transposed (Conv1D), the fused rows are all queries, all keys, all values, and
    every layer of a block has a bias: zeros where ``bias=False`` left it out.
    """
    places = {"norm": "transformer.ln_f"}
    for n in range(config.n_layer):
        places |= {f"blocks.{n}.{ours}": f"transformer.h.{n}.{theirs}" for ours, theirs in TWINS.items()}
    tensors = {"transformer.wte.weight": state["embed.weight"], "transformer.wpe.weight": state["position.weight"]}
    for ours, theirs in places.items():
        weight = state[f"{ours}.weight"]
        bias = state[f"{ours}.bias"] if config.bias else weight.new_zeros(len(weight))
        if ours.endswith(".qkv"):
            weight, bias = _apart(weight, config.n_head), _apart(bias, config.n_head)
        tensors |= {f"{theirs}.weight": weight.t(), f"{theirs}.bias": bias}
    if not config.tied:
        tensors["lm_head.weight"] = state["head.weight"]
    return _hugging_face_config(config), tensors


def _apart(rows: Tensor, n_head: int) -> Tensor:
    """Rows of a fused product as all queries, all keys, all values, from each head's query, key and value."""
    return rows.view(n_head, 3, -1, *rows.shape[1:]).transpose(0, 1).reshape(rows.shape)


def _hugging_face_config(config: Config) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": config.tied,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout),
        **dict.fromkeys(("bos_token_id", "eos_token_id")),  # the data's, which has no special tokens
    }

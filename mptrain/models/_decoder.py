"""What the decoder-only language models share: the walk over the blocks, the loss, the first weights, the FLOPs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor, nn

INIT_STD = 0.02
"""Standard deviation of the initial weights (GPT-2, Radford et al. 2019; the OpenAI code's w_init_stdev)."""


class Sizes(Protocol):
    """The part of a model's Config that the shared code reads."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def block_size(self) -> int: ...
    @property
    def n_layer(self) -> int: ...
    @property
    def n_embd(self) -> int: ...
    @property
    def tied(self) -> bool: ...


def require_positive(kind: str, config: object, *names: str) -> None:
    """ValueError for the first setting of ``config`` that is not above zero; its default is offered instead."""
    for name in names:
        if getattr(config, name) <= 0:
            works = getattr(type(config), name)
            raise ValueError(f"{kind}: {name}={getattr(config, name)} must be positive; try model.{name}={works}")


def require_vocabulary(kind: str, vocab_size: int) -> None:
    """ValueError when nobody filled in the vocabulary (0 in a Config means: take it from the data)."""
    if vocab_size <= 0:
        raise ValueError(f"{kind}: vocab_size={vocab_size}: without data to set it, try model.vocab_size=256 (bytes)")


class Decoder(nn.Module):
    """Embedding, blocks, norm and head. A subclass makes the blocks and writes ``forward`` around ``decode``.

    The head, like every other matrix product's weight, sits in an ``nn.Linear``, so that what converts layers by type
    and name finds all of them: ``embed``, ``blocks.N....``, ``norm``, ``head``.
    """

    recompute: Callable[..., Tensor] | None = None
    """Activation checkpointing, given by the caller: in training, blocks run as ``recompute(block, x, *shared)``."""

    def __init__(self, config: Sizes, blocks: list[nn.Module], norm: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.embed.weight

    def reset_parameters(self) -> None:
        """Normal(0, 0.02) weights, zero biases, unit norms; also what fills a meta model after ``to_empty``.

        The two projections of a block that write to the residual stream (``out``, ``down``) get 0.02 / sqrt(2 n_layer):
        2 n_layer of them add up, and the stream's variance should not grow with depth (GPT-2, section 2.3).
        """
        if self.config.tied:
            self.head.weight = self.embed.weight  # to_empty makes one parameter of each: tie them again
        residual_std = INIT_STD / math.sqrt(2 * self.config.n_layer)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=residual_std if name.endswith((".out", ".down")) else INIT_STD)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
                module.reset_parameters()

    def check_length(self, length: int) -> None:
        """ValueError when a sequence is longer than the model was built for."""
        limit = self.config.block_size
        if length > limit:
            raise ValueError(f"{length} tokens are more than block_size={limit}; set model.block_size={length}")

    def decode(self, x: Tensor, targets: Tensor | None, *shared: Tensor) -> Tensor:
        """Run ``x`` [B, T, n_embd] through blocks, norm and head.

        ``shared`` goes to every block as it is (rotation tables, for instance). Returns the mean cross-entropy in nats
        (a scalar) when ``targets`` [B, T] is given, else the logits [B, T, vocab_size].
        """
        recompute = self.recompute if self.training else None
        for block in self.blocks:
            x = block(x, *shared) if recompute is None else recompute(block, x, *shared)
        logits: Tensor = self.head(self.norm(x))
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def flops_per_token(self) -> float:
        """Floating-point operations of forward and backward for one token at full ``block_size``.

        6 per weight of a matrix product (2 forward, 4 backward; the head counts, tied or not, look-ups do not), plus
        12 n_layer n_embd block_size for attention's two products, counted in full as if attention were not causal: the
        convention of PaLM (Chowdhery et al. 2022, appendix B). Recomputation is not counted.
        """
        config = self.config
        weights = sum(p.numel() for p in self.blocks.parameters() if p.ndim == 2) + config.vocab_size * config.n_embd
        return 6.0 * weights + 12.0 * config.n_layer * config.n_embd * config.block_size

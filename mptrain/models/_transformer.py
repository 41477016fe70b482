"""Common parts of the transformers: where each layer goes by name, the walk over the blocks, the first weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

INIT_STD = 0.02
"""Standard deviation of the initial weights (GPT-2, Radford et al. 2019; the OpenAI code's w_init_stdev)."""


def require_positive(kind: str, config: object, *names: str) -> None:
    """ValueError for the first setting of ``config`` that is not above zero; its default is offered instead."""
    for name in names:
        if getattr(config, name) <= 0:
            works = getattr(type(config), name)
            raise ValueError(f"{kind}: {name}={getattr(config, name)} must be positive; try model.{name}={works}")


def require_heads(kind: str, n_embd: int, n_head: int) -> None:
    """ValueError when the width cannot be cut into heads."""
    if n_embd % n_head:
        works = n_head * max(1, round(n_embd / n_head))
        raise ValueError(f"{kind}: n_embd={n_embd} is not a multiple of n_head={n_head}; try model.n_embd={works}")


class Transformer(nn.Module):
    """Embedding, blocks, norm and head. A subclass makes them and writes ``forward`` around ``encode``.

    Every matrix product's weight sits in an ``nn.Linear``, so that what converts layers by type and name finds all of
    them: ``embed``, ``blocks.N....``, ``norm``, ``head``. ``config`` has ``n_layer`` and ``n_embd``.
    """

    recompute: Callable[..., Tensor] | None = None
    """Activation checkpointing, given by the caller: in training, blocks run as ``recompute(block, x, *shared)``."""

    def __init__(
        self, config: Any, embed: nn.Linear | nn.Embedding, blocks: list[nn.Module], norm: nn.Module, head: nn.Linear
    ) -> None:
        super().__init__()
        self.config = config
        self.embed = embed
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm
        self.head = head

    def reset_parameters(self) -> None:
        """Normal(0, 0.02) weights, zero biases, unit norms; also what fills a meta model after ``to_empty``.

        The two projections of a block that write to the residual stream (``out``, ``down``) get 0.02 / sqrt(2 n_layer):
        2 n_layer of them add up, and the stream's variance should not grow with depth (GPT-2, section 2.3).
        """
        residual_std = INIT_STD / math.sqrt(2 * self.config.n_layer)
        for name, module in self.named_modules():
            weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
            if isinstance(module, nn.LayerNorm | nn.RMSNorm):
                module.reset_parameters()
            elif weight is not None and weight.ndim == 2:  # a product's, whoever's kernels compute it, or an embedding
                nn.init.normal_(weight, std=residual_std if name.endswith((".out", ".down")) else INIT_STD)
                if bias is not None:
                    nn.init.zeros_(bias)

    def encode(self, x: Tensor, *shared: Tensor) -> Tensor:
        """Run ``x`` [B, T, n_embd] through blocks and norm.

        ``shared`` goes to every block as it is (rotation tables, for instance).
        """
        recompute = self.recompute if self.training else None
        for block in self.blocks:
            x = block(x, *shared) if recompute is None else recompute(block, x, *shared)
        out: Tensor = self.norm(x)
        return out

    def block_flops(self, length: int) -> float:
        """Floating-point operations of all blocks, forward and backward, for one of ``length`` positions.

        6 per weight of a matrix product (2 forward, 4 backward), plus 12 n_layer n_embd length for attention's two
        products, counted in full as if attention were not causal: the convention of PaLM (Chowdhery et al. 2022,
        appendix B). Recomputation is not counted.
        """
        weights = sum(p.numel() for p in self.blocks.parameters() if p.ndim == 2)
        attention: float = 12.0 * self.config.n_layer * self.config.n_embd * length
        return 6.0 * weights + attention

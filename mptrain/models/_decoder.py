"""Common parts of the decoder-only language models: the vocabulary at both ends, the loss, the FLOPs."""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mptrain.models._transformer import Transformer

EXAMPLE_LENGTH = 64
"""Tokens of a sequence of ``example``: enough for attention to weigh something, quick in a model of any size."""


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


def require_vocabulary(kind: str, vocab_size: int) -> None:
    """ValueError when nobody filled in the vocabulary (0 in a Config means: take it from the data)."""
    if vocab_size <= 0:
        raise ValueError(f"{kind}: vocab_size={vocab_size}: without data to set it, try model.vocab_size=256 (bytes)")


def sizes(settings: dict[str, Any], state: dict[str, Tensor]) -> dict[str, int]:
    """Read off the weights what the data decided: the vocabulary."""
    del settings
    return {"vocab_size": len(state["embed.weight"])}


class Decoder(Transformer):
    """Token embedding, blocks, norm and a head over the vocabulary, which may share the embedding's weight.

    A subclass makes the blocks and writes ``forward`` around ``decode``.
    """

    config: Sizes

    def __init__(self, config: Sizes, blocks: list[nn.Module], norm: nn.Module) -> None:
        embed = nn.Embedding(config.vocab_size, config.n_embd)
        super().__init__(config, embed, blocks, norm, nn.Linear(config.n_embd, config.vocab_size, bias=False))
        self._tie()

    def _tie(self) -> None:
        if self.config.tied:
            self.head.weight = self.embed.weight

    def reset_parameters(self) -> None:
        self._tie()  # to_empty makes one parameter of each: tie them again
        super().reset_parameters()

    def check_length(self, length: int) -> None:
        """ValueError when a sequence is longer than the model was built for."""
        limit = self.config.block_size
        if length > limit:
            raise ValueError(f"{length} tokens are more than block_size={limit}; set model.block_size={length}")

    def decode(self, x: Tensor, targets: Tensor | None, *shared: Tensor) -> Tensor:
        """Run ``x`` [B, T, n_embd] through blocks, norm and head; ``shared`` goes to every block.

        Returns the mean cross-entropy in nats (a scalar) when ``targets`` [B, T] is given, else the logits
        [B, T, vocab_size].
        """
        logits: Tensor = self.head(self.encode(x, *shared))
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def flops_per_token(self) -> float:
        """Floating-point operations of forward and backward for one token at full ``block_size``.

        Those of the blocks (:meth:`block_flops`) and of the head, which counts, tied or not; look-ups do not.
        """
        config = self.config
        return self.block_flops(config.block_size) + 6.0 * config.vocab_size * config.n_embd

    def example(self, rows: int) -> dict[str, Tensor]:
        """A random batch of about ``rows`` tokens, as ``forward`` takes it."""
        length = min(EXAMPLE_LENGTH, self.config.block_size)
        shape = (max(1, rows // length), length)
        tokens = torch.randint(self.config.vocab_size, shape, device=self.head.weight.device)
        return {"tokens": tokens, "targets": tokens}

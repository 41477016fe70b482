"""Token data in numpy, one source a file. A new file here is a new ``kind`` for the YAMLs of conf/data.

The order of training samples is a function of (seed, step) alone: nothing about it is saved, and a run may resume at
any step on any number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mptrain import registry

ENTROPY_CHUNK = 1 << 22
"""Tokens counted at a time: 8 MB of 2-byte tokens, so that the entropy of a corpus of any size needs little memory."""


class Tokens(Protocol):
    """A one-dimensional run of tokens: an array, a memory map, or several of them addressed as one."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: slice, /) -> npt.NDArray[Any]: ...


@dataclass(frozen=True, eq=False)
class TokenDataset:
    """Training and validation tokens, cut into samples of ``block_size`` tokens and as many targets.

    ``fingerprint`` is the SHA-256 (hex) of the content: losses compare only within one. ValueError when a split is too
    short for a single sample.
    """

    name: str
    train_tokens: Tokens
    validation_tokens: Tokens
    vocab_size: int
    block_size: int
    fingerprint: str

    def __post_init__(self) -> None:
        if self.block_size <= 0:
            raise ValueError(f"{self.name}: block_size={self.block_size} must be positive; try data.block_size=256")
        for split, tokens in (("train", self.train_tokens), ("validation", self.validation_tokens)):
            if len(tokens) <= self.block_size:
                raise ValueError(
                    f"{self.name}: {len(tokens)} tokens of {split} data are too few for block_size={self.block_size}; "
                    f"set model.block_size={max(len(tokens) - 1, 1)} or less, or choose larger data"
                )

    def batch(
        self,
        step: int,
        *,
        micro: int = 0,
        microbatches: int = 1,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> dict[str, Tensor]:
        """Samples of one micro-batch on one process: ``tokens`` and ``targets``, both int64 [batch_size, block_size].

        A step draws microbatches * world_size * batch_size start positions from Philox keyed on (seed, step), and
        (micro, rank) takes its slice: the step's samples are the same however they are split.
        """
        if not (0 <= micro < microbatches and 0 <= rank < world_size and batch_size > 0):
            raise ValueError(f"no micro-batch {micro} of {microbatches} on rank {rank} of {world_size} x {batch_size}")
        if seed < 0 or step < 0:
            raise ValueError(f"seed={seed} and step={step} must not be negative; try seed=0")
        first = (micro * world_size + rank) * batch_size
        # Raw words: numpy keeps their stream for ever, unlike that of integers(). Modulo's bias: 2^-30 at 2^34 tokens.
        words = np.random.Philox(key=[seed, step]).random_raw(microbatches * world_size * batch_size)
        starts = words[first : first + batch_size] % np.uint64(len(self.train_tokens) - self.block_size)
        return self._samples(self.train_tokens, starts.tolist())

    def validation(self, batch_size: int, batches: int) -> Iterator[dict[str, Tensor]]:
        """Up to ``batches`` batches of evenly spaced blocks without overlap: the same in every run, whatever the seed.

        A validation split with fewer blocks than asked for gives the whole batches it has, or one smaller batch of all.
        """
        available = (len(self.validation_tokens) - 1) // self.block_size
        batch_size = min(batch_size, available)
        batches = min(batches, available // batch_size)
        count = batches * batch_size
        starts = [i * available // count * self.block_size for i in range(count)]
        for first in range(0, count, batch_size):
            yield self._samples(self.validation_tokens, starts[first : first + batch_size])

    @cached_property
    def unigram_entropy_nats(self) -> float:
        """Entropy of the training tokens' frequencies, nats a token: what a model that ignores context can reach.

        Counted at first use: one pass over the training tokens.
        """
        counts = np.zeros(self.vocab_size, dtype=np.int64)
        for first in range(0, len(self.train_tokens), ENTROPY_CHUNK):
            counts += np.bincount(self.train_tokens[first : first + ENTROPY_CHUNK], minlength=self.vocab_size)
        frequency = counts[counts > 0] / len(self.train_tokens)
        return float(-(frequency * np.log(frequency)).sum())

    def _samples(self, tokens: Tokens, starts: list[int]) -> dict[str, Tensor]:
        """Copy the samples at ``starts`` out of ``tokens``: targets are the tokens one position later."""
        batch = np.empty((2, len(starts), self.block_size), dtype=np.int64)
        for row, start in enumerate(starts):
            sample = tokens[start : start + self.block_size + 1]
            batch[0, row], batch[1, row] = sample[:-1], sample[1:]
        both = torch.from_numpy(batch)
        return {"tokens": both[0], "targets": both[1]}


def kinds() -> list[str]:
    """Names that ``kind:`` may take in conf/data."""
    return registry.kinds(__name__)


def load(kind: str) -> ModuleType:
    """The module of one kind, with its ``Config`` and ``build``. ValueError (did you mean ...) for an unknown one."""
    return registry.load(__name__, kind)

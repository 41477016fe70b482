"""Training data in numpy, one source a file. A new file here is a new ``kind`` for the YAMLs of conf/data.

Such a file holds ``INPUT`` (the kind of its samples, ``tokens`` or ``images``, which must match the model's), a
dataclass ``Config`` and ``build(config)``, which returns a :class:`Dataset`.

The order of training samples is a function of (seed, step) alone: none of it is saved, and a run can resume at
any step on any number of processes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mptrain.tools import registry

Batch = dict[str, Tensor]


class Tokens(Protocol):
    """A one-dimensional run of tokens: an array, a memory map, or several of them addressed as one."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: slice, /) -> npt.NDArray[Any]: ...


class Dataset(ABC):
    """The order of samples, in one place; a subclass defines a sample.

    ``unit``: what throughput counts; ``fingerprint``: SHA-256 (hex) of the content and its split, losses compare only
    within one.
    """

    unit: ClassVar[str]
    name: str
    fingerprint: str

    @property
    @abstractmethod
    def units_per_sample(self) -> int: ...

    @property
    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """Settings of a model that the data decides, by their names in the model's Config."""

    @property
    @abstractmethod
    def train_positions(self) -> int:
        """The number of distinct training samples."""

    @property
    @abstractmethod
    def validation_samples(self) -> int:
        """The number of validation samples that do not overlap."""

    @abstractmethod
    def describe(self) -> str:
        """Describe kind and size in a few words for the terminal."""

    @abstractmethod
    def train_at(self, positions: list[int]) -> Batch:
        """Return the training samples at these positions, as the model's forward takes them."""

    @abstractmethod
    def validation_at(self, samples: list[int]) -> Batch:
        """Return the validation samples with these numbers, likewise."""

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
    ) -> Batch:
        """Return the samples of one micro-batch on one process.

        A step draws microbatches * world_size * batch_size positions from Philox keyed on (seed, step), and
        (micro, rank) takes its slice: the step's samples are the same however they are split.
        """
        if not (0 <= micro < microbatches and 0 <= rank < world_size and batch_size > 0):
            raise ValueError(f"no micro-batch {micro} of {microbatches} on rank {rank} of {world_size} x {batch_size}")
        if seed < 0 or step < 0:
            raise ValueError(f"seed={seed} and step={step} must not be negative; try seed=0")
        first = (micro * world_size + rank) * batch_size
        # Raw words: numpy guarantees their stream, unlike that of integers(). Modulo's bias: 2^-30 at 2^34 tokens.
        words = np.random.Philox(key=[seed, step]).random_raw(microbatches * world_size * batch_size)
        positions = words[first : first + batch_size] % np.uint64(self.train_positions)
        return self.train_at(positions.tolist())

    def validation(self, batch_size: int, batches: int) -> Iterator[Batch]:
        """Yield up to ``batches`` batches of evenly spaced samples without overlap: the same in every run, whatever
        the seed.

        A split with fewer samples than asked for gives the whole batches it has, or one smaller batch of all.
        """
        available = self.validation_samples
        batch_size = min(batch_size, available)
        batches = min(batches, available // batch_size)
        count = batches * batch_size
        samples = [i * available // count for i in range(count)]
        for first in range(0, count, batch_size):
            yield self.validation_at(samples[first : first + batch_size])


@dataclass(frozen=True, eq=False)
class TokenDataset(Dataset):
    """Training and validation tokens, cut into samples of ``block_size`` tokens and as many targets.

    A batch is ``tokens`` and ``targets``, both int64 [batch_size, block_size]. ValueError when a split is too short for
    a single sample.
    """

    unit: ClassVar[str] = "tokens"

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

    @property
    def units_per_sample(self) -> int:
        return self.block_size

    @property
    def sizes(self) -> dict[str, int]:
        return {"vocab_size": self.vocab_size}

    @property
    def train_positions(self) -> int:
        return len(self.train_tokens) - self.block_size

    @property
    def validation_samples(self) -> int:
        return (len(self.validation_tokens) - 1) // self.block_size

    def describe(self) -> str:
        return f"{self.name}, {(len(self.train_tokens) + len(self.validation_tokens)) / 1e6:.1f} M tokens"

    def train_at(self, positions: list[int]) -> Batch:
        return self._samples(self.train_tokens, positions)

    def validation_at(self, samples: list[int]) -> Batch:
        return self._samples(self.validation_tokens, [sample * self.block_size for sample in samples])

    def _samples(self, tokens: Tokens, starts: list[int]) -> Batch:
        """Copy the samples at ``starts`` out of ``tokens``: targets are the tokens one position later."""
        batch = np.empty((2, len(starts), self.block_size), dtype=np.int64)
        for row, start in enumerate(starts):
            sample = tokens[start : start + self.block_size + 1]
            batch[0, row], batch[1, row] = sample[:-1], sample[1:]
        both = torch.from_numpy(batch)
        return {"tokens": both[0], "targets": both[1]}


class Images(NamedTuple):
    """``images`` float32 [N, channels, size, size] with ``labels`` int64 [N], classes from 0."""

    images: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]

    def at(self, indices: list[int]) -> Batch:
        return {"images": torch.from_numpy(self.images[indices]), "labels": torch.from_numpy(self.labels[indices])}


@dataclass(frozen=True, eq=False)
class ImageDataset(Dataset):
    """Training and validation images with their classes.

    A batch is ``images``, float32 [batch_size, channels, size, size], and ``labels``, int64 [batch_size]. ValueError
    when a split has no image of some class.
    """

    unit: ClassVar[str] = "images"

    name: str
    train: Images
    held_out: Images
    classes: int
    fingerprint: str

    def __post_init__(self) -> None:
        for split, part in (("training", self.train), ("validation", self.held_out)):
            missing = sorted({*range(self.classes)} - {*part.labels.tolist()})
            if missing:
                raise ValueError(
                    f"{self.name}: no {split} image of class {missing[0]} among {len(part.labels)}; "
                    "try data.validation_frac=0.2, or choose larger data"
                )

    @property
    def units_per_sample(self) -> int:
        return 1

    @property
    def sizes(self) -> dict[str, int]:
        _, channels, _, size = self.train.images.shape
        return {"image_size": size, "channels": channels, "classes": self.classes}

    @property
    def train_positions(self) -> int:
        return len(self.train.labels)

    @property
    def validation_samples(self) -> int:
        return len(self.held_out.labels)

    def describe(self) -> str:
        shape = " x ".join(str(size) for size in self.train.images.shape[1:])
        counts = f"{self.train_positions:,} + {self.validation_samples:,}"
        return f"{self.name}, {counts} images of {shape} in {self.classes} classes"

    def train_at(self, positions: list[int]) -> Batch:
        return self.train.at(positions)

    def validation_at(self, samples: list[int]) -> Batch:
        return self.held_out.at(samples)


def require_share(kind: str, validation_frac: float, usual: float) -> None:
    """Raise ValueError unless both splits get part of the data."""
    if not 0.0 < validation_frac < 1.0:
        raise ValueError(
            f"{kind}: validation_frac={validation_frac} must be in (0, 1); try data.validation_frac={usual}"
        )


def kinds() -> list[str]:
    """Return the names that ``kind:`` may take in conf/data."""
    return registry.kinds(__name__)


def load(kind: str) -> ModuleType:
    """Return the module of one kind, with its ``Config`` and ``build``.

    ValueError (did you mean ...) for an unknown one.
    """
    return registry.load(__name__, kind)

"""Token shards on disk, tokenized elsewhere: nanoGPT's and llm.c's formats are read, llm.c's is written.

nanoGPT: 2-byte tokens and nothing else. llm.c: a header of 256 4-byte integers (magic, version, number of tokens), then
tokens of 2 bytes (GPT-2) or 4 bytes (Llama 3). Both are little-endian. Sources: nanoGPT's data/*/prepare.py and llm.c's
dev/data/data_common.py.
"""

from __future__ import annotations

import difflib
import glob
import hashlib
import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mptrain.data import TokenDataset
from mptrain.files import whole

INPUT = "tokens"
HEADER_BYTES = 256 * 4
NARROW, WIDE = "<u2", "<u4"
KINDS = {20240520: (1, NARROW), 20240801: (7, WIDE)}
"""llm.c's magic numbers: version, token type. Read as tokens they begin with 55432 and 55713, past GPT-2's 50256."""
SCAN_CHUNK = 1 << 22
"""Tokens checked at a time: 8 to 16 MB, whatever the size of the shard."""


@dataclass(frozen=True)
class Config:
    """``train``, ``validation``: a path or a pattern (``shards/train_*.bin``). ``vocab_size`` 0: largest token + 1."""

    train: str
    validation: str
    vocab_size: int = 0
    block_size: int = 0

    def __post_init__(self) -> None:
        if self.vocab_size < 0:
            raise ValueError(f"tokens: vocab_size={self.vocab_size}; try data.vocab_size=0, which looks at the tokens")


class Shards:
    """Several arrays of tokens addressed as one, without joining them: only what is read is copied."""

    def __init__(self, parts: Sequence[npt.NDArray[Any]]) -> None:
        self.parts = list(parts)
        self.ends = list(accumulate(len(part) for part in self.parts))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: slice) -> npt.NDArray[Any]:
        """Tokens ``start:stop`` (no step), as one array, over the border of a shard where it must."""
        start, stop, _ = index.indices(len(self))
        pieces = []
        number = bisect_right(self.ends, start)
        while start < stop:
            part, end = self.parts[number], self.ends[number]
            offset = end - len(part)
            pieces.append(part[start - offset : stop - offset])
            start, number = end, number + 1
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate(pieces) if pieces else self.parts[0][:0]


def build(config: Config) -> TokenDataset:
    """Open all shards and look at every token once: one pass over the files gives their range and the fingerprint."""
    train, validation = open_split("train", config.train), open_split("validation", config.validation)
    content = hashlib.sha256()
    largest = 0
    for split in (train, validation):
        digest, top = scan(split, config.vocab_size)
        content.update(digest)
        largest = max(largest, top)
    vocab_size = config.vocab_size or largest + 1
    joined, held_out = (Shards([tokens for _, tokens in split]) for split in (train, validation))
    return TokenDataset("tokens", joined, held_out, vocab_size, config.block_size, content.hexdigest())


def scan(split: list[tuple[str, npt.NDArray[Any]]], vocab_size: int) -> tuple[bytes, int]:
    """SHA-256 and largest token of a split. ValueError names the shard that has a token outside the vocabulary.

    The fingerprint does not depend on how the tokens are cut into shards, but on their width.
    """
    content = hashlib.sha256()
    largest = 0
    for path, tokens in split:
        for first in range(0, len(tokens), SCAN_CHUNK):
            chunk = tokens[first : first + SCAN_CHUNK]
            content.update(chunk.data)
            top = int(chunk.max())
            if 0 < vocab_size <= top:
                where = first + int(chunk.argmax())
                raise ValueError(
                    f"{path}: token {top} at position {where} is outside vocab_size={vocab_size}; "
                    f"set data.vocab_size={top + 1} or more"
                )
            largest = max(largest, top)
    return content.digest(), largest


def open_split(split: str, pattern: str) -> list[tuple[str, npt.NDArray[Any]]]:
    """All shards that ``pattern`` names, sorted by name. ValueError when there is none, with near names if any."""
    paths = [pattern] if os.path.isfile(pattern) else sorted(filter(os.path.isfile, glob.glob(pattern)))
    if paths:
        return [(path, open_shard(path)) for path in paths]
    folder, name = os.path.split(pattern)
    if not os.path.isdir(folder or "."):
        raise ValueError(f"data.{split}={pattern}: there is no folder {folder}")
    present = sorted(os.listdir(folder or "."))
    near = difflib.get_close_matches(name, present, n=3, cutoff=0.5) or [p for p in present if p.endswith(".bin")][:3]
    hint = f"; did you mean {', '.join(os.path.join(folder, found) for found in near)}?" if near else ""
    raise ValueError(f"data.{split}={pattern}: no such file{hint}")


def open_shard(path: str) -> npt.NDArray[Any]:
    """One shard, memory-mapped. ValueError when it was cut short or is no shard."""
    size = os.path.getsize(path)
    header = np.fromfile(path, "<i4", count=3)
    if len(header) == 3 and int(header[0]) in KINDS:
        version, width = KINDS[int(header[0])]
        if header[1] != version:
            raise ValueError(
                f"{path}: header version {header[1]} is not {version}, the one known; write the shard anew"
            )
        count, expected = int(header[2]), HEADER_BYTES + int(header[2]) * np.dtype(width).itemsize
        if size != expected:
            raise ValueError(
                f"{path}: the header promises {count} tokens, {expected} bytes, and the file has {size}: "
                "it was cut short or is still being written; copy or write it again"
            )
        return np.memmap(path, width, "r", offset=HEADER_BYTES) if count else np.empty(0, width)
    if size == 0 or size % 2:
        raise ValueError(f"{path}: {size} bytes are not a whole number of 2-byte tokens; copy or write it again")
    return np.memmap(path, NARROW, "r")


def write_shard(path: str | Path, tokens: npt.ArrayLike) -> None:
    """Write one-dimensional ``tokens`` as an llm.c shard, whole or not at all; 4 bytes each only if one needs them."""
    array = np.asarray(tokens)
    if array.ndim != 1 or array.size == 0 or array.dtype.kind not in "iu" or array.min() < 0 or array.max() >= 2**32:
        raise ValueError(
            f"{path}: tokens must be a list of integers from 0 to 2^32 - 1, not {array.dtype} {array.shape}"
        )
    magic = 20240520 if array.max() < 2**16 else 20240801
    version, width = KINDS[magic]
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, array.size
    with whole(Path(path)) as file:
        file.write(header.tobytes())
        file.write(array.astype(width, order="C").data)

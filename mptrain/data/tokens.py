"""Token shards on disk, tokenized elsewhere: nanoGPT's and llm.c's formats are read, llm.c's is written.

nanoGPT: 2-byte tokens and nothing else. llm.c: a header of 256 4-byte integers (magic, version, number of
tokens), then tokens of 2 bytes (GPT-2) or 4 bytes (Llama 3). Both are little-endian; numpy's .npy files are read
too, and other files are rejected (:mod:`mptrain.data._token_files`). Sources: nanoGPT's data/*/prepare.py and
llm.c's dev/data/data_common.py.
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
from mptrain.data._token_files import DTYPES, KINDS, open_shard
from mptrain.tools.files import whole

INPUT = "tokens"
SCAN_CHUNK = 1 << 22
"""Tokens checked at a time: 8 to 16 MB, whatever the size of the shard."""


@dataclass(frozen=True)
class Config:
    """``train``, ``validation``: a path or a pattern (``shards/train_*.bin``). ``vocab_size`` 0: largest token + 1.

    ``dtype``: of files without a header, uint16 or uint32; auto: uint16, if they look like it.
    """

    train: str
    validation: str
    vocab_size: int = 0
    block_size: int = 0
    dtype: str = "auto"

    def __post_init__(self) -> None:
        if self.vocab_size < 0:
            raise ValueError(f"tokens: vocab_size={self.vocab_size}; try data.vocab_size=0, which looks at the tokens")
        if self.dtype not in DTYPES:
            raise ValueError(f"tokens: data.dtype={self.dtype} is unknown; set data.dtype=auto, uint16 or uint32")


class Shards:
    """Several arrays of tokens addressed as one, without joining them: only the requested part is copied."""

    def __init__(self, parts: Sequence[npt.NDArray[Any]]) -> None:
        self.parts = list(parts)
        self.ends = list(accumulate(len(part) for part in self.parts))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: slice) -> npt.NDArray[Any]:
        """Return tokens ``start:stop`` (no step) as one array, across shards where necessary."""
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
    train, validation = (open_split(name, getattr(config, name), config.dtype) for name in ("train", "validation"))
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
    """Return SHA-256 and largest token of a split. ValueError names the shard that has a token outside the vocabulary.

    The fingerprint does not depend on how the tokens are cut into shards, but on their width.
    """
    content = hashlib.sha256()
    largest = 0
    for path, tokens in split:
        for first in range(0, len(tokens), SCAN_CHUNK):
            chunk = tokens[first : first + SCAN_CHUNK]
            content.update(np.ascontiguousarray(chunk, chunk.dtype.newbyteorder("<")).data)
            top = int(chunk.max())
            if chunk.dtype.kind == "i" and chunk.min() < 0:
                raise ValueError(f"{path}: token {int(chunk.min())} is negative; write the tokens again, from 0 on")
            if 0 < vocab_size <= top:
                raise ValueError(f"{path}: {_outside(chunk, first, vocab_size)}")
            largest = max(largest, top)
    return content.digest(), largest


def _outside(chunk: npt.NDArray[Any], first: int, vocab_size: int) -> str:
    """Explain why tokens are outside the vocabulary."""
    top, where = int(chunk.max()), first + int(chunk.argmax())
    if int(chunk.byteswap().max()) < vocab_size:
        return (
            f"token {top} at position {where} is outside vocab_size={vocab_size}, and with its bytes swapped every "
            "token is inside: write the file again in the other byte order"
        )
    outside = float((chunk >= vocab_size).mean())
    if outside > 0.05 and top >= 50257:
        return (
            f"{outside:.0%} of its tokens are outside vocab_size={vocab_size}: it is of a larger vocabulary "
            "(data.vocab_size), of another width (data.dtype=uint16 or uint32), or not tokens"
        )
    return f"token {top} at position {where} is outside vocab_size={vocab_size}; set data.vocab_size={top + 1} or more"


def open_split(split: str, pattern: str, dtype: str = "auto") -> list[tuple[str, npt.NDArray[Any]]]:
    """Return all shards that ``pattern`` names, sorted by name.

    ValueError when there is none, with near names if any.
    """
    paths = [pattern] if os.path.isfile(pattern) else sorted(filter(os.path.isfile, glob.glob(pattern)))
    if paths:
        return [(path, open_shard(path, dtype)) for path in paths]
    folder, name = os.path.split(pattern)
    if not os.path.isdir(folder or "."):
        raise ValueError(f"data.{split}={pattern}: there is no folder {folder}")
    present = sorted(os.listdir(folder or "."))
    near = difflib.get_close_matches(name, present, n=3, cutoff=0.5) or [p for p in present if p.endswith(".bin")][:3]
    hint = f"; did you mean {', '.join(os.path.join(folder, neighbour) for neighbour in near)}?" if near else ""
    raise ValueError(f"data.{split}={pattern}: no such file{hint}")


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

"""The Python standard library's own sources, as bytes: real text on every machine, with nothing to download.

Every .py file of the running interpreter except its tests: 12.1 MB in 733 files on Python 3.11, 3.23 nats per
byte without context. The text differs between versions of Python, so losses compare only within one
``fingerprint``. It is collected once into a cache ($MPTRAIN_CACHE, or $XDG_CACHE_HOME, or ~/.cache) and
memory-mapped from there.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mptrain.data import TokenDataset, require_share
from mptrain.tools.files import write_whole

INPUT = "tokens"
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
"""Folders left out at any depth: installed packages, which differ by machine, and tests, 19 of the 31 MB on 3.11."""
SALT = "mptrain/"
"""Hashed before each path. Without it, pydoc_data/topics.py, 757 KB and no code, was 43 % of the validation split."""
SPLITS = ("train", "validation")
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Config:
    """``block_size`` 0: the model's. ``root``: another folder of .py files than the standard library's."""

    block_size: int = 0
    cache_dir: str | None = None
    validation_frac: float = 0.1
    root: str | None = None

    def __post_init__(self) -> None:
        require_share("stdlib", self.validation_frac, 0.1)


def build(config: Config) -> TokenDataset:
    """Build the corpus, or read it from the cache if the files are unchanged. ValueError without source files."""
    root = Path(config.root or sysconfig.get_path("stdlib"))
    files = sources(root)
    if not files:
        raise ValueError(f"stdlib: no .py file in {root}; this Python ships none: try data=tokens")
    stamps = [(path, os.stat(root / path)) for path in files]
    listing = [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stamps]
    identity = json.dumps([platform.python_version(), SALT, str(root), config.validation_frac, listing])
    folder = cache_root(config) / "mptrain" / "data" / hashlib.sha256(identity.encode()).hexdigest()[:20]
    arrays = read_cache(folder)
    if arrays is None:
        arrays = collect(root, files, config.validation_frac)
        arrays = (read_cache(folder) or arrays) if write_cache(folder, arrays) else arrays
    train, validation = arrays
    fingerprint = hashlib.sha256((digest(train) + digest(validation)).encode()).hexdigest()
    return TokenDataset("stdlib", train, validation, 256, config.block_size, fingerprint)


def sources(root: Path) -> list[str]:
    """Return the paths of the corpus's files relative to ``root``, with slashes, sorted."""
    paths = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED]
        # _sysconfigdata*.py records how this interpreter was built: a machine's paths, not library text.
        sources_here = (name for name in names if name.endswith(".py") and not name.startswith("_sysconfigdata"))
        paths += [(Path(folder) / name).relative_to(root).as_posix() for name in sources_here]
    return sorted(paths)


def in_validation(path: str, fraction: float) -> bool:
    """Return whether a file is held out.

    Only a hash of its relative path decides, so adding a file moves no other.
    """
    return int.from_bytes(hashlib.sha256((SALT + path).encode()).digest()[:8]) < fraction * 2**64


def collect(root: Path, files: list[str], fraction: float) -> tuple[Bytes, Bytes]:
    """Read all files and join each split's bytes in the order of ``files``."""
    parts: dict[bool, list[bytes]] = {False: [], True: []}
    for path in files:
        parts[in_validation(path, fraction)].append((root / path).read_bytes())
    train, validation = (np.frombuffer(b"".join(parts[held_out]), np.uint8) for held_out in (False, True))
    return train, validation


def digest(content: Bytes) -> str:
    """Return SHA-256 (hex) of an array's bytes: 10 ms for this corpus with the processor's SHA instructions, 30 ms
    without."""
    return hashlib.sha256(content.data).hexdigest()


def cache_root(config: Config) -> Path:
    """Return the folder that caches live in; it need not exist."""
    named = config.cache_dir or os.environ.get("MPTRAIN_CACHE") or os.environ.get("XDG_CACHE_HOME")
    return Path(os.path.expanduser(named or "~/.cache"))


def read_cache(folder: Path) -> tuple[Bytes, Bytes] | None:
    """Return the two splits, memory-mapped; None when anything is missing or is not what the manifest says (torn,
    damaged)."""
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        train, validation = (np.memmap(folder / f"{split}.bin", np.uint8, "r") for split in SPLITS)
        whole = manifest == {"train": digest(train), "validation": digest(validation)}
    except (OSError, ValueError):
        return None
    return (train, validation) if whole else None


def write_cache(folder: Path, arrays: tuple[Bytes, Bytes]) -> bool:
    """Store both splits, then the manifest with their hashes. Return False if the disk refuses; the corpus stays in
    memory.

    Each file is written atomically, and two processes write the same bytes, so neither can break the other.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for split, content in zip(SPLITS, arrays, strict=True):
            write_whole(folder / f"{split}.bin", content.tobytes())
        manifest = dict(zip(SPLITS, map(digest, arrays), strict=True))
        write_whole(folder / "manifest.json", json.dumps(manifest).encode())
    except OSError:
        return False
    return True

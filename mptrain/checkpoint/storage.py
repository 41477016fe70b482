"""A checkpoint on disk, by way of ``torch.distributed.checkpoint``: a folder of safetensors and one JSON.

Each rank writes the parts it was planned to (``rank-00000.safetensors``), the first one then ``checkpoint.json``: where
each part of each tensor is, the size and CRC32 of every file and of itself, and what is not a tensor. Nothing in it is
executed: DCP's own storage keeps its plan in a pickle. The folder gets its name when all is on disk, so what has a name
is whole unless something broke it later, which the CRCs tell.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

HEAD = "checkpoint.json"
VERSION = 2
PARTIAL = "partial-"  # before the name of a folder that is being written or removed
OLD = "old-"  # before the name of one that is being replaced
READ_BYTES = 1 << 24


class Planner(DefaultSavePlanner):
    """Plans by the tensors to save; what is written in their place is ``held``, a plain tensor by name."""

    def __init__(self, held: dict[str, Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._held = held

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self._held[index.fqn]


class _Plain:
    """Methods that DCP asks for and ours has no use for: an address, changes to a rank's plan."""

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True

    def prepare_local_plan(self, plan: Any) -> Any:
        return plan


class Writer(_Plain, StorageWriter):
    """Writes beside ``folder`` and renames. ``head``: JSON to travel with the tensors, which are at least ``names``."""

    def __init__(self, folder: Path, head: dict[str, Any], names: set[str]) -> None:
        self.folder, self._head, self._names = folder, head, names
        self._desk = folder.with_name(PARTIAL + folder.name)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if is_coordinator:
            with self._told():
                tidy(self.folder.parent)
                self._desk.mkdir(parents=True)

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [replace(plan, storage_data=rank) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """This rank's parts, in one file that is on disk when this returns. OSError if they cannot be written."""
        name = f"rank-{plan.storage_data:05d}.safetensors"
        parts = {_key(item): planner.resolve_data(item) for item in plan.items}
        path = self._desk / name
        with self._told():
            save_file(_apart(parts), path)
            flush(path)
            described = (name, path.stat().st_size, crc32(path))
        done: Future[list[WriteResult]] = Future()
        results = [WriteResult(item.index, 0, (described, _key(item))) for item in plan.items]
        done.set_result(results or [WriteResult(MetadataIndex(""), 0, (described, ""))])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the JSON, then the folder's name, on the first rank, when all have written."""
        placed = {(r.index.fqn, tuple(r.index.offset or ())): r.storage_data for part in results for r in part}
        files = {described[0]: described[1:] for described, _ in placed.values()}
        tensors = {}
        for name, about in metadata.state_dict_metadata.items():
            assert isinstance(about, TensorStorageMetadata), name
            chunks = []
            for chunk in about.chunks:
                described, key = placed[name, tuple(chunk.offsets)]
                chunks.append([list(chunk.offsets), list(chunk.sizes), described[0], key])
            tensors[name] = {"dtype": str(about.properties.dtype)[6:], "shape": list(about.size), "chunks": chunks}
        assert tensors.keys() >= self._names, f"no rank wrote {sorted(self._names - tensors.keys())}"
        with self._told():
            (self._desk / HEAD).write_bytes(_framed({**self._head, "tensors": tensors, "files": files}))
            flush(self._desk / HEAD)
            flush(self._desk)
            self._give_name()

    def _give_name(self) -> None:
        old = self.folder.with_name(OLD + self.folder.name)
        if self.folder.exists():  # the same step again: a run that went back
            os.replace(self.folder, old)
        try:
            os.replace(self._desk, self.folder)
        except OSError:
            if old.exists():
                os.replace(old, self.folder)
            raise
        flush(self.folder.parent)
        discard(old)

    def give_up(self) -> None:
        """Remove what was written, when all ranks have stopped writing."""
        shutil.rmtree(self._desk, ignore_errors=True)

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except (SafetensorError, OSError) as error:
            raise OSError(
                f"checkpoint {self.folder} could not be written: {error}; older ones are untouched"
            ) from error


class Reader(_Plain, StorageReader):
    """Reads a folder that :class:`Writer` made, only the parts that a rank asks for. ``head``: of :func:`read_head`."""

    def __init__(self, folder: Path, head: dict[str, Any]) -> None:
        self._folder, self._head = folder, head

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        known: dict[str, Any] = {}
        places: dict[MetadataIndex, tuple[str, str]] = {}
        for name, about in self._head["tensors"].items():
            chunks = []
            for offsets, sizes, file, key in about["chunks"]:
                chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
                places[MetadataIndex(name, torch.Size(offsets))] = (file, key)
            properties = TensorProperties(dtype=getattr(torch, about["dtype"]))
            known[name] = TensorStorageMetadata(properties, torch.Size(about["shape"]), chunks)
        return Metadata(known, storage_data=places)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self._places: dict[MetadataIndex, tuple[str, str]] = metadata.storage_data

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        wanted: dict[str, list[tuple[str, Any]]] = {}
        for item in plan.items:
            file, key = self._places[item.storage_index]
            wanted.setdefault(file, []).append((key, item))
        for file, items in wanted.items():
            with _opened(self._folder, file) as held:
                for key, item in items:
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(_part(held, key, item.storage_offsets, item.lengths).view(target.shape))
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done


def tidy(parent: Path) -> None:
    """After processes killed while they saved: remove what they had begun, give its name back to what was not replaced.

    Only for the process that writes the checkpoints in ``parent``.
    """
    for old in parent.glob(f"{OLD}step-*"):
        named = old.with_name(old.name.removeprefix(OLD))
        if named.exists():
            discard(old)
        else:
            os.replace(old, named)
    for torn in parent.glob(f"{PARTIAL}*"):
        shutil.rmtree(torn, ignore_errors=True)


def discard(path: Path) -> None:
    """Remove a folder; no half of it keeps its name."""
    doomed = path.with_name(PARTIAL + path.name)
    with suppress(OSError):  # not there, or not ours to remove
        os.replace(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def is_ours(path: Path) -> bool:
    """Tell whether it is a folder that :class:`Writer` made, whole or not."""
    return (path / HEAD).is_file() or any(path.glob("rank-*.safetensors"))


def read_head(folder: Path) -> dict[str, Any]:
    """Read ``checkpoint.json``. ValueError if it is missing, changed, or not one of ours."""
    if not is_ours(folder):
        raise ValueError(_why_not(folder))
    try:
        content = (folder / HEAD).read_bytes()
        head = json.loads(content)
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(folder, f"{HEAD}: {error}") from error
    version = head.get("mptrain") if isinstance(head, dict) else None
    if isinstance(version, int) and version > VERSION:
        raise ValueError(f"checkpoint {folder} is of version {version}, this mptrain reads {VERSION}: update mptrain")
    if version != VERSION:
        raise ValueError(f"{folder} is not a checkpoint of mptrain (version {VERSION}): give one written by a run")
    known = {name: value for name, value in head.items() if name not in ("mptrain", "crc32")}
    if content != _framed(known):
        raise _damaged(folder, f"the CRC of {HEAD} is wrong")
    return known


def _why_not(path: Path) -> str:
    if path.is_file():
        ours = f"{path} is not a checkpoint of mptrain, which is a folder: give one written by a run"
        return older(path) if is_older(path) else ours
    return f"no checkpoint at {path}: set resume=auto with run_dir, or the path of a checkpoint"


def is_older(path: Path) -> bool:
    """Tell whether it is a checkpoint of version 1, a single file."""
    try:
        with safe_open(path, framework="pt") as file:
            return "mptrain" in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def older(path: Path) -> str:
    return (
        f"checkpoint {path} was written by an older mptrain (version 1), whose attention weights have another order: "
        "continue with that mptrain, or start in another run_dir"
    )


def _damaged(folder: Path, why: str) -> ValueError:
    return ValueError(f"checkpoint {folder} is damaged: {why}: resume=auto takes the one before")


def _framed(head: dict[str, Any]) -> bytes:
    """The content of ``checkpoint.json``: the version and the CRC32 of all that follows, then ``head``."""
    body = json.dumps(head)[1:].encode()
    return b'{"mptrain": %d, "crc32": %d,\n%b' % (VERSION, zlib.crc32(body), body)


def verify(folder: Path, rank: int = 0, size: int = 1) -> None:
    """ValueError, naming the file, if one is missing, cut short or changed. Of ``size`` ranks each reads its part."""
    for number, (name, (n_bytes, crc)) in enumerate(sorted(read_head(folder)["files"].items())):
        if number % size != rank:
            continue
        try:
            found = (folder / name).stat().st_size
            if found != n_bytes:
                raise _damaged(folder, f"{name} has {found} bytes, not {n_bytes}")
            if crc32(folder / name) != crc:
                raise _damaged(folder, f"the CRC of {name} is wrong")
        except OSError as error:
            raise _damaged(folder, f"{name}: {error}") from error


def whole_tensors(folder: Path) -> Iterator[tuple[str, str, Tensor]]:
    """(name, dtype, tensor) of everything in a checkpoint, one in memory at a time, put together of its parts.

    ValueError, naming the file, if one is damaged.
    """
    verify(folder)
    for name, about in read_head(folder)["tensors"].items():
        whole = torch.empty(about["shape"], dtype=getattr(torch, about["dtype"]))
        for offsets, sizes, file, key in about["chunks"]:
            place = tuple(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))
            with _opened(folder, file) as held:
                whole[place] = held.get_tensor(key)
        yield name, about["dtype"], whole


@contextmanager
def _opened(folder: Path, file: str) -> Iterator[Any]:
    """ValueError that names the file if it was removed or changed since it was verified."""
    try:
        with safe_open(folder / file, framework="pt") as held:
            yield held
    except (SafetensorError, OSError) as error:
        raise _damaged(folder, f"{file}: {error}") from error


def crc32(path: Path) -> int:
    """Return the CRC32 of a whole file, read in pieces of 16 MiB."""
    crc = 0
    with path.open("rb") as file:
        while piece := file.read(READ_BYTES):
            crc = zlib.crc32(piece, crc)
    return crc


def flush(path: Path) -> None:
    """Ask the system to put a file or folder on disk before it is relied on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _key(item: WriteItem) -> str:
    """The name of a part in its file: the tensor's, with the offset if it is not all of it."""
    data = item.tensor_data
    assert data is not None, f"{item.index.fqn} is not a tensor"
    if tuple(data.chunk.sizes) == tuple(data.size) and "@" not in item.index.fqn:
        return item.index.fqn
    return f"{item.index.fqn}@{','.join(map(str, data.chunk.offsets))}"


def _part(held: Any, key: str, offsets: Any, lengths: Any) -> Tensor:
    if len(lengths) == 0:
        return held.get_tensor(key)  # type: ignore[no-any-return]
    place = tuple(slice(at, at + length) for at, length in zip(offsets, lengths, strict=True))
    return held.get_slice(key)[place]  # type: ignore[no-any-return]


def _apart(tensors: dict[str, Any]) -> dict[str, Tensor]:
    """safetensors refuses tensors that overlap in memory (views of one buffer): all but the first are copied."""
    held: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if storage in held else tensor
        held.add(storage)
    return apart

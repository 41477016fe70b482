"""A checkpoint on disk, written and read through ``torch.distributed.checkpoint``: a folder of safetensors and a JSON.

Each rank writes the parts it was planned to (``rank-00000.safetensors``), the first one then ``checkpoint.json``: where
each part of each tensor is, the size and CRC32 of every file, and what is no tensor. Nothing in it is executed: DCP's own
storage keeps its plan in a pickle. The folder gets its name when all is on disk, so what has a name is whole unless
something broke it later, which the CRCs tell.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint import StorageReader, StorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

HEAD = "checkpoint.json"
VERSION = 2
READ_BYTES = 1 << 24


class Writer(StorageWriter):
    """Writes ``desk`` and renames it to ``folder``. ``head``: JSON to travel with the tensors."""

    def __init__(self, folder: Path, head: dict[str, Any]) -> None:
        self._folder, self._head = folder, head
        self._desk = folder.with_name(f"partial-{folder.name}")

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if is_coordinator:
            shutil.rmtree(self._desk, ignore_errors=True)  # of a process killed while it saved

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        self._desk.mkdir(parents=True, exist_ok=True)
        return [replace(plan, storage_data=rank) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """This rank's parts, in one file that is on disk when this returns. OSError if they cannot be written."""
        name = f"rank-{plan.storage_data:05d}.safetensors"
        parts = {_key(item): planner.resolve_data(item) for item in plan.items}
        path = self._desk / name
        try:
            save_file(_apart(parts), path)  # type: ignore[arg-type]
            flush(path)
        except (SafetensorError, OSError) as error:
            shutil.rmtree(self._desk, ignore_errors=True)
            raise OSError(
                f"checkpoint {self._folder} could not be written: {error}; older ones are untouched"
            ) from error
        described = (name, path.stat().st_size, crc32(path))
        done: Future[list[WriteResult]] = Future()
        results = [WriteResult(item.index, 0, (described, _key(item))) for item in plan.items]
        done.set_result(results or [WriteResult(MetadataIndex(""), 0, (described, ""))])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the first rank, when all have written: the JSON, then the folder's name."""
        placed = {(r.index.fqn, tuple(r.index.offset or ())): r.storage_data for part in results for r in part}
        files = {described[0]: described[1:] for described, _ in placed.values()}
        tensors = {}
        for name, about in metadata.state_dict_metadata.items():
            assert isinstance(about, TensorStorageMetadata), name
            chunks = []
            for chunk in about.chunks:
                described, key = placed[name, tuple(chunk.offsets)]
                chunks.append([list(chunk.offsets), list(chunk.sizes), described[0], key])
            dtype = str(about.properties.dtype).removeprefix("torch.")
            tensors[name] = {"dtype": dtype, "shape": list(about.size), "chunks": chunks}
        head = {"mptrain": VERSION, **self._head, "tensors": tensors, "files": files}
        try:
            (self._desk / HEAD).write_text(json.dumps(head))
            flush(self._desk / HEAD)
            flush(self._desk)
            if self._folder.exists():  # the same step again: a run that went back
                os.replace(self._folder, self._folder.with_name(f"old-{self._folder.name}"))
            os.replace(self._desk, self._folder)
        except OSError as error:
            shutil.rmtree(self._desk, ignore_errors=True)
            raise OSError(
                f"checkpoint {self._folder} could not be written: {error}; older ones are untouched"
            ) from error
        shutil.rmtree(self._folder.with_name(f"old-{self._folder.name}"), ignore_errors=True)
        flush(self._folder.parent)


class Reader(StorageReader):
    """Reads a folder that :class:`Writer` made, only the parts that a rank asks for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        known: dict[str, Any] = {}
        places: dict[MetadataIndex, tuple[str, str]] = {}
        for name, about in read_head(self._folder)["tensors"].items():
            chunks = []
            for offsets, sizes, file, key in about["chunks"]:
                chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
                places[MetadataIndex(name, torch.Size(offsets))] = (file, key)
            properties = TensorProperties(dtype=getattr(torch, about["dtype"]))
            known[name] = TensorStorageMetadata(properties, torch.Size(about["shape"]), chunks)
        return Metadata(known, storage_data=places)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self._places: dict[MetadataIndex, tuple[str, str]] = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        wanted: dict[str, list[tuple[str, Any]]] = {}
        for item in plan.items:
            file, key = self._places[item.storage_index]
            wanted.setdefault(file, []).append((key, item))
        for file, items in wanted.items():
            with safe_open(self._folder / file, framework="pt") as opened:
                for key, item in items:
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(_part(opened, key, item.storage_offsets, item.lengths).view(target.shape))
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done


def read_head(folder: Path) -> dict[str, Any]:
    """What ``checkpoint.json`` holds. ValueError if it is missing, torn, or not one of ours."""
    try:
        head = json.loads((folder / HEAD).read_text())
    except FileNotFoundError:
        raise ValueError(
            f"no checkpoint at {folder}: set resume=auto with run_dir, or the path of a checkpoint"
        ) from None
    except (OSError, ValueError) as error:
        raise ValueError(
            f"checkpoint {folder} is damaged ({HEAD}: {error}): resume=auto takes the one before"
        ) from error
    if not isinstance(head, dict) or head.get("mptrain") != VERSION:
        raise ValueError(f"{folder} is not a checkpoint of mptrain (version {VERSION}): give one written by a run")
    return head


def verify(folder: Path, rank: int = 0, size: int = 1) -> None:
    """ValueError, naming the file, if one is missing, cut short or changed. Of ``size`` ranks each looks at its part."""
    for number, (name, (n_bytes, crc)) in enumerate(sorted(read_head(folder)["files"].items())):
        if number % size != rank:
            continue
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != n_bytes:
            held = "is missing" if found is None else f"has {found} of its {n_bytes} bytes"
            raise ValueError(f"checkpoint {folder} is damaged: {name} {held}: resume=auto takes the one before")
        if crc32(path) != crc:
            raise ValueError(
                f"checkpoint {folder} is damaged: the CRC of {name} is wrong: resume=auto takes the one before"
            )


def whole_tensors(folder: Path) -> Iterator[tuple[str, str, Tensor]]:
    """(name, dtype, tensor) of everything in a checkpoint, one in memory at a time, put together of its parts."""
    for name, about in read_head(folder)["tensors"].items():
        whole = torch.empty(about["shape"], dtype=getattr(torch, about["dtype"]))
        for offsets, sizes, file, key in about["chunks"]:
            with safe_open(folder / file, framework="pt") as opened:
                place = tuple(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))
                whole[place] = opened.get_tensor(key)
        yield name, about["dtype"], whole


def crc32(path: Path) -> int:
    """Of a whole file, read in pieces of 16 MiB."""
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
    assert data is not None, f"{item.index.fqn} is no tensor"
    if tuple(data.chunk.sizes) == tuple(data.size):
        return item.index.fqn
    return f"{item.index.fqn}@{','.join(map(str, data.chunk.offsets))}"


def _part(opened: Any, key: str, offsets: Any, lengths: Any) -> Tensor:
    if len(lengths) == 0:
        whole: Tensor = opened.get_tensor(key)
        return whole
    place = tuple(slice(at, at + length) for at, length in zip(offsets, lengths, strict=True))
    part: Tensor = opened.get_slice(key)[place]
    return part


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

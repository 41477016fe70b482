"""Checkpoints: a folder for each saved step, holding a dict of named Stateful parts (:mod:`mptrain.storage`).

Tensors go through ``torch.distributed.checkpoint``, so each rank writes what it holds and a run may go on with another
number of ranks or another layout; everything else is JSON. Saving in the background copies the state first (that is all
training waits for) and writes the copy in a thread. A kill or a full disk leaves the checkpoints before as they were.
Tied tensors are stored once.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from mptrain import storage
from mptrain.distributed import ALONE, Ranks, like, local

FLOATING = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")  # of safetensors, with a torch dtype to compute from
NAME = re.compile(r"step-(\d{8})")
Like = Callable[
    [str, list[int]], Tensor | None
]  # name and shape of a stored tensor -> one that is sharded as it shall be


class Stateful(Protocol):
    """A part of a run that can be saved and continued."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Any) -> Any: ...


class Checkpoints:
    """The checkpoints of one run folder; the newest ``keep`` stay. With several ranks every method is a collective.

    ``passed_over``: why :meth:`newest` did not take a newer one.
    """

    def __init__(self, folder: Path, keep: int, ranks: Ranks = ALONE, *, background: bool = False) -> None:
        self.folder, self.keep = folder, keep
        self.passed_over: list[str] = []
        self._ranks, self._background = ranks, background
        self._group = dist.new_group(backend="gloo") if ranks.size > 1 else None  # not that of the gradients
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._copies: dict[str, Tensor] = {}  # made once: fresh memory costs page faults

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def newest(self) -> Path | None:
        """The newest whole checkpoint: a damaged one (torn file, flipped byte) is passed over."""
        self.passed_over = []
        for path in self._ranks.share(sorted(self._existing(), reverse=True)):
            faults = [fault for fault in self._ranks.gather(_verified(path, self._ranks)) if fault]
            if not faults:
                return Path(path)
            self.passed_over += faults[:1]
        return None

    def save(
        self, step: int, parts: dict[str, Stateful], about: dict[str, Any], own: dict[str, Stateful] | None = None
    ) -> Path:
        """Write the parts as they are now. ``about`` (JSON) travels beside them: policy, fingerprint, step. ``own``:
        parts that differ by rank.

        OSError, with the path, if the disk is full or the folder cannot be written, now or (in the background) from the
        next call or :meth:`wait`; nothing saved before is touched.
        """
        self.wait()
        tensors: dict[str, Tensor] = {}
        tree = {name: _split(part.state_dict(), name, tensors, {}) for name, part in parts.items()}
        rank = self._ranks.rank
        mine = {
            name: _split(part.state_dict(), f"rank{rank}/{name}", tensors, {}) for name, part in (own or {}).items()
        }
        head = {"about": about, "tree": tree, "ranks": self._ranks.gather(mine)}
        path = self.path(step)
        if not self._background:
            self._write(path, head, tensors)
            return path
        copies = self._copied(tensors)
        self._thread = threading.Thread(target=self._write_aside, args=(path, head, copies), daemon=True)
        self._thread.start()
        return path

    def wait(self) -> None:
        """Until what is being written is on disk."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _copied(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for name, tensor in tensors.items():
            held = local(tensor.detach())
            copy = self._copies.get(name)
            if copy is None or copy.shape != held.shape or copy.dtype != held.dtype:
                copy = self._copies[name] = torch.empty_like(held, device="cpu", memory_format=torch.contiguous_format)
            _copy(copy, held)
            found[name] = like(copy, tensor)
        return found

    def _write_aside(self, path: Path, head: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        try:
            self._write(path, head, tensors)
        except BaseException as error:  # told at the next save
            self._error = error

    def _write(self, path: Path, head: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        try:
            if self._ranks.first:
                self.folder.mkdir(parents=True, exist_ok=True)
            writer = storage.Writer(path, head)
            planner = dcp.DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
            with warnings.catch_warnings():  # that this is a single process
                warnings.simplefilter("ignore", UserWarning)
                alone = self._group is None
                dcp.save(tensors, storage_writer=writer, planner=planner, process_group=self._group, no_dist=alone)
        except CheckpointException as failed:
            rank, (error, _) = min(failed.failures.items())
            where = f" (rank {rank})" if self._ranks.size > 1 else ""
            if isinstance(error, OSError):
                raise OSError(f"{error}{where}") from None
            raise error from None
        if not self._ranks.first:
            return
        for old in sorted(self._existing())[: -self.keep]:
            if old != path:  # a run continued from an earlier step than the newest of the folder
                shutil.rmtree(old, ignore_errors=True)
        for torn in [
            *self.folder.glob("partial-*"),
            *self.folder.glob("old-*"),
        ]:  # of processes killed while they saved
            shutil.rmtree(torn, ignore_errors=True)

    def set_aside(self, step: int) -> None:
        """Rename what is newer than ``step``, of a run that goes on from there: another future of it, or damaged."""
        if self._ranks.first:
            for path in self._existing():
                if int(path.name.removeprefix("step-")) > step:
                    number = 1 + sum(1 for _ in self.folder.glob(f"aside-*-{path.name}"))
                    path.rename(path.with_name(f"aside-{number}-{path.name}"))
        self._ranks.barrier()

    def _existing(self) -> list[Path]:
        return [path for path in self.folder.glob("step-*") if NAME.fullmatch(path.name)]


def _copy(target: Tensor, source: Tensor) -> None:
    """Of one shape and dtype. memcpy does not read what it overwrites: on a CPU 8.3 GB/s where torch's copy has 4.9."""
    if source.device.type == "cpu" and source.is_contiguous():
        ctypes.memmove(target.data_ptr(), source.data_ptr(), source.nbytes)
    else:
        target.copy_(source)


def read_about(path: Path) -> dict[str, Any]:
    """``about`` of a checkpoint. ValueError if it is missing, torn, or not one of ours."""
    about: dict[str, Any] = storage.read_head(path)["about"]
    return about


def require_fit(path: Path, model: nn.Module) -> None:
    """ValueError if the weights in a checkpoint are not those of ``model`` (it may be on meta), by name and shape."""
    wanted = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    stored = storage.read_head(path)["tensors"]
    shapes = {name.removeprefix("model/"): held["shape"] for name, held in stored.items() if name.startswith("model/")}
    for name, shape in shapes.items():
        if wanted.get(name) != shape:
            here = f"is {wanted[name]} in this model" if name in wanted else "is not in this model"
            raise ValueError(f"checkpoint {path} is of another model: {name} {shape} {here}; set model= as it was")


def is_ours(path: Path) -> bool:
    """Was this folder written by :class:`Checkpoints`?"""
    return (path / storage.HEAD).is_file()


def float_tensors(path: Path) -> Iterator[tuple[str, str, Tensor | None]]:
    """(name, dtype as the file says it, tensor) of each tensor of a checkpoint or of any safetensors file, one in memory
    at a time.

    None in place of a tensor that is not of a floating dtype torch has. The file is mapped, so a tensor's pages come
    as they are read and go as memory is needed. ValueError if the file is missing or is no whole safetensors file.
    """
    if is_ours(path):
        for name, dtype, tensor in storage.whole_tensors(path):
            yield name, dtype, tensor if tensor.is_floating_point() else None
        return
    if not path.is_file():
        raise ValueError(f"no file at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                dtype = str(file.get_slice(name).get_dtype())
                floating = dtype in FLOATING
                yield name, dtype, file.get_tensor(name) if floating else None
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file ({error})") from error


def load(
    path: Path, device: torch.device, ranks: Ranks = ALONE, sharded: Like = lambda name, shape: None
) -> dict[str, Any]:
    """The state of every part in a checkpoint, by name, each tensor whole on ``device`` or sharded as ``sharded`` says.

    Parts that differ by rank come with it if there are as many ranks as there were. ValueError if a file is damaged or
    is not one of ours.
    """
    head = storage.read_head(path)
    faults = [fault for fault in ranks.gather(_verified(path, ranks)) if fault]
    if faults:
        raise ValueError(faults[0])
    mine = head["ranks"][ranks.rank] if len(head["ranks"]) == ranks.size else {}
    trees = {**head["tree"], **mine}
    targets: dict[str, Tensor] = {}
    for name in _leaves(list(trees.values())):
        about = head["tensors"][name]
        model = sharded(name, about["shape"])
        dtype = getattr(torch, about["dtype"])
        shape = about["shape"] if model is None else local(model).shape
        held = torch.empty(shape, dtype=dtype, device=device)
        targets[name] = held if model is None else like(held, model)
    planner = dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        dcp.load(targets, storage_reader=storage.Reader(path), planner=planner, no_dist=ranks.size == 1)
    return {name: _join(tree, targets) for name, tree in trees.items()}


def _verified(path: Path, ranks: Ranks) -> str:
    try:
        storage.verify(path, ranks.rank, ranks.size)
    except ValueError as error:
        return str(error)
    return ""


def _split(value: Any, where: str, tensors: dict[str, Tensor], seen: dict[tuple[int, Any], str]) -> Any:
    """JSON for ``value``, with its tensors moved to ``tensors`` under their path; a shared tensor keeps one path."""
    if isinstance(value, Tensor):
        identity = (local(value).data_ptr(), (value.shape, value.stride(), value.dtype))
        if value.numel() and identity in seen:
            return {"tensor": seen[identity]}
        seen[identity] = where
        tensors[where] = value.detach()
        return {"tensor": where}
    if isinstance(value, dict):
        items = [[key, _split(inner, f"{where}/{key}", tensors, seen)] for key, inner in value.items()]
        return {"dict": items}  # pairs, because an optimizer's keys are integers and JSON's are not
    if isinstance(value, list | tuple):
        return {"list": [_split(inner, f"{where}/{index}", tensors, seen) for index, inner in enumerate(value)]}
    assert value is None or isinstance(value, bool | int | float | str), f"{where}: {type(value)} cannot be saved"
    return {"value": value}


def _join(tree: Any, tensors: dict[str, Tensor]) -> Any:
    if "tensor" in tree:
        return tensors[tree["tensor"]]
    if "dict" in tree:
        return {key: _join(inner, tensors) for key, inner in tree["dict"]}
    if "list" in tree:
        return [_join(inner, tensors) for inner in tree["list"]]
    return tree["value"]


def _leaves(tree: Any) -> list[str]:
    """The names of all tensors in a list of trees."""
    if isinstance(tree, list):
        return [name for inner in tree for name in _leaves(inner)]
    if "tensor" in tree:
        return [tree["tensor"]]
    if "dict" in tree:
        return _leaves([inner for _, inner in tree["dict"]])
    return _leaves(tree.get("list", []))

"""Checkpoints: a folder for each saved step, with a dict of named Stateful parts (:mod:`mptrain.checkpoint.storage`).

Tensors go through ``torch.distributed.checkpoint``, so each rank writes what it holds and a run may go on with another
number of ranks or another layout; everything else is JSON. Saving in the background copies the state first (that is all
training waits for) and writes the copy in a thread. A kill or a full disk leaves the checkpoints before as they were.
Tied tensors are stored once.
"""

from __future__ import annotations

import ctypes
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from mptrain.checkpoint import storage
from mptrain.distributed import ALONE, Ranks, like, local

FLOATING = {  # what can be computed from, by safetensors' names
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
NAME = re.compile(rf"(?:{storage.OLD})?step-(\d{{8,}})")
# Name and shape of a stored tensor -> a tensor that is sharded as it shall be; None: whole on every rank.
Like = Callable[[str, list[int]], Tensor | None]


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
        """The newest whole checkpoint: a damaged one (torn file, flipped byte) is passed over.

        ValueError if there are none but those of an older mptrain.
        """
        self._join()
        self.passed_over = []
        for path in self._ranks.share(self._existing()[::-1]):
            faults = [fault for fault in self._ranks.gather(_verified(path, self._ranks)) if fault]
            if not faults:
                return path
            self.passed_over += faults[:1]
        files = sorted(self.folder.glob("step-*.safetensors"), reverse=True)
        for path in self._ranks.share([path for path in files if storage.is_older(path)]):
            raise ValueError(storage.older(path))
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
        rank, tensors = self._ranks.rank, dict[str, Tensor]()
        tree = {name: _split(part.state_dict(), name, tensors, {}) for name, part in parts.items()}
        names = set(tensors)
        tensors = self._dealt(tensors)
        mine = {
            name: _split(part.state_dict(), f"rank{rank}/{name}", tensors, {}) for name, part in (own or {}).items()
        }
        head = {"about": about, "tree": tree, "ranks": self._ranks.gather(mine)}
        writer = storage.Writer(self.path(step), head, names)
        held = {name: local(tensor) for name, tensor in tensors.items()}
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # not in a thread: of all
        if not self._background:
            self._write(writer, tensors, held)
            return self.path(step)
        arguments = (writer, tensors, self._copied(held))
        alone = self._group is None  # then a process that ends waits for it; others could wait for the dead
        aside = threading.Thread(target=self._write_aside, name="checkpoint", args=arguments, daemon=not alone)
        self._thread = aside
        self._thread.start()
        return self.path(step)

    def wait(self) -> None:
        """Until what is being written is on disk. OSError if it could not be written."""
        self._join()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _dealt(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return what this rank writes: what it holds of sharded tensors, and a part of the others, which all ranks
        hold.
        """
        bytes_of = [0] * self._ranks.size
        dealt = {}
        for name, tensor in tensors.items():
            if hasattr(tensor, "placements"):
                mine = self._ranks.counts(tensor)
            else:
                writer = bytes_of.index(min(bytes_of))
                bytes_of[writer] += tensor.nbytes + 1
                mine = writer == self._ranks.rank
            if mine:
                dealt[name] = tensor
        return dealt

    def _copied(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        before, self._copies = self._copies, {}
        for name, tensor in tensors.items():
            copy = before.get(name)
            if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
                copy = torch.empty_like(tensor, device="cpu", memory_format=torch.contiguous_format)
            _copy(copy, tensor)
            self._copies[name] = copy
        return self._copies

    def _write_aside(self, writer: storage.Writer, tensors: dict[str, Tensor], held: dict[str, Tensor]) -> None:
        try:
            self._write(writer, tensors, held)
        except BaseException as error:  # told by the next save
            self._error = error

    def _write(self, writer: storage.Writer, tensors: dict[str, Tensor], held: dict[str, Tensor]) -> None:
        """``held``: in the place of what this rank holds of ``tensors``."""
        planner, alone = storage.Planner(held), self._group is None
        try:
            dcp_save(tensors, storage_writer=writer, planner=planner, process_group=self._group, no_dist=alone)
        except CheckpointException as failed:
            if self._ranks.first:
                writer.give_up()
            _tell(failed, self._ranks)
        if self._ranks.first:
            for old in self._existing()[: -self.keep]:
                if old != writer.folder:  # a run continued from an earlier step than the newest of the folder
                    storage.discard(old)

    def set_aside(self, step: int) -> None:
        """Rename what is newer than ``step``, of a run that is resumed from there: another future of it, or damaged."""
        self._join()
        self._ranks.barrier()  # none still reads
        self._ranks.by_first(lambda: self._rename(step))

    def _rename(self, step: int) -> None:
        storage.tidy(self.folder)
        for path in self._existing():
            if _step(path) > step:
                number = 1
                while (aside := path.with_name(f"aside-{number}-{path.name}")).exists():
                    number += 1
                path.rename(aside)

    def _existing(self) -> list[Path]:
        """List them by step. One that was about to be replaced when its process was killed stands for itself."""
        by_step = {_step(path): path for path in self.folder.glob(f"{storage.OLD}step-*") if NAME.fullmatch(path.name)}
        by_step |= {_step(path): path for path in self.folder.glob("step-*") if NAME.fullmatch(path.name)}
        return [by_step[step] for step in sorted(by_step)]


def _step(path: Path) -> int:
    return int(path.name.removeprefix(storage.OLD).removeprefix("step-"))


def _tell(failed: CheckpointException, ranks: Ranks) -> NoReturn:
    """Raise what went wrong, in one line: torch's exception holds every rank's traceback and is not an Exception."""
    rank, (error, _) = min(failed.failures.items())
    if isinstance(error, OSError) and ranks.size > 1:
        raise OSError(f"{error} (rank {rank})") from None
    raise error from None


def _copy(target: Tensor, source: Tensor) -> None:
    """Copy between tensors of one shape and dtype. memcpy does not read what it overwrites: on a CPU 8.3 GB/s where
    torch's copy has 4.9.
    """
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
    head = storage.read_head(path)
    named = head["tree"].get("model", {}).get("dict", [])
    shapes = {name: head["tensors"][leaf["tensor"]]["shape"] for name, leaf in named if "tensor" in leaf}
    for name in {**shapes, **wanted}:
        if wanted.get(name) != shapes.get(name):
            there = f"is {shapes[name]} there" if name in shapes else "is not there"
            here = f"is {wanted[name]} in this model" if name in wanted else "is not in this model"
            raise ValueError(f"checkpoint {path} is of another model: {name} {there} and {here}; set model= as it was")


def is_ours(path: Path) -> bool:
    """Tell whether :class:`Checkpoints` wrote this folder. It may be damaged."""
    return storage.is_ours(path)


def float_tensors(path: Path) -> Iterator[tuple[str, str, Tensor | None]]:
    """(name, dtype as the file says it, tensor) of each tensor of a checkpoint or of any safetensors file, one by one.

    None in place of a tensor that is not of a floating dtype torch computes from. The file is mapped, so a tensor's
    pages come as they are read and go as memory is needed. ValueError if the file is missing or is not a whole
    safetensors file, or if one of the checkpoint's is damaged.
    """
    if is_ours(path):
        for name, dtype, tensor in storage.whole_tensors(path):
            yield name, dtype, tensor if tensor.dtype in FLOATING.values() else None
        return
    if not path.is_file():
        raise ValueError(f"no file at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                dtype = str(file.get_slice(name).get_dtype())
                yield name, dtype, file.get_tensor(name) if dtype in FLOATING else None
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file ({error})") from error


def load(
    path: Path, device: torch.device, ranks: Ranks = ALONE, sharded: Like = lambda name, shape: None
) -> dict[str, Any]:
    """The state of every part in a checkpoint, by name, each tensor whole on ``device`` or sharded as ``sharded`` says.

    Parts that differ by rank come with it if there are as many ranks as there were. ValueError, on all ranks alike, if
    a file is damaged or is not one of ours.
    """
    faults = [fault for fault in ranks.gather(_verified(path, ranks)) if fault]
    if faults:
        raise ValueError(faults[0])
    head = storage.read_head(path)
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
    reader = storage.Reader(path, head)
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
    try:
        dcp_load(targets, storage_reader=reader, planner=planner, no_dist=ranks.size == 1)
    except CheckpointException as failed:
        _tell(failed, ranks)
    return {name: _join(tree, targets) for name, tree in trees.items()}


def _verified(path: Path, ranks: Ranks) -> str:
    try:
        storage.verify(path, ranks.rank, ranks.size)
    except ValueError as error:
        return str(error)
    return ""


def _split(value: Any, where: str, tensors: dict[str, Tensor], seen: dict[Any, str]) -> Any:
    """JSON for ``value``, with its tensors moved to ``tensors`` under their path; a shared tensor keeps one path."""
    if isinstance(value, Tensor):
        held = local(value)
        memory = held.untyped_storage()._cdata  # the object: a rank's empty shards are all at address 0
        identity = (memory, held.storage_offset(), value.shape, value.stride(), value.dtype)
        if identity in seen:
            return {"tensor": seen[identity]}
        while where in tensors:  # {"a/b": x, "a": {"b": y}}, {1: x, "1": y}
            where += "'"
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

"""Checkpoints: one safetensors file holding a dict of named Stateful parts, written atomically.

Tensors are stored as tensors and everything else as JSON in the file's header, so that loading runs no code of the
file's. A file is written in a folder beside, flushed to disk and renamed: a kill or a full disk leaves the previous
checkpoint as it was. Tied tensors are stored once.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

VERSION = "1"
FLOATING = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")  # of safetensors, with a torch dtype to compute from
NAME = re.compile(r"step-(\d{8})\.safetensors")


class Stateful(Protocol):
    """A part of a run that can be saved and continued."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Any) -> Any: ...


class Rng:
    """Torch's random states (dropout, initialization), CPU and GPU."""

    def state_dict(self) -> dict[str, Tensor]:
        state = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            state["cuda"] = torch.cuda.get_rng_state()
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Both are byte tensors that torch takes on the CPU alone, wherever the checkpoint was read to."""
        torch.set_rng_state(state["cpu"].cpu())
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"].cpu())


class Checkpoints:
    """The checkpoints of one run folder; the newest ``keep`` stay."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}.safetensors"

    def newest(self) -> Path | None:
        """The newest whole checkpoint: a torn one (killed machine, full disk) is passed over."""
        for path in sorted(self._existing(), reverse=True):
            try:
                read_header(path)
            except ValueError:
                continue
            return path
        return None

    def save(self, step: int, parts: dict[str, Stateful], about: dict[str, Any]) -> Path:
        """Write the parts as they are now. ``about`` (JSON) travels in the header: policy, fingerprint, step.

        OSError, with the path, if the disk is full or the folder cannot be written; nothing saved before is touched.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Tensor] = {}
        tree = {name: _split(part.state_dict(), name, tensors, {}) for name, part in parts.items()}
        header = {"mptrain": VERSION, "about": json.dumps(about), "tree": json.dumps(tree)}
        path = self.path(step)
        desk = self.folder / f"partial-{os.getpid()}"  # a folder, because safetensors adds a temporary of its own
        desk.mkdir(exist_ok=True)
        try:
            save_file(_apart(tensors), desk / path.name, metadata=header)
            _flush(desk / path.name)
            os.replace(desk / path.name, path)
        except SafetensorError as error:
            raise OSError(f"checkpoint {path} could not be written: {error}; older ones are untouched") from error
        finally:
            shutil.rmtree(desk, ignore_errors=True)
        _flush(self.folder)
        for old in sorted(self._existing())[: -self.keep]:
            if old != path:  # a run continued from an earlier step than the newest of the folder
                old.unlink()
        for torn in self.folder.glob("partial-*"):  # of processes killed while they saved
            shutil.rmtree(torn, ignore_errors=True)
        return path

    def _existing(self) -> list[Path]:
        return [path for path in self.folder.glob("step-*.safetensors") if NAME.fullmatch(path.name)]


def read_header(path: Path) -> dict[str, Any]:
    """``about`` of a checkpoint. ValueError if it is missing, torn, or not one of ours."""
    if not path.is_file():
        raise ValueError(f"no checkpoint at {path}: set resume=auto with run_dir, or the path of a checkpoint file")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"checkpoint {path} is truncated or not a safetensors file ({error}): resume=auto") from error
    if header.get("mptrain") != VERSION:
        raise ValueError(f"{path} is not a checkpoint of mptrain (version {VERSION}): give one written by a run")
    about: dict[str, Any] = json.loads(header["about"])
    return about


def require_fit(path: Path, model: nn.Module) -> None:
    """ValueError if the weights in a checkpoint are not those of ``model`` (it may be on meta), by name and shape."""
    wanted = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    with safe_open(path, framework="pt") as file:
        names = [key for key in file.keys() if key.startswith("model/")]  # noqa: SIM118 (not a dict)
        shapes = {name.removeprefix("model/"): file.get_slice(name).get_shape() for name in names}
    for name, shape in shapes.items():
        if wanted.get(name) != shape:
            here = f"is {wanted[name]} in this model" if name in wanted else "is not in this model"
            raise ValueError(f"checkpoint {path} is of another model: {name} {shape} {here}; set model= as it was")


def is_ours(path: Path) -> bool:
    """Was this file written by :class:`Checkpoints`?"""
    try:
        read_header(path)
    except ValueError:
        return False
    return True


def float_tensors(path: Path) -> Iterator[tuple[str, str, Tensor | None]]:
    """(name, dtype as the file says it, tensor) of each tensor of any safetensors file, one in memory at a time.

    None in place of a tensor that is not of a floating dtype torch has. The file is mapped, so a tensor's pages come
    as they are read and go as memory is needed. ValueError if the file is missing or is no whole safetensors file.
    """
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


def load(path: Path, device: torch.device) -> dict[str, Any]:
    """The state of every part in a checkpoint, by name. ValueError as :func:`read_header`."""
    read_header(path)
    with safe_open(path, framework="pt", device=str(device)) as file:
        tree = json.loads(file.metadata()["tree"])
        state: dict[str, Any] = _join(tree, file)
    return state


def _split(value: Any, where: str, tensors: dict[str, Tensor], seen: dict[tuple[int, Any], str]) -> Any:
    """JSON for ``value``, with its tensors moved to ``tensors`` under their path; a shared tensor keeps one path."""
    if isinstance(value, Tensor):
        identity = (value.data_ptr(), (value.shape, value.stride(), value.dtype))
        if value.numel() and identity in seen:
            return {"tensor": seen[identity]}
        seen[identity] = where
        tensors[where] = value.detach().contiguous()
        return {"tensor": where}
    if isinstance(value, dict):
        items = [[key, _split(inner, f"{where}/{key}", tensors, seen)] for key, inner in value.items()]
        return {"dict": items}  # pairs, because an optimizer's keys are integers and JSON's are not
    if isinstance(value, list | tuple):
        return {"list": [_split(inner, f"{where}/{index}", tensors, seen) for index, inner in enumerate(value)]}
    assert value is None or isinstance(value, bool | int | float | str), f"{where}: {type(value)} cannot be saved"
    return {"value": value}


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """safetensors refuses tensors that overlap in memory (views of one buffer): all but the first are copied."""
    held: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if storage in held else tensor
        held.add(storage)
    return apart


def _join(tree: Any, file: Any) -> Any:
    if "tensor" in tree:
        return file.get_tensor(tree["tensor"])
    if "dict" in tree:
        return {key: _join(inner, file) for key, inner in tree["dict"]}
    if "list" in tree:
        return [_join(inner, file) for inner in tree["list"]]
    if "value" in tree:
        return tree["value"]
    return {name: _join(inner, file) for name, inner in tree.items()}


def _flush(path: Path) -> None:
    """Ask the system to put a file or folder on disk before it is relied on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

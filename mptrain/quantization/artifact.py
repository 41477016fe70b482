"""The folder of a quantized model: written atomically, loaded bit for bit.

``quantized.safetensors`` holds codes (INT4 two to a byte), scales, zero points and the unquantized tensors;
``quantization.json`` the metadata to rebuild them, with the file's checksum; ``config.json`` the model. The first
is not called model.safetensors because transformers would load that, with random weights for the quantized ones
and only a warning.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mptrain.quantization import huggingface, methods
from mptrain.quantization.packing import flattened, is_quantized, restored
from mptrain.quantization.report import Report
from mptrain.quantization.source import HUGGING_FACE, MARK, RUN, Source, rebuilt
from mptrain.tools.files import json_text, object_in, require_free, whole_folder

VERSION = 1
WEIGHTS = "quantized.safetensors"


def save(out: str | Path, source: Source, report: Report) -> Path:
    """Write the model of ``source``, quantized as ``report`` says, into the new folder ``out``.

    ValueError if ``out`` exists or the disk is full; nothing is then left behind.
    """
    out = Path(out)
    require_free(out)
    tensors, about, ties = _stored(source.model)
    with whole_folder(out, SafetensorError) as desk:
        save_file(tensors, desk / WEIGHTS, metadata={"mptrain.quantization": str(VERSION)})
        described = {
            "version": VERSION,
            "method": report.method,
            "group_size": report.group_size,
            "kind": source.kind,
            "source": source.description,
            "torch": torch.__version__,
            "torchao": importlib.metadata.version("torchao") if about else None,
            "sha256": _sha256(desk / WEIGHTS),
            "ties": ties,
            "quantized": about,
            "layers": [asdict(layer) for layer in report.layers],
        }
        (desk / MARK).write_text(json_text(described, indent=1) + "\n")
        (desk / "config.json").write_text(json.dumps(source.settings, indent=2) + "\n")
        for path in source.beside:
            shutil.copyfile(path, desk / path.name)
    return out


def load(folder: str | Path, device: str | torch.device = "cpu") -> nn.Module:
    """Return the model of a folder that :func:`save` wrote, in eval mode: its forward gives the same bits as the one
    saved.

    ValueError if it is not such a folder, is of another version, or is damaged.
    """
    folder, device = Path(folder), torch.device(device)
    described = read(folder)
    why = methods.missing(described["method"], device)
    if why:
        raise ValueError(f"{folder} cannot be used here: {why}")
    tensors = _read_tensors(folder, described)
    try:
        weights = {name: restored(name, tensors, about) for name, about in described["quantized"].items()}
        model = _shell(folder, described)
        state = {**tensors, **weights}
        for name, _ in model.named_parameters():
            if name in state:  # assign=True keeps parameters as they are, so that ties are preserved
                state[name] = nn.Parameter(state[name], requires_grad=False)
        state |= {name: state[first] for name, first in described["ties"].items()}
        model.load_state_dict(state, assign=True)
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        versions = f"torch {described.get('torch')} and torchao {described.get('torchao')}"
        raise ValueError(
            f"{folder} cannot be restored ({str(error).splitlines()[0]}); it was made by {versions}"
        ) from error
    return model.eval().to(device)


def read(folder: Path) -> dict[str, Any]:
    """Read ``quantization.json``. ValueError if it is missing, incomplete, or of another version."""
    described = object_in(folder / MARK)
    if not (folder / MARK).is_file():
        raise ValueError(f"{folder} is not a quantized model: it has no {MARK}")
    if "version" not in described:
        raise ValueError(f"{folder / MARK} is incomplete or corrupt: quantize the original again")
    if described["version"] != VERSION:
        raise ValueError(
            f"{folder} is of version {described['version']} and this mptrain reads {VERSION}: quantize again"
        )
    return described


def size_bytes(folder: str | Path) -> int:
    """Return the size of the file with the weights."""
    return (Path(folder) / WEIGHTS).stat().st_size


def _stored(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, str]]:
    """Return plain tensors for the file, the metadata of the quantized ones, and tied names -> the stored name."""
    tensors: dict[str, Tensor] = {}
    about: dict[str, Any] = {}
    ties: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if first.setdefault(id(tensor), name) != name:
            ties[name] = first[id(tensor)]
        elif is_quantized(tensor):
            parts, about[name] = flattened(name, tensor)
            tensors |= parts
        else:
            tensors[name] = tensor.detach().contiguous()
    return tensors, about, ties


def _read_tensors(folder: Path, described: dict[str, Any]) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.is_file():
        raise ValueError(f"{folder} lacks {WEIGHTS}: quantize the original again")
    try:
        with safe_open(path, framework="pt") as file:
            # Copies, to align each as the saved one was: the order of sums may depend on it.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file ({error})") from error
    if _sha256(path) != described["sha256"]:
        raise ValueError(f"{path} is damaged: its checksum is not that of {MARK}; quantize the original again")
    return tensors


def _shell(folder: Path, described: dict[str, Any]) -> nn.Module:
    if described["kind"] == HUGGING_FACE:
        return huggingface.shell(folder)
    assert described["kind"] == RUN, described["kind"]
    return rebuilt(object_in(folder / "config.json"))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

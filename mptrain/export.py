"""A trained model as a folder that Hugging Face's transformers loads: ``AutoModelForCausalLM.from_pretrained(OUT)``.

How an architecture is called and laid out there, its own module says (``hugging_face`` in mptrain/models/KIND.py).
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mptrain import checkpoint, models
from mptrain.settings import from_plain

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def export(source: Path, out: Path, dtype: str = "fp32", average: bool = False) -> str:
    """Write ``config.json`` and ``model.safetensors`` into the new folder ``out``; returns what was written, in words.

    ``source``: a run's folder (its newest whole checkpoint is taken) or a checkpoint in one. ``average``: the running
    average of the weights in place of the weights (which are those the model computes with: BF16 if stored so, without
    the optimizer's remainder). ValueError if something is missing or in the way, if the kind of
    model has no twin there, or if a weight is beyond ``dtype``; ``out`` is then as it was.
    """
    _require_free(out)
    run, path = _located(source)
    state = checkpoint.load(path, torch.device("cpu"))
    if average and "average" not in state:
        raise ValueError(f"{path} has no running average (the run had optim.ema_decay=0): leave --average out")
    settings, tensors = _translated(run, state["average" if average else "model"])
    settings["dtype"] = str(DTYPES[dtype]).removeprefix("torch.")
    tensors = {name: _cast(name, tensor, dtype) for name, tensor in tensors.items()}
    _write(out, settings, tensors)
    millions = sum(tensor.numel() for tensor in tensors.values()) / 1e6
    what = "running average" if average else "weights"
    return f"{out}: {settings['architectures'][0]}, {millions:.1f} M parameters in {dtype}, the {what} of {path}"


def _require_free(out: Path) -> None:
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists() or out.is_symlink():
        raise ValueError(f"{out} exists and is not an empty folder: choose another OUT, or remove it")


def _located(source: Path) -> tuple[Path, Path]:
    """The run's folder and the checkpoint that ``source`` means."""
    source = source.resolve()
    if not source.exists():
        raise ValueError(f"nothing at {source}: give a run's folder, or a checkpoint RUN/checkpoints/NAME")
    if not (source / "config.json").is_file():
        run = source.parent.parent
        if not (run / "config.json").is_file():
            raise ValueError(f"{source} is no run's folder and in none's checkpoints: there is no config.json")
        return run, source
    newest = checkpoint.Checkpoints(source / "checkpoints", keep=1).newest()
    if newest is None:
        raise ValueError(f"{source} has no whole checkpoint: train with checkpoint.every=N, or let the run end")
    return source, newest


def _translated(run: Path, state: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and tensors by Hugging Face's names. The vocabulary is the data's, so its size is the embedding's."""
    settings = json.loads((run / "config.json").read_text())["model"]
    kind = settings.pop("kind")
    module = models.load(kind)
    if not hasattr(module, "hugging_face"):
        having = [name for name in models.kinds() if hasattr(models.load(name), "hugging_face")]
        raise ValueError(
            f"model.kind={kind} has no twin in Hugging Face's transformers; these have: {', '.join(having)}"
        )
    config = from_plain(module.Config, settings | {"vocab_size": len(state["embed.weight"])}, "model")
    found: tuple[dict[str, Any], dict[str, Tensor]] = module.hugging_face(config, state)
    return found


def _cast(name: str, tensor: Tensor, dtype: str) -> Tensor:
    """ValueError where a finite weight would become Inf: FP16 ends at 65504."""
    cast = tensor.to(DTYPES[dtype]).contiguous()
    if (cast.isinf() & tensor.isfinite()).any():
        raise ValueError(f"{name} holds {tensor.abs().max():.3g}, beyond {dtype}: use --dtype fp32")
    return cast


def _write(out: Path, settings: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """All of the folder or nothing: it is made beside and renamed."""
    desk = out.absolute().with_name(f"{out.absolute().name}.partial")
    try:
        if desk.exists():  # of a process killed while it wrote
            shutil.rmtree(desk)
        desk.mkdir(parents=True)
        (desk / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
        save_file(tensors, desk / "model.safetensors", metadata={"format": "pt"})
        os.replace(desk, out)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{out} cannot be written ({error}): choose another OUT") from error
    finally:
        shutil.rmtree(desk, ignore_errors=True)

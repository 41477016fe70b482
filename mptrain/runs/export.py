"""Export to a folder that Hugging Face's transformers loads: ``AutoModelForCausalLM.from_pretrained(OUT)``.

Each architecture's module translates its names and layout (``hugging_face`` in mptrain/models/KIND.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mptrain import models
from mptrain.runs import weights as trained
from mptrain.tools import files

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def export(source: Path, out: Path, dtype: str = "fp32", average: bool = False) -> str:
    """Write ``config.json`` and ``model.safetensors`` into the new folder ``out``; return a description of them.

    ``source``: a run's folder (its newest complete checkpoint) or a checkpoint in one. ``average``: the running
    average instead of the weights (which are those the model computes with: BF16 if stored so, without the
    optimizer's remainder). ValueError if something is missing, ``out`` exists, transformers has no such
    architecture, or a weight is beyond ``dtype``; ``out`` is then unchanged.
    """
    files.require_free(out)
    run, path = trained.located(source)
    settings, tensors = _translated(run, trained.weights(path, average))
    settings["dtype"] = str(DTYPES[dtype]).removeprefix("torch.")
    tensors = {name: _cast(name, tensor, dtype) for name, tensor in tensors.items()}
    _write(out, settings, tensors)
    millions = sum(tensor.numel() for tensor in tensors.values()) / 1e6
    what = "running average" if average else "weights"
    return f"{out}: {settings['architectures'][0]}, {millions:.1f} M parameters in {dtype}, the {what} of {path}"


def _translated(run: Path, state: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return config.json and tensors by Hugging Face's names."""
    kind = trained.model_kind(run)
    module = models.load(kind)
    if module.hugging_face is None:
        having = [name for name in models.kinds() if models.load(name).hugging_face]
        raise ValueError(
            f"model.kind={kind} cannot be exported to Hugging Face's transformers; supported: {', '.join(having)}"
        )
    return module.hugging_face(trained.model_config(run, state), state)


def _cast(name: str, tensor: Tensor, dtype: str) -> Tensor:
    """Cast; ValueError where a finite weight would become Inf: FP16 ends at 65504."""
    cast = tensor.to(DTYPES[dtype]).contiguous()
    if (cast.isinf() & tensor.isfinite()).any():
        raise ValueError(f"{name} holds {tensor.abs().max():.3g}, beyond {dtype}: use --dtype fp32")
    return cast


def _write(out: Path, settings: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    with files.whole_folder(out, SafetensorError) as desk:
        (desk / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
        save_file(tensors, desk / "model.safetensors", metadata={"format": "pt"})

"""The weights of a run, from a user-supplied path: its folder or one of its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mptrain import models
from mptrain.checkpoint import checkpoints
from mptrain.tools.files import object_in
from mptrain.tools.settings import from_plain


def located(source: Path) -> tuple[Path, Path]:
    """Return the run's folder and the checkpoint for ``source``: in a folder its newest complete one. ValueError if
    there is none.

    ValueError if there is none.
    """
    source = source.resolve()
    if not source.exists():
        raise ValueError(f"{source} does not exist: pass a run folder or a checkpoint (RUN/checkpoints/NAME)")
    if not (source / "config.json").is_file():
        run = source.parent.parent
        if not (run / "config.json").is_file():
            raise ValueError(f"{source} is neither a run folder nor a checkpoint in one: no config.json found")
        return run, source
    newest = checkpoints.Checkpoints(source / "checkpoints", keep=1).newest()
    if newest is None:
        raise ValueError(f"{source} has no complete checkpoint: train with checkpoint.every=N, or let the run end")
    return source, newest


def weights(path: Path, average: bool) -> dict[str, Tensor]:
    """Return the model's state in a checkpoint, or its running average. ValueError if there is no average."""
    state = checkpoints.load(path, torch.device("cpu"))
    if average and "average" not in state:
        raise ValueError(f"{path} has no running average (the run had optim.ema_decay=0): leave --average out")
    tensors: dict[str, Tensor] = state["average" if average else "model"]
    return tensors


def model_kind(run: Path) -> str:
    """Return the kind of a run's model. ValueError if its folder has no settings."""
    return str(_model(run)["kind"])


def model_config(run: Path, state: dict[str, Tensor]) -> Any:
    """Return the Config of a run's model; sizes that came from the data are read off the weights."""
    settings = _model(run)
    module = models.load(settings.pop("kind"))
    return from_plain(module.Config, settings | module.sizes(settings, state), "model")


def _model(run: Path) -> dict[str, Any]:
    settings = object_in(run / "config.json").get("model")
    if not isinstance(settings, dict) or "kind" not in settings:
        raise ValueError(f"{run}/config.json has no model settings: is this a run folder?")
    return settings

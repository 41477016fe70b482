"""Models to quantize: a run, one of its checkpoints, a Hugging Face folder, or a file in one."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mptrain import data, models
from mptrain.data import Dataset
from mptrain.quantization import huggingface
from mptrain.runs import weights as trained
from mptrain.tools.files import object_in
from mptrain.tools.settings import from_plain, to_plain

RUN, HUGGING_FACE = "run", "huggingface"
MARK = "quantization.json"  # in the folder of a quantized model
BESIDE = ("*.json", "*.txt", "*.model", "*.jinja")  # tokenizer and generation settings of a Hugging Face folder
NOT_BESIDE = (huggingface.INDEX, MARK)


@dataclass(frozen=True)
class Source:
    """``model``: FP32, in eval mode. ``kind``: RUN or HUGGING_FACE. ``settings``: the config.json to write.
    ``data``: the run's data settings, None without a run. ``out``: the default output folder."""

    model: nn.Module
    kind: str
    settings: dict[str, Any]
    data: dict[str, Any] | None
    description: str
    out: Path
    beside: tuple[Path, ...] = field(default=())

    def dataset(self) -> Dataset:
        """Return the run's data. ValueError if there is none (a Hugging Face folder) or it was moved."""
        if self.data is None:
            raise ValueError(f"{self.description} has no data: name a run of mptrain")
        return dataset(self.settings)


def dataset(settings: dict[str, Any]) -> Dataset:
    """Return the data of a run with this config.json."""
    settings_of_data = dict(settings["data"])
    module = data.load(str(settings_of_data.pop("kind", "")))
    fields = module.Config.__dataclass_fields__
    if "block_size" in fields and not settings_of_data.get("block_size"):
        settings_of_data["block_size"] = settings["model"]["block_size"]
    corpus: Dataset = module.build(from_plain(module.Config, settings_of_data, "data"))
    return corpus


def open_source(path: str | Path, average: bool = False) -> Source:
    """Open the model at ``path``; ``average``: the running average of a run's weights.

    ValueError if it is missing, incomplete, of an unknown kind, or quantized already.
    """
    path = Path(path)
    folder = path.parent if path.is_file() else path
    if not path.exists():
        raise ValueError(f"{path} does not exist: pass a run, a checkpoint of one, or a Hugging Face model")
    if (folder / MARK).exists():
        raise ValueError(f"{folder} is quantized already ({MARK}): quantize the original")
    if huggingface.is_one(folder):
        if average:
            raise ValueError(f"{folder} is a Hugging Face model, which has no running average: leave --average out")
        return _hugging_face(folder, path if path.is_file() else None)
    if path.is_file():
        raise ValueError(f"{path}: there is no config.json next to it with the model's type (model_type)")
    if (folder / "config.json").is_file() and "model" not in object_in(folder / "config.json"):
        raise ValueError(
            f"{folder}/config.json is incomplete, corrupt, or neither a run's (model) nor Hugging Face's (model_type)"
        )
    return _run(path, average)


def _hugging_face(folder: Path, file: Path | None) -> Source:
    model = huggingface.opened(folder, file)
    beside = {path for pattern in BESIDE for path in folder.glob(pattern) if path.name not in NOT_BESIDE}
    settings = object_in(folder / "config.json")
    out = folder.resolve()
    return Source(
        model,
        HUGGING_FACE,
        settings,
        None,
        f"{type(model).__name__} of {file or folder}",
        out.with_name(f"{out.name}-quantized"),
        tuple(sorted(path for path in beside if path.name != "config.json")),
    )


def _run(path: Path, average: bool) -> Source:
    run, checkpoint = trained.located(path)
    state = trained.weights(checkpoint, average)
    kind, config = trained.model_kind(run), trained.model_config(run, state)
    model = built(kind, config)
    _fill(model, state, checkpoint)
    settings: dict[str, Any] = {"model": {"kind": kind, **to_plain(config)}}
    of_run = object_in(run / "config.json").get("data")
    if isinstance(of_run, dict):
        settings["data"] = of_run
    what = "running average" if average else "weights"
    return Source(
        model.eval(), RUN, settings, settings.get("data"), f"{kind}, the {what} of {checkpoint}", run / "quantized"
    )


def built(kind: str, config: Any) -> nn.Module:
    """Return a model of our own without weights."""
    with torch.device("meta"):
        model: nn.Module = models.load(kind).build(config)
    return model


def rebuilt(settings: dict[str, Any]) -> nn.Module:
    """Return a model without weights from the ``model`` of a config.json."""
    values = dict(settings["model"])
    kind = values.pop("kind")
    return built(kind, from_plain(models.load(kind).Config, values, "model"))


def _fill(model: nn.Module, state: dict[str, Tensor], where: Path) -> None:
    """Fill in FP32 weights; of tied ones the state may hold only one. ValueError if they belong to another model."""
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in state:
            names.setdefault(id(parameter), name)
    masters = {name: nn.Parameter(state[name].float().contiguous()) for name in names.values()}
    parameters = model.state_dict(keep_vars=True)
    filled = {name: masters[names[id(parameter)]] for name, parameter in parameters.items() if id(parameter) in names}
    lacking, extra = sorted(parameters.keys() - filled.keys()), sorted(state.keys() - parameters.keys())
    if lacking or extra:
        what = f"lacks {lacking[0]}" if lacking else f"holds {extra[0]}, which the model has not"
        raise ValueError(f"{where} {what}: its run's config.json belongs to another model")
    try:
        model.load_state_dict(filled, assign=True)
    except RuntimeError as error:  # shapes differ
        why = " ".join(str(error).split())
        raise ValueError(f"{where} does not fit its run's config.json: {why}") from error

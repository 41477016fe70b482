"""Model folders of Hugging Face: loading, empty models, Conv1D layers made linear. transformers is imported lazily."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from mptrain.models._huggingface import as_linear, config_of, require_installed, weightless
from mptrain.models._huggingface import silent as _silent
from mptrain.tools.files import object_in

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def is_one(folder: Path) -> bool:
    """Return whether it is a model's folder in Hugging Face's layout."""
    return bool({"model_type", "architectures"} & object_in(folder / "config.json").keys())


def opened(folder: Path, file: Path | None = None) -> nn.Module:
    """Return the FP32 model of a folder in eval mode, its weights from ``file`` where one is named.

    ValueError for an unknown architecture, a missing or corrupt file, or missing weights.
    """
    config = _config(folder)
    for path in [file] if file else weight_files(folder):
        _require_whole(path)
    kind = _class_of(folder, config)
    given: dict[str, Any] = {"config": config, "dtype": torch.float32, "output_loading_info": True}
    try:
        with _silent():
            if file is None:
                model, info = kind.from_pretrained(folder, local_files_only=True, use_safetensors=True, **given)
            else:
                model, info = kind.from_pretrained(None, state_dict=load_file(file), **given)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{folder} cannot be loaded: {str(error).splitlines()[0]}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(
            f"{file or folder} lacks {missing[0]}{more}: it does not belong to the model in {folder}/config.json"
        )
    loaded: nn.Module = model.eval()
    return loaded


def shell(folder: Path) -> nn.Module:
    """Return the model that ``config.json`` describes, with Conv1D layers made linear; its weights are on meta."""
    config = _config(folder)
    kind = _class_of(folder, config)
    with _silent(), weightless():
        model: nn.Module = kind(config)
    as_linear(model)
    return model.eval()


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a folder.

    ValueError if there are none, or one that the index names is missing.
    """
    if (folder / INDEX).is_file():
        try:
            shards = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{folder / INDEX} is incomplete or corrupt: fetch it again") from error
        for shard in shards:
            if not (folder / shard).is_file():
                raise ValueError(f"{folder} lacks {shard}, a shard of {len(shards)} that {INDEX} names: fetch it again")
        return [folder / shard for shard in shards]
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    raise ValueError(f"{folder} has neither {WEIGHTS} nor {INDEX}: only safetensors are read")


def _require_whole(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"no file at {path}")
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file ({error})") from error


def _config(folder: Path) -> Any:
    """Return transformers' configuration. ValueError for an unknown model_type."""
    require_installed(str(folder))
    settings = object_in(folder / "config.json")
    if "quantization_config" in settings:
        raise ValueError(f"{folder} is quantized already (its config.json has a quantization_config): use the original")
    return config_of(settings, f"{folder}/config.json")


def _class_of(folder: Path, config: Any) -> Any:
    with _silent():  # imports the architecture's module
        import transformers

        named = (config.architectures or [""])[0]
        architecture = getattr(transformers, named, None) if named else None
        automatic = (transformers.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.MODEL_MAPPING)
    if named:
        if architecture is None:
            raise ValueError(
                f"{folder}/config.json: transformers {transformers.__version__} has no architecture {named}"
            )
        return architecture
    for auto in automatic:
        if type(config) in auto:
            return auto[type(config)]
    raise ValueError(f"{folder}/config.json names no architecture: set architectures, e.g. LlamaForCausalLM")

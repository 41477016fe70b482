"""Hugging Face's transformers, imported lazily and quietly: configurations, empty models, what is changed in them.

Shared by the model kind ``hf`` and by the quantization of Hugging Face folders.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from mptrain.tools.quiet import quiet_import


@contextmanager
def silent() -> Iterator[None]:
    """Without transformers' progress bars and advice, which are put back as they were."""
    with quiet_import():
        from transformers.utils import logging

        level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            yield
        finally:
            logging.set_verbosity(level)
            if bars:
                logging.enable_progress_bar()


def require_installed(what: str) -> None:
    """ValueError without transformers; ``what`` needs it."""
    if importlib.util.find_spec("transformers") is None:
        raise ValueError(f"{what} is a Hugging Face model and transformers is not installed: pip install transformers")


def class_of(settings: Mapping[str, Any], where: str) -> Any:
    """transformers' configuration class for a config.json. ValueError if its model_type is not one it knows.

    ``where`` names the file in messages.
    """
    with quiet_import():
        import transformers
    kind = settings.get("model_type", "none")
    if kind not in transformers.CONFIG_MAPPING:
        known = f"transformers {transformers.__version__} does not know"
        raise ValueError(f"{where}: model_type={kind} is an architecture that {known}")
    with silent():  # an architecture's module is imported here
        return transformers.CONFIG_MAPPING[kind]


def config_of(settings: Mapping[str, Any], where: str) -> Any:
    """transformers' configuration of the settings in a config.json. ValueError if they do not describe one."""
    config_class = class_of(settings, where)
    try:
        with silent():
            return config_class.from_dict(dict(settings))
    except Exception as error:  # whatever a field of a wrong type runs into
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{where} does not describe a {settings['model_type']}: {said}") from error


def conv1d_layers(model: nn.Module) -> list[str]:
    """Names of the layers of transformers' class Conv1D (GPT-2's): linear ones that hold the weight transposed."""
    return [
        name
        for name, module in model.named_modules()
        if type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")
    ]


def as_linear(model: nn.Module) -> int:
    """Put an ``nn.Linear`` with the transposed weight in the place of each Conv1D of transformers (GPT-2's); how many.

    The weights are the same numbers; a product may differ in its last bits, for it may be summed in another order.
    """
    names = conv1d_layers(model)
    for name in names:
        module = model.get_submodule(name)
        weight, bias = module.weight, module.bias
        assert isinstance(weight, nn.Parameter)
        linear = nn.Linear(weight.shape[0], weight.shape[1], device="meta")  # so that no weights are drawn
        linear.weight = nn.Parameter(weight.detach().t().contiguous(), requires_grad=weight.requires_grad)
        linear.bias = bias  # type: ignore[assignment]
        linear.train(module.training)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, linear)
    return len(names)


class _EmptyOnMeta(TorchFunctionMode):
    """``torch.empty``, by which layers make their weights, takes no memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


@contextmanager
def weightless() -> Iterator[None]:
    """Parameters go to meta as they are made, so that a shell needs no memory and no time to draw weights; buffers stay
    (``torch.device("meta")`` would leave rotary tables empty, which are in no file)."""
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        original(module, name, parameter)

    nn.Module.register_parameter = register  # type: ignore[method-assign, assignment]
    try:
        with _EmptyOnMeta():
            yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def file_of(path: Path) -> Path:
    """The config.json that a path means: itself, or the one in that folder."""
    return path / "config.json" if path.is_dir() else path

"""Models and GPUs known by name: a YAML each, with the source of its figures. Adding one is adding a file."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from mptrain.memory.inference import huggingface
from mptrain.memory.inference.architecture import Architecture
from mptrain.memory.units import parse_bytes
from mptrain.tools.settings import did_you_mean

HERE = Path(__file__).parents[1]
COUNT = re.compile(r"(\d{1,18})(?:\.(\d{1,12}))?(?:e(\d{1,2}))? ?([KMBT]?)")
POWERS = {"": 0, "K": 3, "M": 6, "B": 9, "T": 12}
MOST_PARAMETERS = huggingface.MOST_PARAMETERS


@dataclass(frozen=True)
class Model:
    """A model of the catalogue. ``parameters`` and ``activated`` (by one token; empty: all) as the source states them,
    exactly or rounded (``671B``); what follows from ``architecture`` agrees with them."""

    name: str
    source: str
    parameters: str
    activated: str
    architecture: Architecture


@dataclass(frozen=True)
class Gpu:
    """``memory``: bytes of the vendor's figure, ``stated``; drivers report 0.6 to 7.4 % more, some of it reserved."""

    name: str
    memory: int
    stated: str
    source: str


@cache
def model(name: str) -> Model:
    """The model of that name, in any case. ValueError with the nearest one."""
    known = model_names()
    if name.lower() not in known:
        raise ValueError(
            f"--model={name} is neither a file or folder nor in the catalogue{did_you_mean(name.lower(), known)}"
        )
    values = _values(HERE / "models" / f"{name.lower()}.yaml")
    made = huggingface.from_config({"_name_or_path": name.lower(), **values["config"]}, f"{name.lower()}.yaml")
    return Model(name.lower(), values["source"], str(values["parameters"]), values.get("activated", ""), made)


def model_names() -> list[str]:
    return sorted(path.stem for path in (HERE / "models").glob("*.yaml"))


def models() -> list[Model]:
    """All of them, the smallest of each family first."""
    found = [model(name) for name in model_names()]
    return sorted(found, key=lambda one: (one.name.rpartition("-")[0] or one.name, one.architecture.parameters))


@cache
def gpu(name: str) -> Gpu:
    """The GPU of that name, in any case. ValueError with the nearest one."""
    known = {path.stem.lower(): path for path in sorted((HERE / "gpus").glob("*.yaml"))}
    if name.lower() not in known:
        names = [path.stem for path in known.values()]
        raise ValueError(f"--gpu={name} is unknown{did_you_mean(name, names)}; or set --fit=80GiB")
    path = known[name.lower()]
    values = _values(path)
    return Gpu(path.stem, parse_bytes(values["memory"], f"{path.name}: memory"), values["memory"], values["source"])


def gpus() -> list[Gpu]:
    """All of them, by memory."""
    return sorted((gpu(path.stem) for path in (HERE / "gpus").glob("*.yaml")), key=lambda one: (one.memory, one.name))


def parse_count(text: str, setting: str = "--parameters") -> int:
    """``1e9``, ``7B``, ``124439808``, ``1.5B`` as a whole number of parameters, exactly."""
    found = COUNT.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"{setting}={text} is not a count: write 1e9, 7B or 124439808")
    whole, fraction, exponent, letter = found.groups(default="")
    zeros = int(exponent or 0) + POWERS[letter] - len(fraction)
    count = int(whole + fraction) * 10**zeros if zeros >= 0 else 0
    if not 1 <= count <= MOST_PARAMETERS:
        raise ValueError(f"{setting}={text} cannot work: it must be a whole number from 1 to {MOST_PARAMETERS:.0e}")
    return count


def _values(path: Path) -> dict[str, Any]:
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(values, dict), path
    return values

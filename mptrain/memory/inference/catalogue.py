"""Models known by name: a YAML each, with the source of its figures. Adding one is adding a file."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from mptrain.memory.inference import huggingface
from mptrain.memory.inference.architecture import Architecture
from mptrain.tools.settings import did_you_mean

HERE = Path(__file__).parents[1] / "models"
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


@cache
def model(name: str) -> Model:
    """The model of that name, in any case. ValueError with the nearest one."""
    known = model_names()
    if name.lower() not in known:
        raise ValueError(
            f"--model={name} is neither a file or folder nor in the catalogue{did_you_mean(name.lower(), known)}"
        )
    values = yaml.safe_load((HERE / f"{name.lower()}.yaml").read_text(encoding="utf-8"))
    architecture = huggingface.from_config({"_name_or_path": name.lower(), **values["config"]}, f"{name.lower()}.yaml")
    return Model(name.lower(), values["source"], str(values["parameters"]), values.get("activated", ""), architecture)


def model_names() -> list[str]:
    return sorted(path.stem for path in HERE.glob("*.yaml"))


def models() -> list[Model]:
    """All of them, the smallest of each family first."""
    known = [model(name) for name in model_names()]
    return sorted(known, key=lambda one: (one.name.rpartition("-")[0] or one.name, one.architecture.parameters))


def parse_count(text: str, setting: str = "--parameters") -> int:
    """``1e9``, ``7B``, ``124439808``, ``1.5B`` as a whole number of parameters, exactly."""
    match = COUNT.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{setting}={text} is not a count: write 1e9, 7B or 124439808")
    whole, fraction, exponent, letter = match.groups(default="")
    zeros = int(exponent or 0) + POWERS[letter] - len(fraction)
    count = int(whole + fraction) * 10**zeros if zeros >= 0 else 0
    if not 1 <= count <= MOST_PARAMETERS:
        raise ValueError(f"{setting}={text} cannot work: it must be a whole number from 1 to {MOST_PARAMETERS:.0e}")
    return count

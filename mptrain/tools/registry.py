"""Folders as registries: ``kind: gpt`` in a YAML of conf/model names the file mptrain/models/gpt.py, nothing else does.

Each such file holds a dataclass ``Config`` and a function ``build(config)``. Adding a kind is adding a file; files
whose names start with an underscore are helpers, not kinds.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from mptrain.tools.settings import did_you_mean


def kinds(package: str) -> list[str]:
    """Names of the kinds in ``package`` ("mptrain.models"), sorted. Looks at file names; imports none of them."""
    path = importlib.import_module(package).__path__
    return sorted(module.name for module in pkgutil.iter_modules(path) if not module.name.startswith("_"))


def load(package: str, kind: str) -> ModuleType:
    """Import the module of one kind. ValueError with the nearest name when ``package`` has no such file."""
    known = kinds(package)
    if kind not in known:
        raise ValueError(f"kind {kind!r} is not in {package}{did_you_mean(kind, known)}")
    return importlib.import_module(f"{package}.{kind}")

"""Models in plain torch, one architecture a file. A new file here is a new ``kind`` for the YAMLs of conf/model."""

from __future__ import annotations

from types import ModuleType

from mptrain import registry


def kinds() -> list[str]:
    """Names that ``kind:`` may take in conf/model."""
    return registry.kinds(__name__)


def load(kind: str) -> ModuleType:
    """The module of one kind, with its ``Config`` and ``build``. ValueError (did you mean ...) for an unknown one."""
    return registry.load(__name__, kind)

"""Models in plain torch, one architecture a file. A new file here is a new ``kind`` for the YAMLs of conf/model.

:class:`Architecture` says what such a file holds, :class:`Model` what it builds.
"""

from __future__ import annotations

from typing import cast

from mptrain.models._base import Architecture, BaseConfig, Model
from mptrain.tools import registry

__all__ = ["Architecture", "BaseConfig", "Model", "kinds", "load"]


def kinds() -> list[str]:
    """Names that ``kind:`` may take in conf/model."""
    return registry.kinds(__name__)


def load(kind: str) -> Architecture:
    """The module of one kind. ValueError (did you mean ...) for an unknown one."""
    return cast(Architecture, registry.load(__name__, kind))

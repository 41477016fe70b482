"""Settings as frozen dataclasses: built from plain nested values, back to them, and checked with messages that help."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from enum import Enum
from typing import Any

WORDS = {int: "a whole number", float: "a number", str: "a text"}


def did_you_mean(word: str, known: list[str]) -> str:
    """The tail of an error message: the nearest known word, and all of them."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    hint = f": did you mean {near[0]!r}?" if near else ":"
    return f"{hint} known: {', '.join(known)}"


def require(holds: bool, setting: str, value: object, wanted: str) -> None:
    if not holds:
        raise ValueError(f"{setting}={value} cannot work: it must be {wanted}")


def from_plain(kind: Any, values: Mapping[str, Any], where: str) -> Any:
    """A dataclass from plain values: nested dataclasses, enums by name, numbers as their field's type."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} must be a mapping of settings, not {values!r}")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    converted: dict[str, Any] = {}
    for key, value in values.items():
        if key not in fields:
            raise ValueError(f"unknown setting {_inside(where, key)}{did_you_mean(str(key), sorted(fields))}")
        default = _default(fields[key])
        if default is dataclasses.MISSING and fields[key].type in ("str", str):
            default = ""
        converted[key] = _convert(default, value, _inside(where, key))
    missing = [name for name, f in fields.items() if name not in converted and _default(f) is dataclasses.MISSING]
    if missing:
        name = _inside(where, missing[0])
        raise ValueError(f"{name} has no value: set {name}=...")
    return kind(**converted)


def _inside(where: str, key: str) -> str:
    return f"{where}.{key}" if where else str(key)


def _default(field: dataclasses.Field[Any]) -> Any:
    """The field's default, ``MISSING`` if it must be given."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _convert(default: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(default):
        return from_plain(type(default), value, where)
    if isinstance(default, dict):
        return dict(value)
    if isinstance(default, Enum):
        if isinstance(value, type(default)):
            return value
        members = [member.name for member in type(default)]
        if str(value) not in members:
            raise ValueError(f"{where}={value} is unknown{did_you_mean(str(value), members)}")
        return type(default)[str(value)]
    if default is None or default is dataclasses.MISSING:
        return value
    if value is None:  # str(None) would be the setting "None"
        raise ValueError(f"{where} has no value: leave it out for its default, {default!r}")
    if isinstance(value, list | tuple | Mapping) and not isinstance(default, list | tuple):
        raise ValueError(f"{where}={value!r} is not {WORDS.get(type(default), type(default).__name__)}")
    if isinstance(default, int) and isinstance(value, float) and not value.is_integer():
        raise ValueError(f"{where}={value!r} is not a whole number")
    if isinstance(default, bool) and not isinstance(value, bool):
        raise ValueError(f"{where}={value!r} is not true or false")
    try:
        return type(default)(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}={value!r} is not {WORDS.get(type(default), type(default).__name__)}") from error


def to_plain(value: Any) -> Any:
    """Nested dataclasses and enums as dicts and names: what :func:`from_plain` reads, JSON and YAML can hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, Mapping):
        return {key: to_plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(inner) for inner in value]
    return value

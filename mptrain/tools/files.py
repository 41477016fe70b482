"""Files that others may read at any time: written whole or not at all, JSON as every part of a run writes and reads it.

JSON has no words for what is not a number: NaN is null and infinities are text ("inf", "-inf") in the files.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def whole(path: Path) -> Iterator[BinaryIO]:
    """A file beside ``path`` to write, put on disk and in its place at the end; nothing stays if that is interrupted.

    Others find the old file or the new one, also when two processes write the same.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file in one step, see :func:`whole`."""
    with whole(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def require_free(out: Path) -> None:
    """ValueError unless a folder can be made there: nothing is at ``out``, or an empty folder."""
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists() or out.is_symlink():
        raise ValueError(f"{out} exists and is not an empty folder: choose another OUT, or remove it")


@contextmanager
def whole_folder(out: Path, also: type[Exception] = OSError) -> Iterator[Path]:
    """A folder beside ``out`` to write into, put in its place at the end: all of it or nothing.

    An OSError, or the error ``also``, that is raised while it is written comes out as a ValueError that names ``out``.
    """
    desk = out.absolute().with_name(f"{out.absolute().name}.partial")
    try:
        if desk.exists():  # of a process killed while it wrote
            shutil.rmtree(desk)
        desk.mkdir(parents=True)
        yield desk
        os.replace(desk, out)
    except (OSError, also) as error:
        raise ValueError(f"{out} cannot be written ({error}): choose another OUT") from error
    finally:
        shutil.rmtree(desk, ignore_errors=True)


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON proper: NaN as null, infinities as text."""
    return json.dumps(_proper(value), indent=indent, allow_nan=False)


def _proper(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _proper(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_proper(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


def number(value: Any) -> float:
    """A number of such a file; NaN for null and for what is not one."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return math.nan
    try:
        return float(value)
    except ValueError:
        return math.nan


def object_in(path: Path) -> dict[str, Any]:
    """The object in a file; empty if there is none, or it is torn."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def rows_in(path: Path, last_bytes: int | None = None) -> Iterator[dict[str, Any]]:
    """The objects of a file with one a line, or those in its ``last_bytes``; lines that are torn are passed over."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            start = 0 if last_bytes is None else max(0, size - last_bytes)
            file.seek(start)
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return
    for line in lines[1 if start else 0 :]:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield row

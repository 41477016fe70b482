"""The folder of a run: creation, write access, and a lock against other runs.

A run locks its folder while it is in progress. The system releases the lock when the process ends, however it
ends, so a folder without a summary and without a lock belongs to a stopped run.
"""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any, TextIO

from mptrain.config import RunConfig
from mptrain.runs import identity
from mptrain.tools.files import write_whole
from mptrain.tools.locks import hold
from mptrain.tools.settings import to_plain

MARKS = ".torchrun"  # in the folder of the runs


def folder_of(config: RunConfig, *, resumed: bool) -> tuple[Path, TextIO]:
    """Create the run's folder, lock it and write ``config.json`` into it; return the folder and the lock.

    ValueError if it cannot be written, is in use, or holds a run already and is not being resumed.
    """
    setting = f"run_dir={config.run_dir}" if config.run_dir else f"runs_dir={config.runs_dir}"
    try:
        folder = _made(config, resumed)
        held = claim(folder)
        text = json.dumps(to_plain(config), indent=2) + "\n"
        _keep_earlier(folder, text)
        write_whole(folder / "config.json", text)
    except OSError as error:
        raise ValueError(f"{setting} cannot be written ({error.strerror}): choose another folder") from error
    return folder, held


def _keep_earlier(folder: Path, text: str) -> None:
    """Keep the previous attempt's settings as ``config.N.json``, if they differ."""
    path = folder / "config.json"
    if path.exists() and path.read_text() != text:
        numbered = (folder / f"config.{number}.json" for number in itertools.count(1))
        write_whole(next(earlier for earlier in numbered if not earlier.exists()), path.read_text())


def _made(config: RunConfig, resumed: bool) -> Path:
    if not config.run_dir:
        return _numbered(Path(config.runs_dir), f"{config.model.get('kind')}-{config.precision.name}")
    folder = Path(config.run_dir)
    if (folder / "metrics.jsonl").exists() and not resumed and config.resume != "auto":
        raise ValueError(f"{folder} already holds a run: continue it with resume=auto, or choose another run_dir")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _numbered(parent: Path, stem: str) -> Path:
    parent.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        folder = parent / f"{stem}-{number}"
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
        else:
            return folder


def claim(folder: Path) -> TextIO:
    """Lock the folder until the returned file is closed. ValueError if another run uses it."""
    try:
        return hold(folder / identity.LOCK)
    except BlockingIOError:
        raise ValueError(f"{folder} is in use by another run: wait for it, or choose another run_dir") from None


def launched() -> str:
    """Return an identifier of this torchrun launch (stable across its restarts); empty without torchrun."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return f"{run_id}-{os.getppid()}" if run_id else ""


def remember(runs: Path, folder: Path) -> None:
    """Record the folder of this torchrun launch, for the processes that it restarts after a failure."""
    name = launched()
    if name:
        (runs / MARKS).mkdir(parents=True, exist_ok=True)
        write_whole(runs / MARKS / name, str(folder.resolve()))


def remembered(runs: Path) -> Path | None:
    """Return the folder that an earlier attempt of this torchrun launch used."""
    path = runs / MARKS / launched()
    return Path(path.read_text()) if launched() and path.is_file() else None


def describe(folder: Path, about: dict[str, Any]) -> None:
    """Write ``run.json``. A resumed run keeps its first one."""
    path = folder / identity.FILE
    if not path.exists():
        write_whole(path, json.dumps(about, indent=2) + "\n")


def discard(folder: Path) -> None:
    """Remove the folder of a run that never began, unless it holds other files."""
    if {path.name for path in folder.iterdir()} <= {"config.json", identity.FILE, identity.LOCK}:
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()

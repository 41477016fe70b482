"""The folder of a run: where it is, that it can be written, and that no run lands in the folder of another."""

from __future__ import annotations

import json
from pathlib import Path

from mptrain.config import RunConfig
from mptrain.settings import to_plain


def folder_of(config: RunConfig, *, resumed: bool) -> Path:
    """Make the run's folder and write ``config.json`` into it.

    ValueError if it cannot be written, or holds a run already and is not being resumed.
    """
    setting = f"run_dir={config.run_dir}" if config.run_dir else f"runs_dir={config.runs_dir}"
    try:
        return _try_folder(config, resumed)
    except OSError as error:
        raise ValueError(f"{setting} cannot be written ({error.strerror}): choose another folder") from error


def _try_folder(config: RunConfig, resumed: bool) -> Path:
    if config.run_dir:
        folder = Path(config.run_dir)
        if (folder / "metrics.jsonl").exists() and not resumed:
            raise ValueError(f"{folder} already holds a run: continue it with resume=auto, or choose another run_dir")
        folder.mkdir(parents=True, exist_ok=True)
    else:
        folder = _numbered(Path(config.runs_dir), f"{config.model.get('kind')}-{config.precision.name}")
    (folder / "config.json").write_text(json.dumps(to_plain(config), indent=2) + "\n")
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


def discard(folder: Path) -> None:
    """Remove the folder of a run that never began, if it holds nothing but its settings."""
    if {path.name for path in folder.iterdir()} == {"config.json"}:
        (folder / "config.json").unlink()
        folder.rmdir()

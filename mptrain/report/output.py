"""The files of a comparison: ``report.html`` for people, ``report.md`` for a pull request, ``report.json`` for
programs."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mptrain.report.compare_page import page
from mptrain.report.comparison import Comparison
from mptrain.report.markdown import markdown as as_markdown
from mptrain.settings import to_plain


def write_all(comparison: Comparison, folder: Path) -> list[Path]:
    """Write the three into ``folder``, each whole or not at all; returns their paths."""
    html = folder / "report.html"
    return [
        write(html, page(comparison, links(comparison, html))),
        write(folder / "report.md", as_markdown(comparison)),
        write(folder / "report.json", as_json(comparison)),
    ]


def write_asked(comparison: Comparison, *, html: Path | None, markdown: Path | None, json: Path | None) -> None:
    """Write those that have a path."""
    if html:
        write(html, page(comparison, links(comparison, html)))
    if markdown:
        write(markdown, as_markdown(comparison))
    if json:
        write(json, as_json(comparison))


def write(path: Path, text: str) -> Path:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text)
    os.replace(partial, path)
    return path


def links(comparison: Comparison, page_path: Path) -> dict[str, str]:
    """Folder of each run -> the link to it from a page at ``page_path``, relative and quoted."""
    folders = {row.folder for group in comparison.groups for variant in group.variants for row in variant.runs}
    start = page_path.parent.resolve()
    relative = {folder: Path(os.path.relpath(Path(folder).resolve(), start)).as_posix() for folder in folders}
    return {folder: quote(path) + "/" for folder, path in relative.items()}


def as_json(comparison: Comparison) -> str:
    """All of it; null for what is not known."""
    return json.dumps(_finite(to_plain(comparison)), indent=1, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""The files of a comparison: ``report.html`` for people, ``report.md`` for a pull request, ``report.json`` for
programs."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import quote

from mptrain.report.compare.comparison import Comparison
from mptrain.report.compare.markdown import markdown as as_markdown
from mptrain.report.compare.page import page
from mptrain.report.deploy.matrix import FILE, Matrix, read
from mptrain.report.deploy.page import markdown_parts, section
from mptrain.tools.files import json_text, write_whole
from mptrain.tools.settings import to_plain


def write_all(comparison: Comparison, folder: Path) -> list[Path]:
    """Write the three into ``folder``, each whole or not at all; returns their paths. With the deployment matrix, if
    there is one in the folder."""
    html, markdown, data = paths = [folder / f"report.{kind}" for kind in ("html", "md", "json")]
    write_asked(comparison, html=html, markdown=markdown, data=data, deployed=read(folder / FILE))
    return paths


def write_asked(
    comparison: Comparison,
    *,
    html: Path | None,
    markdown: Path | None,
    data: Path | None,
    deployed: Matrix | None = None,
) -> None:
    """Write those that have a path; ``data``: the JSON, which leaves out the deployment matrix (it has a file)."""
    if html:
        more = section(deployed) if deployed else ""
        write_whole(html, page(comparison, links(comparison, html), more))
    if markdown:
        write_whole(markdown, as_markdown(comparison, markdown_parts(deployed) if deployed else ()))
    if data:
        write_whole(data, as_json(comparison))


def links(comparison: Comparison, page_path: Path) -> dict[str, str]:
    """Folder of each run -> the link to it from a page at ``page_path``, relative and quoted."""
    folders = {row.folder for group in comparison.groups for variant in group.variants for row in variant.runs}
    start = page_path.parent.resolve()
    relative = {folder: Path(os.path.relpath(Path(folder).resolve(), start)).as_posix() for folder in folders}
    return {folder: quote(path) + "/" for folder, path in relative.items()}


def as_json(comparison: Comparison) -> str:
    """All of it; null for what is not known, infinities as text."""
    return json_text(to_plain(comparison), indent=1) + "\n"

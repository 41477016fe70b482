"""The files of a comparison: ``report.html``, ``report.md`` for a pull request, ``report.json`` for programs."""

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
    """Write all three into ``folder``, each atomically, with its deployment matrix if there is one; return their
    paths."""
    html, markdown, data = paths = [folder / f"report.{kind}" for kind in ("html", "md", "json")]
    write_files(comparison, html=html, markdown=markdown, data=data, deployed=read(folder / FILE))
    return paths


def write_files(
    comparison: Comparison,
    *,
    html: Path | None,
    markdown: Path | None,
    data: Path | None,
    deployed: Matrix | None = None,
) -> None:
    """Write those that have a path; ``data``: the JSON, without the deployment matrix (which has its own file)."""
    if html:
        more = section(deployed) if deployed else ""
        write_whole(html, page(comparison, links(comparison, html), more))
    if markdown:
        write_whole(markdown, as_markdown(comparison, markdown_parts(deployed) if deployed else ()))
    if data:
        write_whole(data, as_json(comparison))


def links(comparison: Comparison, page_path: Path) -> dict[str, str]:
    """Map the folder of each run to the link to it from a page at ``page_path``, relative and quoted."""
    folders = {row.folder for group in comparison.groups for variant in group.variants for row in variant.runs}
    start = page_path.parent.resolve()
    relative = {folder: Path(os.path.relpath(Path(folder).resolve(), start)).as_posix() for folder in folders}
    return {folder: quote(path) + "/" for folder, path in relative.items()}


def as_json(comparison: Comparison) -> str:
    """Return the whole comparison as JSON; null for unknown values, infinities as text."""
    return json_text(to_plain(comparison), indent=1) + "\n"

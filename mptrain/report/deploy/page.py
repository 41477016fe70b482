"""The deployment matrix as a section of the report, in HTML and in Markdown."""

from __future__ import annotations

from collections.abc import Callable

from mptrain.report import wording
from mptrain.report.compare.markdown import listed
from mptrain.report.deploy import cells
from mptrain.report.deploy.matrix import Matrix
from mptrain.report.html import render
from mptrain.report.tables import Cell, Column, markdown_table, plain

TITLE = "Deployed in another format"


def section(matrix: Matrix) -> str:
    """Return a square of training precision x deployment format, then all figures of each cell, in HTML."""
    return render(
        "deploy.html",
        title=TITLE,
        explained=_explained(matrix),
        square_columns=_square(matrix),
        square=[(name, name, name) for name in matrix.trained],
        columns=cells.columns(matrix),
        rows=[(cells.name(cell), cells.name(cell), cell) for cell in matrix.cells],
        notes=matrix.notes,
    )


def markdown_parts(matrix: Matrix) -> list[str]:
    """Return the same two tables in Markdown."""
    trained = [([plain(name)], name) for name in matrix.trained]
    each = [([plain(cells.name(cell))], cell) for cell in matrix.cells]
    return [
        f"#### {TITLE}",
        plain(_explained(matrix)),
        markdown_table(["trained in"], _square(matrix), trained),
        markdown_table(["trained > deployed"], cells.columns(matrix), each),
        *([listed(matrix.notes)] if matrix.notes else []),
    ]


def _explained(matrix: Matrix) -> str:
    figure = (
        f"{matrix.metric.capitalize()} by the format deployed in; in brackets the change from the same runs in FP32."
    )
    return f"{figure} {cells.overview(matrix)}"


def _square(matrix: Matrix) -> list[Column[str]]:
    """Return a column for each deployment format; its rows are the training precisions."""
    return [Column(name, name, name, _pick(matrix, name)) for name in matrix.deployed]


def _pick(matrix: Matrix, deployed: str) -> Callable[[str], Cell]:
    """Return the function that makes a column's cell."""
    columns = {column.key: column for column in cells.columns(matrix)}

    def shown(trained: str) -> Cell:
        cell = matrix.cell(trained, deployed)
        if cell is None or cell.metric is None:
            return Cell(wording.UNKNOWN)
        figure = columns["metric"].cell(cell)
        text = figure.text.partition(" [")[0]
        own = cell.own_delta
        if own is not None:
            unit = "%" if matrix.metric == "perplexity" else "pt"
            text += f" ({wording.signed(100 * own.mean)} {unit})"
        return Cell(text, figure.value, figure.more)

    return shown

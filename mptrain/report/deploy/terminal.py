"""A deployment matrix, and the evaluation of one quantized model, for the terminal."""

from __future__ import annotations

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mptrain.report import wording
from mptrain.report.compare.comparison import Interval
from mptrain.report.compare.intervals import perplexity
from mptrain.report.deploy import cells
from mptrain.report.deploy.matrix import Deployed, Evaluation, Matrix
from mptrain.report.tables import compact_table, fitting, print_left_out, table_of

SHOWN = 10  # worst layers to show
DROPPED = ("layers", "worst_layer", "same_frac", "kl_nats", "size_frac", "base_delta", "speed_ratio")


def print_matrix(console: Console, matrix: Matrix) -> None:
    """Print a row per cell.

    A narrow terminal hides the least important columns and names them; numbers are never cut.
    """
    console.print(Text(matrix.title, "bold"), soft_wrap=True)
    columns, rows = [column for column in cells.columns(matrix) if column.key != "why"], matrix.cells
    width = console.width - max(map(cell_len, ("trained > deployed", *map(cells.name, rows))))
    shown = fitting(columns, rows, width, DROPPED)
    table = compact_table(["trained > deployed"], shown)
    for cell in matrix.cells:
        figures = [Text(column.cell(cell).text) for column in shown]
        table.add_row(Text(cells.name(cell)), *figures, end_section=_last_of_row(matrix, cell))
    console.print(table)
    print_left_out(console, columns, shown)
    for cell in matrix.cells:
        if cell.why:
            console.print(Text(f"{cells.name(cell)}: {cell.why}", "yellow"))
    for note in (cells.overview(matrix), *matrix.notes):
        console.print(Text(note))


def _last_of_row(matrix: Matrix, cell: Deployed) -> bool:
    return cell is [other for other in matrix.cells if other.trained == cell.trained][-1]


ROOMY = 110
"""Columns from which on an interval is written behind its mean, not below it."""


def print_evaluation(console: Console, evaluation: Evaluation, name: str) -> None:
    """Print before and after, the difference with its interval, then latencies, then the worst layers."""
    console.print(Text(f"{name} vs. original", "bold"), soft_wrap=True)
    table = table_of(["figure (95 %)"], ("before", "after", "difference"), pad_edge=False, show_edge=False)
    for figures in _figures(evaluation):
        lines = [figure.replace(" [", "\n[") for figure in figures] if console.width < ROOMY else figures
        table.add_row(*map(Text, lines))
    console.print(table)
    same = f"top-1 agreement {100 * evaluation.same_frac:.2f} % of {evaluation.predictions:,} {evaluation.unit}"
    kl, worst = evaluation.kl_nats, evaluation.kl_worst
    console.print(Text(f"KL(before || after) {wording.interval(kl, '.2e')} nats, worst {worst:.2e}; {same}"))
    for row in evaluation.latencies:
        speed = f"{row.units_per_s:,.0f} {evaluation.unit}/s, {wording.ratio(row.speed_ratio)}"
        ends = wording.span(row.low, row.high)
        console.print(
            Text(f"batch {row.batch}: {row.ms:.2f} ms (before {row.reference_ms:.2f}), {speed} the speed{ends}")
        )
    if evaluation.latencies:
        where = f"speed measured on {evaluation.machine}{cells.no_gpu(evaluation.device)}"
        console.print(Text(where, "dim"))
    if evaluation.layers:
        console.print(_layers(evaluation))


def _figures(evaluation: Evaluation) -> list[tuple[str, str, str, str]]:
    before, after, delta = evaluation.reference_loss, evaluation.loss, evaluation.loss_delta
    rows = [("loss (nats)", *_both(before, after, ".4f"), wording.interval(delta, "+.5f"))]
    if evaluation.unit == "tokens":
        first, second, ratio = (perplexity(interval) for interval in (before, after, delta))
        change = Interval(ratio.mean - 1, ratio.low - 1, ratio.high - 1, ratio.n, ratio.method)
        rows.append(("perplexity", *_both(first, second, ".3f"), wording.delta(change)))
    if evaluation.top1 and evaluation.reference_top1:
        shares = _both(evaluation.reference_top1, evaluation.top1, ".2%")
        rows.append(("top-1", *shares, wording.delta(evaluation.top1_delta, "pt")))
    return rows


def _both(before: Interval, after: Interval, form: str) -> tuple[str, str]:
    return wording.interval(before, form), wording.interval(after, form)


def _layers(evaluation: Evaluation) -> Table:
    count = len(evaluation.layers)
    first = f"layer (the worst {SHOWN} of {count})" if count > SHOWN else "layer"
    known = any(row.weight_db is not None for row in evaluation.layers)
    heads = ("its own SQNR", "with those before it", *(["of its weight"] if known else []))
    table = table_of([first], heads, pad_edge=False, show_edge=False)
    for row in evaluation.layers[:SHOWN]:
        values = (row.own_db, row.output_db, *([row.weight_db] if known else []))
        table.add_row(Text(row.layer), *(Text(wording.UNKNOWN if v is None else f"{v:.1f} dB") for v in values))
    return table

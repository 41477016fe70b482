"""``report.html`` of ``mptrain compare``: one file, no script, no network; prints on A4 and reads on a phone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from mptrain.report.compare import cells
from mptrain.report.compare.comparison import Comparison, Group, RunRow, Variant
from mptrain.report.compare.figures import figures, styles_of
from mptrain.report.draw.axes import sample
from mptrain.report.html import breakable, render
from mptrain.report.tables import Cell, Column


def page(comparison: Comparison, links: Mapping[str, str] | None = None, more: str = "") -> str:
    """Return the whole HTML text.

    ``links``: the folder of a run -> where its name links to (a relative, quoted address). ``more``: further sections,
    HTML.
    """
    return render(
        "compare.html",
        title=comparison.title,
        groups=[_group(group, comparison.margin_frac, links or {}) for group in comparison.groups],
        several=len(comparison.groups) > 1,
        runs=sum(len(variant.runs) for group in comparison.groups for variant in group.variants),
        margin_frac=comparison.margin_frac,
        rules=comparison.rules,
        notes=comparison.notes,
        more=more,
    )


def _group(group: Group, margin: float, links: Mapping[str, str]) -> dict[str, Any]:
    """Return the figures and the rows of a group's three tables; a row is its head, its key and what columns read."""
    verdict = Column[Variant]("verdict", "verdict", "", lambda v: Cell(v.verdict.kind.value), numeric=False)
    details = cells.detail_columns(group)
    return {
        "label": group.label,
        "name": group.label or f"{group.task} runs",
        "baseline": group.baseline,
        "variants": group.variants,
        "figures": figures(group, margin) if group.variants else [],
        "summary_columns": [verdict, *cells.summary_columns(group)],
        "swatched": [
            (_swatch(style) + breakable(v.label), v.label, v)
            for v, style in zip(group.variants, styles_of(group), strict=True)
        ],
        "detail_columns": details,
        "details": [(breakable(v.label), v.label, v) for v in group.variants],
        "explains_speed": any(column.key in ("mfu_frac", "limit") for column in details),
        "speed_notes": [f"{v.label}: {v.speed.note}" for v in group.variants if v.speed.note],
        "run_columns": _run_columns(group),
        "runs": [(_link(run, links), run.name, run) for variant in group.variants for run in variant.runs],
    }


def _run_columns(group: Group) -> list[Column[RunRow]]:
    """List the columns of the runs, with the variant of each and why it does not count."""
    owner = {id(run): variant.label for variant in group.variants for run in variant.runs}
    variant = Column[RunRow]("variant", "variant", "", lambda r: Cell(owner[id(r)]), numeric=False)
    why = Column[RunRow]("why", "why", "", lambda r: Cell(r.why), numeric=False)
    doubted = any(run.why for owned in group.variants for run in owned.runs)
    return [variant, *cells.run_columns(group), *([why] if doubted else [])]


def _link(run: RunRow, links: Mapping[str, str]) -> Markup:
    name = Markup("<span title='{}'>{}</span>").format(run.folder, breakable(run.name))
    return Markup("<a href='{}'>{}</a>").format(links[run.folder], name) if run.folder in links else name


def _swatch(style: Any) -> Markup:
    """Draw the variant's line as the figures do."""
    shape = sample(1, 6, style)
    return Markup(f"<svg width='28' height='12' viewBox='0 0 28 12' aria-hidden='true'>{shape}</svg>")

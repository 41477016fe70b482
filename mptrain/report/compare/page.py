"""``report.html`` of ``mptrain compare``: one file, no script, no network; prints on A4 and reads on a phone.

Every number in a table has its exact value beside what is shown: ``<td data-key='fp8/val' data-value='2.40312'>``, the
label of the variant (the name of the run) and the field. An unknown one has no ``data-value``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from mptrain.report.compare import cells
from mptrain.report.compare.cells import Cell, Column
from mptrain.report.compare.comparison import Comparison, Group, Kind, RunRow, Variant
from mptrain.report.compare.figures import figures, styles_of
from mptrain.report.draw.axes import sample
from mptrain.runs.read import Status

EXPLAINED = (
    "MFU: the model's FLOPs a second over the rate of the formats that its GEMMs really ran in: of a GPU the vendor's "
    "dense peak, of a CPU what one large product reached when the run began. Limit of the speed: the baseline's step "
    "with its GEMMs, and nothing else, as fast as these formats allow (Amdahl); reached of it: of the time that this "
    "would save, the share that was saved. Both GEMM times come from those rates."
)
STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { font: 14px/1.45 system-ui, Segoe UI, Helvetica, Arial, sans-serif; color: #222; background: #fff;
       max-width: 1040px; margin: 24px auto; padding: 0 16px; overflow-wrap: anywhere; }
h1 { font-size: 21px; margin: 0 0 6px; } h2 { font-size: 17px; margin: 34px 0 8px; border-top: 2px solid #222;
     padding-top: 10px; } h3 { font-size: 14px; margin: 0 0 4px; }
p { margin: 4px 0 10px; max-width: 85ch; } .none { color: #555; }
.verdicts { list-style: none; padding: 0; margin: 10px 0 14px; }
.verdicts li { display: flex; gap: 8px; padding: 3px 0; break-inside: avoid; }
.verdicts svg { flex: none; margin-top: 3px; } .why { color: #555; }
.wide { overflow-x: auto; } figure svg { display: block; max-width: 100%; min-width: 780px; height: auto; }
figure { margin: 22px 0; break-inside: avoid; } figcaption { color: #555; max-width: 85ch; margin-top: 2px; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 6px; text-align: left; vertical-align: top; border-bottom: 1px solid #ddd;
         overflow-wrap: normal; }
.n { text-align: right; white-space: nowrap; } .word { white-space: nowrap; }
thead th, thead th.n { border-bottom: 2px solid #222; vertical-align: bottom; font-weight: 600; white-space: normal; }
tbody th { font-weight: 600; } .label { min-width: 17em; max-width: 24em; overflow-wrap: break-word; }
.long { min-width: 9em; max-width: 24em; overflow-wrap: break-word; }
tbody th, thead th:first-child { position: sticky; left: 0; background: #fff; }
tr { break-inside: avoid; } th svg, td svg { vertical-align: -2px; margin-right: 4px; }
.bad { color: #a33f00; font-weight: 600; }
details { margin: 10px 0; } summary { cursor: pointer; font-weight: 600; } ul { padding-left: 1.3em; margin: 6px 0; }
@media screen and (max-width: 700px) { .long { min-width: 17em; } }
@page { margin: 12mm; }
@media print { body { max-width: none; margin: 0; padding: 0; font-size: 11px; } .wide { overflow: visible; }
  figure svg { min-width: 0; } table { font-size: 8.5px; } th, td { padding: 2px 4px; }
  .label, .long { min-width: 0; } tbody th, thead th:first-child { position: static; }
  details::details-content { content-visibility: visible; }
  h2, h3, summary { break-after: avoid; } a { color: inherit; } }
"""
# Shapes that stay apart without their colour; the word stands beside each.
ICONS = {
    Kind.baseline: "<rect x='2' y='2' width='10' height='10' fill='#222222'/>",
    Kind.equivalent: "<circle cx='7' cy='7' r='6.5' fill='#009e73'/>"
    "<path d='M3.8 7.2L6.2 9.6L10.4 4.8' fill='none' stroke='#fff' stroke-width='1.8'/>",
    Kind.worse: "<polygon points='0.5,2 13.5,2 7,13' fill='#d55e00'/>",
    Kind.undecided: "<circle cx='7' cy='7' r='5.6' fill='none' stroke='#0072b2' stroke-width='1.8' "
    "stroke-dasharray='3 1.6'/>",
    Kind.diverged: "<path d='M2 2L12 12M12 2L2 12' stroke='#a33f00' stroke-width='3' fill='none'/>",
    Kind.none: "<path d='M2 7H12' stroke='#777777' stroke-width='2.6'/>",
}
LONG = ("coverage", "variant", "why")  # columns of words that may go on in a second line
FITS = 24  # characters of a label that stay in one line
DOUBTFUL = (Status.failed, Status.unreadable)


def page(comparison: Comparison, links: Mapping[str, str] | None = None, more: str = "") -> str:
    """The whole HTML text. ``links``: the folder of a run -> where its name links to (a relative, quoted address).
    ``more``: further sections, HTML."""
    several = len(comparison.groups) > 1
    body = [f"<h1>{escape(comparison.title)}</h1>", f"<p>{_overview(comparison)}</p>"]
    for group in comparison.groups:
        body += [f"<h3>{escape(_named(group))}</h3>"] if several else []
        body.append(f"<ul class='verdicts'>{''.join(map(_conclusion, group.variants))}</ul>")
    if not several:
        body += [_summary(group) for group in comparison.groups]
    body.append(_rules(comparison))
    for group in comparison.groups:
        body.append(_group(group, comparison.margin_frac, links or {}, several=several))
    body.append(more)
    if comparison.notes:
        body += ["<h2>Notes</h2>", listed(comparison.notes)]
    head = "<meta charset='utf-8'><meta name='viewport' content='width=device-width, initial-scale=1'>"
    head += f"<link rel='icon' href='data:,'><title>{escape(comparison.title)}</title><style>{STYLE}</style>"
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{''.join(body)}</body></html>\n"


def _overview(comparison: Comparison) -> str:
    runs = sum(len(variant.runs) for group in comparison.groups for variant in group.variants)
    groups = len(comparison.groups)
    if not runs and not groups:
        return "No runs to compare."
    parts = f" in {groups} groups that are not comparable with each other" if groups > 1 else ""
    margin = comparison.margin_frac
    shown = f"<span data-key='margin_frac' data-value='{margin!r}'>{100 * margin:g} %</span>"
    return f"{runs} run{'' if runs == 1 else 's'}{parts}. Margin of equivalence: {shown}."


def _conclusion(variant: Variant) -> str:
    """Icon, name, the verdict in words, and what it follows from."""
    verdict = variant.verdict
    why = f" <span class='why'>{escape(verdict.why)}</span>" if verdict.why else ""
    said = (
        f"<div><b>{escape(variant.label)}</b>: {escape((verdict.text or verdict.kind.value).rstrip('.'))}.{why}</div>"
    )
    return f"<li data-kind='{escape(verdict.kind.value)}'>{_icon(verdict.kind)}{said}</li>"


def _icon(kind: Kind) -> str:
    return f"<svg width='14' height='14' viewBox='0 0 14 14' aria-hidden='true'>{ICONS[kind]}</svg>"


def _rules(comparison: Comparison) -> str:
    if not comparison.rules:
        return ""
    head = "<summary>How a verdict follows from the figures</summary>"
    return f"<details class='rules'>{head}{listed(comparison.rules)}</details>"


def _group(group: Group, margin: float, links: Mapping[str, str], *, several: bool) -> str:
    parts = [f"<h2>{escape(_named(group))}</h2>", _summary(group)] if several else []
    if not group.variants:
        return f"<section data-group='{escape(group.label)}'>{''.join(parts)}</section>"
    if group.baseline is None:
        parts.append(
            "<p class='none'>No baseline in this group: nothing is judged, the figures stand for themselves.</p>"
        )
    parts += ["<h2>Figures</h2>" if not several else "", *figures(group, margin)]
    parts += ["<h3>Details</h3>" if several else "<h2>Details</h2>", _details(group)]
    parts += ["<h3>Runs</h3>" if several else "<h2>Runs</h2>", _runs(group, links)]
    return f"<section data-group='{escape(group.label)}'>{''.join(parts)}</section>"


def _named(group: Group) -> str:
    return group.label or f"{group.task} runs"


def _summary(group: Group) -> str:
    if not group.variants:
        return "<p class='none'>No variants in this group.</p>"
    columns = cells.summary_columns(group)
    verdict = Column[Variant]("verdict", "verdict", "", lambda v: Cell(v.verdict.kind.value), numeric=False)
    rows = [
        (_swatch(style) + _breakable(v.label), v.label, v)
        for v, style in zip(group.variants, styles_of(group), strict=True)
    ]
    icons = {"verdict": lambda v: _icon(v.verdict.kind)}
    return table_of("summary", "variant", [verdict, *columns], rows, icons)


def _details(group: Group) -> str:
    """Figures that not everybody asks for, and what is said about speeds."""
    columns = cells.detail_columns(group)
    if not columns:
        return "<p class='none'>Nothing more is known of these variants.</p>"
    notes = [f"{v.label}: {v.speed.note}" for v in group.variants if v.speed.note]
    table = table_of("details", "variant", columns, [(_breakable(v.label), v.label, v) for v in group.variants])
    said = f"<p>{escape(EXPLAINED)}</p>" if any(column.key in ("mfu_frac", "limit") for column in columns) else ""
    return table + said + (listed(notes) if notes else "")


def _runs(group: Group, links: Mapping[str, str]) -> str:
    """One line a run, with its variant and why it does not count."""
    pairs = [(variant, run) for variant in group.variants for run in variant.runs]
    if not pairs:
        return "<p class='none'>No runs.</p>"
    owner = {id(run): variant.label for variant, run in pairs}
    variant = Column[RunRow]("variant", "variant", "", lambda r: Cell(owner[id(r)]), numeric=False)
    why = Column[RunRow]("why", "why", "", lambda r: Cell(r.why), numeric=False)
    columns = [variant, *cells.run_columns(group), *([why] if any(run.why for _, run in pairs) else [])]
    return table_of("runs", "run", columns, [(_link(run, links), run.name, run) for _, run in pairs])


def _link(run: RunRow, links: Mapping[str, str]) -> str:
    name = f"<span title='{escape(run.folder)}'>{_breakable(run.name)}</span>"
    return f"<a href='{escape(links[run.folder])}'>{name}</a>" if run.folder in links else name


def table_of(
    name: str,
    first: str,
    columns: Sequence[Column[Any]],
    rows: Sequence[tuple[str, str, Any]],
    before: Mapping[str, Any] | None = None,
) -> str:
    """``rows``: the head of the row as HTML, its key, and what the columns read. ``before``: HTML before a cell."""
    heads = "".join(f"<th scope='col'{_side(column)}>{_joined(column.head)}</th>" for column in columns)
    lines = []
    for head, key, row in rows:
        found = "".join(_cell(key, column, column.cell(row), (before or {}).get(column.key), row) for column in columns)
        kind = "label" if len(key) > FITS else "word"
        lines.append(f"<tr><th scope='row' class='{kind}'>{head}</th>{found}</tr>")
    head_row = f"<thead><tr><th scope='col'>{escape(first)}</th>{heads}</tr></thead>"
    return f"<div class='wide'><table data-table='{name}'>{head_row}<tbody>{''.join(lines)}</tbody></table></div>"


def _cell(key: str, column: Column[Any], cell: Cell, before: Any, row: Any) -> str:
    values = f" data-key='{escape(f'{key}/{column.key}')}'"
    if cell.value is not None:
        values += f" data-value='{_exact(cell.value)}'"
    values += "".join(f" data-{escape(name)}='{_exact(value)}'" for name, value in cell.more.items())
    bad = column.key == "status" and row.status in DOUBTFUL
    inner = f"<span class='bad'>{escape(cell.text)}</span>" if bad else _joined(cell.text)
    return f"<td{_side(column)}{values}>{before(row) if before else ''}{inner}</td>"


def _breakable(label: str) -> str:
    """A label; a long one may go on in the next line after a mark, not only after a space."""
    if len(label) <= FITS:
        return escape(label)
    return "<wbr>".join(map(escape, re.split(r"(?<=[.=_/,:|])(?=[^.=_/,:|])", label)))


def _joined(words: str) -> str:
    """Words whose numbers keep to their ``%``."""
    return escape(words).replace(" %", "&nbsp;%")


def _side(column: Column[Any]) -> str:
    return f" class='{'n' if column.numeric else 'long' if column.key in LONG else 'word'}'"


def _exact(value: Any) -> str:
    return escape(repr(value) if isinstance(value, float) else str(value))


def _swatch(style: Any) -> str:
    """How the variant is drawn in the figures."""
    return f"<svg width='28' height='12' viewBox='0 0 28 12' aria-hidden='true'>{sample(1, 6, style)}</svg>"


def listed(sentences: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(sentence)}</li>' for sentence in sentences)}</ul>"

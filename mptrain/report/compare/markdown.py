"""A comparison as GitHub's Markdown, for a pull request."""

from __future__ import annotations

from collections.abc import Sequence

from mptrain.report import wording
from mptrain.report.compare import cells
from mptrain.report.compare.comparison import Comparison, Group, Variant
from mptrain.report.tables import markdown_table, plain


def markdown(comparison: Comparison, more: Sequence[str] = ()) -> str:
    """Render a table of verdicts for each group, the figures behind them, the rules folded, further parts, then the
    notes."""
    parts = [f"### {plain(comparison.title)}"]
    for group in comparison.groups:
        parts += [f"#### {plain(group.label or f'{group.task} runs')}"] if len(comparison.groups) > 1 else []
        if not group.variants:
            parts.append("No variants in this group.")
            continue
        parts += [_table(group), *([_reasons(group)] if any(v.verdict.why for v in group.variants) else [])]
    if not comparison.groups:
        parts.append("No runs to compare.")
    if comparison.rules:
        rules = listed(comparison.rules)
        parts.append(f"<details><summary>How a verdict follows from the figures</summary>\n\n{rules}\n\n</details>")
    parts += more
    if comparison.notes:
        parts += ["**Notes**", listed(comparison.notes)]
    return "\n\n".join(parts) + "\n"


def _table(group: Group) -> str:
    rows = [([plain(variant.label), _verdict(variant)], variant) for variant in group.variants]
    return markdown_table(("variant", "verdict"), cells.summary_columns(group), rows)


def _verdict(variant: Variant) -> str:
    verdict = variant.verdict
    return f"{wording.SIGNS[verdict.kind]} {plain(verdict.text or verdict.kind.value)}"


def _reasons(group: Group) -> str:
    return listed([f"{v.label}: {v.verdict.why}" for v in group.variants if v.verdict.why])


def listed(sentences: Sequence[str]) -> str:
    return "\n".join(f"- {plain(sentence)}" for sentence in sentences)

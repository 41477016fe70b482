"""A comparison as GitHub's Markdown, for a pull request."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from mptrain.report import wording
from mptrain.report.compare import cells
from mptrain.report.compare.comparison import Comparison, Group, Variant


def markdown(comparison: Comparison, more: Sequence[str] = ()) -> str:
    """A table of verdicts for each group, what they follow from, the rules folded, further parts, then the notes."""
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


def plain(text: str) -> str:
    """The text in one line, with nothing in it that Markdown or HTML would take for markup."""
    flat = escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", flat)


def _table(group: Group) -> str:
    columns = cells.summary_columns(group)
    heads = ["variant", "verdict", *(column.head for column in columns)]
    rules = ["---", "---", *("---:" if column.numeric else "---" for column in columns)]
    rows = [row([plain(head) for head in heads]), row(rules)]
    for variant in group.variants:
        figures = [plain(column.cell(variant).text) for column in columns]
        rows.append(row([plain(variant.label), _verdict(variant), *figures]))
    return "\n".join(rows)


def _verdict(variant: Variant) -> str:
    verdict = variant.verdict
    return f"{wording.SIGNS[verdict.kind]} {plain(verdict.text or verdict.kind.value)}"


def _reasons(group: Group) -> str:
    return listed([f"{v.label}: {v.verdict.why}" for v in group.variants if v.verdict.why])


def row(found: Sequence[str]) -> str:
    return f"| {' | '.join(found)} |"


def listed(sentences: Sequence[str]) -> str:
    return "\n".join(f"- {plain(sentence)}" for sentence in sentences)

"""The table of ``mptrain doctor --audit``: requested and actual precision of each kind of layer."""

from __future__ import annotations

from collections import defaultdict

from rich.console import Console
from rich.table import Table

from mptrain.telemetry.coverage import Audit, Row, kind_of
from mptrain.telemetry.products import joined

Cells = tuple[str, str, str, str, str]


def print_audit(console: Console, audit: Audit) -> None:
    """Print one row per group of equal products (equal layers of all blocks are one), the shares, then the problems."""
    table = Table(box=None, header_style="bold")
    for name in ("layer", "GEMM", "asked", "ran", "evidence"):
        table.add_column(name, no_wrap=True)
    table.add_column("FLOPs", justify="right", no_wrap=True)
    for cells, share in audit_rows(audit):
        table.add_row(*cells, f"{100 * share:.1f} %")
    console.print(table)
    console.print(f"GEMM FLOPs: {audit.line()}", highlight=False, soft_wrap=True)
    problems = audit.problems()
    for problem in problems:
        console.print(f"problem: {problem}", highlight=False, markup=False, soft_wrap=True)
    if not problems:
        console.print("OK: every GEMM ran in the requested precision", highlight=False)


def audit_rows(audit: Audit) -> list[tuple[Cells, float]]:
    """Return (layer, GEMMs, asked, ran, evidence) and their share of the FLOPs, layer by layer in the order of the
    forward."""
    groups: dict[tuple[str, str, str, str], list[Row]] = defaultdict(list)
    for row in audit.rows:
        groups[kind_of(row.layer), _lines(row.asked), _lines(row.ran), _evidence(row)].append(row)
    order = list(dict.fromkeys(kind for kind, *_ in groups))
    table_rows = []
    for key in sorted(groups, key=lambda key: order.index(key[0])):
        rows = groups[key]
        gemms = "\n".join(dict.fromkeys(_title(row) for row in rows))
        table_rows.append(((key[0], gemms, *key[1:]), sum(row.flops for row in rows) / max(1, audit.flops)))
    return table_rows


def _title(row: Row) -> str:
    """Return ``output``, ``grad_input``, ``grad_weight``, ``attention``, or a later stage of it: recompute,
    backward."""
    return row.gemm if row.gemm.startswith("grad") or row.stage == "forward" else row.stage


def _lines(names: tuple[str, ...]) -> str:
    return joined(names).replace(" x ", " x\n")


def _evidence(row: Row) -> str:
    if row.claimed:
        return row.evidence.replace(" by ", "\nby ")
    return row.evidence if row.ran == row.carrier else f"{row.evidence},\nin {joined(row.carrier)}"

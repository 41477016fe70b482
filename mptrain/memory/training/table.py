"""A plan of training in the terminal: precisions side by side, what fits, what to turn on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mptrain.memory.training.fit import Remedy
from mptrain.memory.training.live import ROLES, UPDATE
from mptrain.memory.training.plan import TrainingPlan
from mptrain.memory.units import GIB, gib

FEW = 2**27  # bytes; what is smaller in all is told in MiB


def print_plans(console: Console, title: str, plans: Sequence[TrainingPlan]) -> None:
    """The first is the one asked for; its activations are told by operation."""
    unit = _unit(plans)
    console.print(Text(title, "bold"))
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False, show_edge=False)
    table.add_column(f"{unit} at the peak of a step", overflow="fold")
    for one in plans:
        table.add_column(one.precision, justify="right", no_wrap=True)
    used = {role for one in plans for role in one.roles}
    for role in [role for role in ROLES if role in used]:
        table.add_row(role, *(_cell(one.roles.get(role, 0), unit) for one in plans))
    for name in plans[0].assumed:
        table.add_row(f"{name}, assumed", *(_cell(one.assumed[name], unit) for one in plans), style="dim")
    table.add_section()
    table.add_row("total", *(_cell(one.total, unit) for one in plans), style="bold")
    table.add_row("the peak is in", *(_brief(one.window) for one in plans))
    table.add_row("backend", *(one.backend for one in plans))
    console.print(table)
    mine = plans[0]
    whole = sum(mine.operations.values())
    if whole:
        shares = [f"{name} {size / whole:.0%}" for name, size in mine.operations.items() if size / whole >= 0.005]
        console.print(Text(f"{mine.precision}'s activations are of {', '.join(shares)}"))
    if mine.attention:
        console.print(Text(f"attention: {mine.attention}"))


def print_fit(
    console: Console, capacity: int, plans: Sequence[TrainingPlan], batches: Mapping[str, int], sequence: int
) -> None:
    """The largest micro-batch of each precision, the longest sequence of the first."""
    mine = plans[0]
    fits = "fits" if mine.total <= capacity else f"does not fit, by {told(mine.total - capacity)}"
    console.print(Text(f"{mine.precision}, {told(mine.total)}, {fits} in {told(capacity)}", "bold"))
    sizes = [f"{name} {size:,}" if size else f"{name} none" for name, size in batches.items()]
    console.print(Text(f"largest trainer.batch_size of a rank: {', '.join(sizes)}"))
    if sequence:
        console.print(Text(f"longest model.block_size at batch {mine.batch_size}: {sequence:,} ({mine.precision})"))


def print_remedies(console: Console, tried: Sequence[Remedy], capacity: int) -> None:
    console.print(Text("what would save memory", "bold"))
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False, show_edge=False)
    for name in ("settings", "saves", "total", "fits", "cost"):
        table.add_column(name, justify="right" if name in ("saves", "total") else "left", overflow="fold")
    for one in tried:
        fits = "yes" if one.plan.total <= capacity else "no"
        table.add_row(one.settings, told(one.saved), told(one.plan.total), fits, one.cost)
    console.print(table)


def told(size: int) -> str:
    """Write bytes in GiB, or in MiB where that says more."""
    return gib(size) if size >= FEW else f"{size / 2**20:,.2f} MiB"


def _unit(plans: Sequence[TrainingPlan]) -> str:
    return "GiB" if max(one.total for one in plans) >= FEW else "MiB"


def _cell(size: int, unit: str) -> str:
    if not size:
        return "-"
    value = size / (GIB if unit == "GiB" else 2**20)
    return f"{value:,.2f}" if value >= 0.095 else f"{value:.1g}"


def _brief(window: str) -> str:
    return "update" if window == UPDATE else window.split()[-1]

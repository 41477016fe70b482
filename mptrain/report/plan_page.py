"""The memory plan as one HTML file: one bar per precision, stacked by role."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from mptrain.report.compare.comparison import Memory
from mptrain.report.draw.axes import styles_of
from mptrain.report.draw.bars import Stack, stacks_svg
from mptrain.report.html import render

GIB = 2**30


class Planned(Protocol):
    """The bars of a plan: bytes by role, the assumed ones separately."""

    @property
    def precision(self) -> str: ...
    @property
    def roles(self) -> Mapping[str, int]: ...
    @property
    def assumed(self) -> Mapping[str, int]: ...
    @property
    def total(self) -> int: ...


def page(title: str, plans: Sequence[Planned], capacity: int = 0) -> str:
    """Return the whole HTML text; ``capacity``: bytes of the device, 0 if not known."""
    rows = []
    for plan, style in zip(plans, styles_of([plan.precision for plan in plans]), strict=True):
        roles = {role: size / GIB for role, size in [*plan.roles.items(), *plan.assumed.items()]}
        rows.append(Stack(style, plan.precision, f"{plan.total / GIB:,.3g} GiB", Memory(plan.total / GIB, None, roles)))
    notes = ["Bytes alive at the peak of a training step, traced on the real model without allocating it."]
    if any(plan.assumed for plan in plans):
        notes.append("The CUDA context and fragmentation are assumed, the rest is not.")
    if capacity:
        notes.append(f"The dashed line is at {capacity / GIB:,.2f} GiB.")
    return render("plan.html", title=title, notes=notes, drawn=stacks_svg(rows, capacity / GIB))

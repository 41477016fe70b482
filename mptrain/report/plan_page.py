"""The picture of a plan: one bar a precision, stacked by role, in one HTML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Protocol

from mptrain.report.compare.comparison import Memory
from mptrain.report.draw.axes import styles_of
from mptrain.report.draw.bars import Stack, stacks_svg
from mptrain.report.inspect.page import STYLE

GIB = 2**30


class Planned(Protocol):
    """Return the bars of a plan: bytes by role, those that are assumed apart."""

    @property
    def precision(self) -> str: ...
    @property
    def roles(self) -> Mapping[str, int]: ...
    @property
    def assumed(self) -> Mapping[str, int]: ...
    @property
    def total(self) -> int: ...


def page(title: str, plans: Sequence[Planned], capacity: int = 0) -> str:
    """The whole HTML text; ``capacity``: bytes there are, 0 for not known."""
    rows = []
    for one, drawn in zip(plans, styles_of([one.precision for one in plans]), strict=True):
        roles = {role: size / GIB for role, size in [*one.roles.items(), *one.assumed.items()]}
        rows.append(Stack(drawn, one.precision, f"{one.total / GIB:,.3g} GiB", Memory(one.total / GIB, None, roles)))
    notes = ["Bytes alive at the peak of a training step, traced on the real model without allocating it."]
    if any(one.assumed for one in plans):
        notes.append("The CUDA context and fragmentation are assumed, the rest is not.")
    if capacity:
        notes.append(f"The dashed line is at {capacity / GIB:,.2f} GiB.")
    body = f"<h1>{escape(title)}</h1><p>{' '.join(notes)}</p><div class='wide'>{stacks_svg(rows, capacity / GIB)}</div>"
    head = f"<meta charset='utf-8'><title>{escape(title)}</title><style>{STYLE}</style>"
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{body}</body></html>\n"

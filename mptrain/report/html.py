"""Render the HTML of every report: Jinja templates with autoescape, one stylesheet, no script, no network.

Every number in a table carries its exact value as well: ``<td data-key='fp8/val' data-value='2.40312'>``, the
label of the row and the key of the column. An unknown one has no ``data-value``.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

ONE_LINE = 24  # characters of a label that are not broken


def render(template: str, /, **shown: Any) -> str:
    """Return the HTML of a file in ``report/templates/``; text in ``shown`` is escaped, ``Markup`` is not."""
    return _environment().get_template(template).render(**shown)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("mptrain.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"breakable": breakable, "exact": exact, "joined": joined}
    environment.globals["ONE_LINE"] = ONE_LINE
    return environment


def breakable(label: str) -> Markup:
    """Let a long label break after a mark, not only after a space."""
    if len(label) <= ONE_LINE:
        return escape(label)
    return Markup("<wbr>").join(re.split(r"(?<=[.=_/,:|])(?=[^.=_/,:|])", label))


def joined(words: str) -> Markup:
    """Keep a number and its ``%`` in one line."""
    return escape(words).replace(" %", Markup("&nbsp;%"))


def exact(value: Any) -> str:
    """Return the shortest text that reads back as the same number."""
    return repr(value) if isinstance(value, float) else str(value)

"""The result of an audited step: a row for each matrix product, shares of FLOPs, and sentences about what is wrong."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from mptrain.precision.convert import ConversionReport
from mptrain.precision.policy import PrecisionPolicy
from mptrain.telemetry.products import joined

# mptrain.precision.convert.select's words: information, not a problem
KEPT_AS_ASKED = ("matches precision.keep", "matches precision.keep_default")
ROLES = {
    ("output", 2): ("input", "weight"),
    ("grad_input", 2): ("grad_output", "weight"),
    ("grad_weight", 2): ("grad_output", "input"),
    ("attention", 3): ("query", "key", "value"),
    ("attention", 4): ("grad_output", "query", "key", "value"),
}
UNKNOWN = "unknown operator"
LAYER = "<layer>"  # stands for the name in a sentence until those of all blocks are one
NAMED = 4  # layers that a line names
SHOWN = 3  # problems that an error names


@dataclass(frozen=True)
class Row:
    """Products alike in everything but their number. ``flops`` is their sum over the step, ``count`` how many.

    ``stage``: forward, recompute (a forward inside backward) or backward. ``asked``, ``ran`` and ``carrier`` have a
    format for each operand, in the order of the formula (input x weight, grad_output x weight, grad_output x input).
    ``evidence``: dtype, values, switch (see :mod:`mptrain.telemetry.products`) or ``claimed by <backend>``: the product
    was not visible, and ``ran`` is what the backend says; or ``unknown operator``, which may multiply matrices inside:
    its name is in ``gemm``, and ``ran`` has the types that it was given.
    """

    layer: str
    gemm: str
    stage: str
    asked: tuple[str, ...]
    ran: tuple[str, ...]
    carrier: tuple[str, ...]
    evidence: str
    flops: int
    count: int

    @property
    def claimed(self) -> bool:
        return self.evidence.startswith("claimed")

    @property
    def format(self) -> str:
        """Name the format that ran, E4M3 and E5M2 alike as ``fp8``: the key of :attr:`Audit.coverage`."""
        return joined(_family(ran) for ran in self.ran) + (" claimed" if self.claimed else "")


@dataclass(frozen=True)
class Audit:
    """The matrix products of one step. All shares are of their FLOPs, from 0 to 1."""

    rows: tuple[Row, ...]
    policy: PrecisionPolicy = field(default_factory=PrecisionPolicy)
    report: ConversionReport = field(default_factory=ConversionReport)

    @property
    def flops(self) -> int:
        return sum(row.flops for row in self.rows)

    @property
    def coverage(self) -> dict[str, float]:
        """Format -> share that ran in it, largest first. Claims have a key of their own: ``fp8 claimed``."""
        shares = {name: _sum(rows) / max(1, self.flops) for name, rows in self.by_format().items()}
        return dict(sorted(shares.items(), key=lambda item: -item[1]))

    @property
    def asked_coverage(self) -> float:
        """Share proven to have run in the policy's narrowest formats: the quantized ones if it has any."""
        return _sum(row for row in self._narrowest() if not row.claimed) / max(1, self.flops)

    @property
    def claimed_coverage(self) -> float:
        """Share that a backend with invisible kernels says to have run in them."""
        return _sum(row for row in self._narrowest() if row.claimed) / max(1, self.flops)

    def _narrowest(self) -> list[Row]:
        quantized = {self.policy.quantization.forward.name, self.policy.quantization.backward.name}
        wanted = quantized if self.policy.quantized else {self.policy.compute.name}
        return [row for row in self.rows if row.ran == row.asked and set(row.asked) <= wanted]

    def by_format(self) -> dict[str, list[Row]]:
        """The rows under each key of ``coverage``."""
        found: dict[str, list[Row]] = defaultdict(list)
        for row in self.rows:
            if row.evidence != UNKNOWN:
                found[row.format].append(row)
        return dict(found)

    def line(self) -> str:
        """``fp8 84.1 %, bf16 15.9 % (head, attention)``: of what ran otherwise than in the narrowest, the layers."""
        parts = []
        for name, share in self.coverage.items():
            where = "" if name.removesuffix(" claimed") == self._narrow else self._where(name)
            parts.append(f"{name} {100 * share:.1f} %{where}")
        return ", ".join(parts)

    def _where(self, name: str) -> str:
        leaves = list(dict.fromkeys(_leaf(row) for row in self.by_format()[name]))
        return f" ({', '.join(leaves[:NAMED])}{', ...' if len(leaves) > NAMED else ''})"

    @property
    def _narrow(self) -> str:
        return "fp8" if self.policy.quantized else str(self.policy.compute)

    def problems(self) -> list[str]:
        """One sentence for each thing that ran otherwise than the policy asks, most FLOPs first; empty if none."""
        if not self.rows:
            return ["no matrix product was seen in the audited step"]
        weights: dict[tuple[str, str], int] = defaultdict(int)
        layers: dict[tuple[str, str], set[str]] = defaultdict(set)
        for row, form in [*self._fallbacks(), *self._deviations()]:
            key = kind_of(row.layer), form
            weights[key] += row.flops
            layers[key].add(row.layer)
        worst = sorted(weights, key=lambda key: -weights[key])
        sentences = [self._sentence(form, layers[kind, form], weights[kind, form]) for kind, form in worst]
        return [*self._nothing_quantized(), *sentences]

    def _sentence(self, form: str, layers: set[str], flops: int) -> str:
        name = (min(layers) or "(model)") if len(layers) == 1 else f"{kind_of(min(layers))} ({len(layers)} layers)"
        share = f" ({100 * flops / max(1, self.flops):.1f} % of the GEMM FLOPs)" if flops else ""
        return form.replace(LAYER, name) + share

    def _nothing_quantized(self) -> list[str]:
        if not self.policy.quantized or any(row.format.startswith("fp8") for row in self.rows):
            return []
        kept = any(why in KEPT_AS_ASKED for why in self.report.kept.values())
        setting = "keep" if self.policy.keep else "keep_default"
        asked = f": precision.{setting}={getattr(self.policy, setting)!r} keeps every linear layer"
        why = asked if kept and not self._chosen() else ""
        return [f"nothing was quantized{why}"]

    def _chosen(self) -> bool:
        linear = {name: why for name, why in self.report.kept.items() if name not in self.report.others}
        return bool(self.report.converted) or any(why not in KEPT_AS_ASKED for why in linear.values())

    def _fallbacks(self) -> Iterable[tuple[Row, str]]:
        """Layers that the policy wants quantized and that could not be, with the reason that the conversion gave."""
        for row in self.rows:
            layer = row.layer or "(root)"
            why = self.report.kept.get(layer, KEPT_AS_ASKED[0])
            if why not in KEPT_AS_ASKED and layer not in self.report.others:
                yield row, f"{LAYER}: kept in {joined(row.ran)}: {why}"

    def _deviations(self) -> Iterable[tuple[Row, str]]:
        for row in self.rows:
            if row.ran == row.asked:
                continue
            if row.evidence == UNKNOWN:
                yield row, f"{row.gemm} in {LAYER} may multiply matrices, in {joined(row.ran)}: nothing rounds there"
                continue
            off = [i for i, (ran, asked) in enumerate(zip(row.ran, row.asked, strict=True)) if ran != asked]
            ran, asked = _told_apart(row)
            roles = ROLES.get((row.gemm, len(row.ran)), ())
            if row.stage == "recompute":
                yield row, f"recomputation of {LAYER} ran in {ran}, not {asked}"
            elif len(off) == 1 and roles:
                yield row, f"{roles[off[0]]} of {LAYER} was {row.ran[off[0]]}, asked {row.asked[off[0]]}"
            else:
                what = "a product" if row.gemm == "other" else row.gemm
                late = " in backward" if row.stage == "backward" and not what.startswith("grad") else ""
                yield row, f"{what} of {LAYER} ran in {ran}{late}, not {asked}"

    def require(self, least: float) -> None:
        """ValueError, with the biggest problems, if less than ``least`` ran (or is claimed to) in what was asked."""
        proven, claimed = self.asked_coverage, self.claimed_coverage
        if proven + claimed >= least:
            return
        ran = f"{100 * proven:.1f} % of the GEMM FLOPs ran in {self._narrow}"
        said = f" ({100 * claimed:.1f} % more is claimed, not proven)" if claimed else ""
        problems = self.problems()[:SHOWN] or [f"the rest is by design: {self.line()}"]
        raise ValueError(
            f"audit.min_coverage={least:g} is not reached: {ran} as precision={self.policy.name} asks{said}. "
            + "; ".join(problems)
        )


def summary_of(audit: Audit | None, *, compiled: bool) -> dict[str, Any]:
    """Return the part of summary.json about the audited step; empty if none was.

    ``compiled``: will the run itself be compiled?
    """
    if audit is None:
        return {}
    aside = ", measured on the uncompiled model" if compiled else ""
    return {"gemm_coverage": audit.coverage, "gemm_flops": audit.line() + aside, "audit": audit.problems()}


def kind_of(layer: str) -> str:
    """``blocks.*.mlp.up`` for ``blocks.3.mlp.up``: layers of the same kind in every block."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", layer) or "(model)"


def _family(name: str) -> str:
    return "fp8" if name.startswith(("fp8", "float8")) else name


def _told_apart(row: Row) -> tuple[str, str]:
    """Tell what ran and what was asked, in short words if those differ, else operand by operand."""
    ran, asked = joined(map(_family, row.ran)), joined(map(_family, row.asked))
    return (ran, asked) if ran != asked else (joined(row.ran), joined(row.asked))


def _leaf(row: Row) -> str:
    return "attention" if row.gemm == "attention" else row.layer.rpartition(".")[2] or "(model)"


def _sum(rows: Iterable[Row]) -> int:
    return sum(row.flops for row in rows)

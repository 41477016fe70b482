"""Subjects, targets and rows: the rows of ``mptrain plan --inference``, as data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from mptrain.memory.inference.architecture import Architecture
from mptrain.memory.inference.article import Article, article
from mptrain.memory.inference.plan import (
    KV_FORMATS,
    InferencePlan,
    Request,
    kv_bytes,
    largest_batch,
    plan,
    plan_count,
)
from mptrain.memory.inference.weights import weight_format
from mptrain.memory.units import gib


@dataclass(frozen=True)
class Subject:
    """The model that is planned: an architecture, or a bare count of parameters.

    ``stated``, ``activated``: as published.
    """

    name: str
    source: str
    stated: int
    activated: int = 0
    architecture: Architecture | None = None


@dataclass(frozen=True)
class Target:
    """GPUs of ``memory`` bytes each (0: none asked for); ``gpus`` 0: as many as it takes."""

    name: str = ""
    memory: int = 0
    gpus: int = 0


@dataclass(frozen=True)
class Row:
    """A plan and where it fits. ``gpus``: how many hold it, of those ``tried``, 0 if they do not; ``by_bytes``: that
    if any cut were possible; ``largest``: batch on those tried, -1 if not asked or not known."""

    plan: InferencePlan
    tried: int = 0
    gpus: int = 0
    by_bytes: int = 0
    largest: int = -1
    article: Article | None = None

    @property
    def per_gpu(self) -> int:
        return self.plan.per_gpu(self.gpus) if self.gpus else 0


def row_of(subject: Subject, name: str, request: Request, target: Target, convention: str) -> Row:
    """The plan of one format, and how many GPUs, and what batch, it asks or allows."""
    model = subject.architecture
    if model is None:
        row = Row(plan_count(subject.stated, name, request))
    else:
        mixed = None
        if convention == "article":
            fmt = weight_format(name, request.group_size)
            mixed = article(model, subject.stated, subject.activated, fmt, request)
            if not request.kv_format and fmt.element.name.removesuffix("_e4m3") in KV_FORMATS:
                request = replace(request, kv_format=fmt.element.name.removesuffix("_e4m3"))
        row = Row(plan(model, name, request), article=mixed)
    if not target.memory:
        return row
    gpus = target.gpus or row.plan.gpus_needed(target.memory) or row.plan.splits()[-1]
    largest = largest_batch(model, name, request, gpus, target.memory) if model else -1
    fits = row.plan.per_gpu(gpus) <= target.memory
    by_bytes = row.plan.gpus_by_bytes(target.memory) or 0
    return replace(row, tried=gpus, gpus=gpus if fits else 0, by_bytes=by_bytes, largest=largest)


def why_nowhere(rows: list[Row], target: Target) -> str:
    """Why nothing fits, and what to change."""
    best = min(rows, key=lambda row: row.plan.total)
    plan, request = best.plan, best.plan.request
    number = str(target.gpus) if target.gpus else f"any number up to {best.tried}"
    what = (
        f"--batch={request.batch} of {request.tokens:,} tokens"
        if "kv_cache" in plan.roles
        else f"--parameters {plan.model.split()[0]}"
    )
    lower = f"lower --batch to {best.largest}, or " if best.largest > 0 else ""
    other = "--gpus, " if target.gpus else "--gpu, "
    return (
        f"{what} does not fit {number} x {target.name} ({gib(target.memory)} each): {plan.format} takes "
        f"{gib(plan.per_gpu(best.tried))} on each; {lower}change {other}--format, --kv-format, --overhead or the tokens"
    )


def as_json(subject: Subject, target: Target, rows: list[Row]) -> dict[str, Any]:
    """All of it; sizes are bytes."""
    model = subject.architecture
    report: dict[str, Any] = {"model": subject.name, "source": subject.source, "parameters": subject.stated}
    if model:
        report |= {"parameters": model.parameters, "activated": model.activated, "groups": model.by_group()}
        report |= {"architecture": asdict(model), "attention": model.attention}
    if target.memory:
        report["gpu"] = asdict(target)
    report["request"] = asdict(rows[0].plan.request)
    report["plans"] = [_row_json(row, model) for row in rows]
    return report


def _row_json(row: Row, model: Architecture | None) -> dict[str, Any]:
    plan = row.plan
    report: dict[str, Any] = {"format": plan.format, "roles": plan.roles, "total": plan.total}
    if model:
        tokens = plan.request.tokens
        report |= {"kv_format": plan.kv_format, "kv_bytes_per_sequence": kv_bytes(model, tokens, plan.kv_format)}
    if row.gpus:
        report |= {"gpus": row.gpus, "gpus_by_bytes": row.by_bytes, "per_gpu": row.per_gpu}
    if row.largest >= 0:
        report["largest_batch"] = row.largest
    if row.article:
        report["article"] = {**asdict(row.article), "total_gb_and_gib_mixed": f"{row.article.total:.2f}"}
    return report

"""``mptrain plan --inference``: what a model takes to be served, in each format, and on how many GPUs."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from mptrain.files import json_text
from mptrain.memory import catalogue, huggingface, inference_table
from mptrain.memory.architecture import Architecture
from mptrain.memory.article import Article, article
from mptrain.memory.inference import KV_FORMATS, InferencePlan, Request, kv_bytes, largest_batch, plan, plan_count
from mptrain.memory.units import gib, parse_bytes
from mptrain.memory.weights import FORMATS, KEEP, WIDE, weight_format
from mptrain.settings import require

DEFAULT_FORMATS = ("bf16", "fp8", "int4")
MOST_GPUS = 100_000
EPILOG = "Sizes need a unit: 80GiB is 2^30 bytes each, 80GB 10^9."


@dataclass(frozen=True)
class Subject:
    """What is planned: an architecture, or a bare count of parameters. ``stated``, ``activated``: as published."""

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
    """A plan and where it fits. ``gpus`` 0: on no number of them; ``largest`` -1: not asked, or not known."""

    plan: InferencePlan
    gpus: int = 0
    by_bytes: int = 0
    largest: int = -1
    article: Article | None = None

    @property
    def per_gpu(self) -> int:
        return self.plan.per_gpu(self.gpus) if self.gpus else 0


def run(argv: list[str]) -> int:
    """The command. ValueError for what cannot be planned or fits nowhere, naming the option to change."""
    asked = _parser().parse_args(argv)
    console = Console()
    if asked.list:
        models, gpus = catalogue.models(), catalogue.gpus()
        if asked.json:
            print(
                json_text({"models": [asdict(one) for one in models], "gpus": [asdict(one) for one in gpus]}, indent=1)
            )
        else:
            inference_table.print_catalogue(console, models, gpus)
        return 0
    subject, target = _subject(asked), _target(asked)
    request = _request(asked, subject)
    rows = [_row(subject, name, request, target, asked.convention) for name in dict.fromkeys(asked.format)]
    if target.memory and not any(row.gpus and row.largest != 0 for row in rows):
        raise ValueError(_nowhere(rows, target))
    if asked.json:
        print(json_text(as_json(subject, target, rows), indent=1))
    else:
        inference_table.print_plan(console, subject, target, rows)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mptrain plan --inference", description=__doc__, epilog=EPILOG, allow_abbrev=False
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", metavar="NAME|PATH", help="of the catalogue, or a config.json, or its folder")
    what.add_argument("--parameters", metavar="N", help="only a number of parameters: 1e9, 7B")
    what.add_argument("--list", action="store_true", help="the catalogue of models and GPUs, and no plan")
    text = f"one or more of {' '.join(FORMATS)} (default: {' '.join(DEFAULT_FORMATS)})"
    parser.add_argument("--format", nargs="+", action="extend", metavar="F", help=text)
    parser.add_argument("--keep", metavar="REGEX", help=f"layers or groups not quantized, full match (default: {KEEP})")
    parser.add_argument("--keep-format", metavar="F", help=f"of those, norms, biases: {' '.join(WIDE)} (default: bf16)")
    parser.add_argument("--group-size", type=int, metavar="N", help="weights a scale, for int4 (default: 128) and int8")
    text = f"of the KV cache: {' '.join(KV_FORMATS)} (default: what is computed in)"
    parser.add_argument("--kv-format", metavar="F", help=text)
    parser.add_argument("--batch", type=int, metavar="N", help="sequences at once (default: 1)")
    for name in ("input", "output"):
        parser.add_argument(f"--{name}-tokens", type=int, metavar="N", help="of each sequence (default: 2048)")
    parser.add_argument("--prefill", type=int, metavar="N", help="most tokens in one pass (default: 8192)")
    text = "of CUDA context, libraries, fragmentation on each GPU, an assumption (default: 1GiB)"
    parser.add_argument("--overhead", metavar="SIZE", help=text)
    parser.add_argument("--gpu", metavar="NAME", help="how many of these, and the largest batch on them (--list)")
    parser.add_argument(
        "--fit", metavar="SIZE", help="memory of one GPU that may be used, instead of all that --gpu has"
    )
    parser.add_argument(
        "--gpus", type=int, metavar="N", help="so many (default: as few as it takes; one with --fit alone)"
    )
    text = "article: beside it the planning article's sums, which mix GB and GiB"
    parser.add_argument("--convention", choices=("exact", "article"), default="exact", help=text)
    parser.add_argument("--json", action="store_true", help="print bytes as JSON instead of a table")
    parser.set_defaults(format=None)
    return parser


def _subject(asked: argparse.Namespace) -> Subject:
    asked.format = asked.format or list(DEFAULT_FORMATS)
    if asked.parameters is not None:
        count = catalogue.parse_count(asked.parameters)
        return Subject(f"{count:,} parameters", "", count)
    path = Path(asked.model)
    if path.exists() or path.suffix == ".json" or len(path.parts) > 1:
        made = huggingface.read(path)
        return Subject(made.name, str(path), made.parameters, made.activated, made)
    model = catalogue.model(asked.model)
    made = model.architecture
    active = catalogue.parse_count(model.activated) if model.activated else made.activated
    return Subject(model.name, model.source, catalogue.parse_count(model.parameters), active, made)


def _request(asked: argparse.Namespace, subject: Subject) -> Request:
    """The options that were given; ValueError for those that a bare count of parameters has no use for."""
    names = ("batch", "input_tokens", "output_tokens", "prefill", "kv_format", "keep")
    given = {name: getattr(asked, name) for name in (*names, "keep_format", "group_size")}
    given = {name: value for name, value in given.items() if value is not None}
    useless = [name for name in names if name in given and subject.architecture is None]
    if useless:
        option = useless[0].replace("_", "-")
        raise ValueError(f"--{option} needs --model=NAME: --parameters says nothing of layers, heads and tokens")
    if asked.overhead is not None:
        given["overhead"] = parse_bytes(asked.overhead, "--overhead")
    return Request(**given)


def _target(asked: argparse.Namespace) -> Target:
    if asked.gpus is not None:
        require(1 <= asked.gpus <= MOST_GPUS, "--gpus", asked.gpus, f"from 1 to {MOST_GPUS:,}")
        if asked.gpu is None and asked.fit is None:
            raise ValueError(f"--gpus={asked.gpus} needs their memory: set --gpu=H100 or --fit=80GiB")
    if asked.gpu is None and asked.fit is None:
        return Target()
    gpu = catalogue.gpu(asked.gpu) if asked.gpu else None
    name = f"{gpu.name} {gpu.stated}" if gpu else "GPU"
    memory = gpu.memory if gpu else 0
    if asked.fit is not None:
        memory = parse_bytes(asked.fit, "--fit")
        require(memory > 0, "--fit", asked.fit, "above 0 B, e.g. 80GiB")
        if gpu and memory > gpu.memory:
            raise ValueError(f"--fit={asked.fit} is more than the {gib(gpu.memory)} ({gpu.stated}) that {gpu.name} has")
    return Target(name, memory, asked.gpus or (0 if gpu else 1))


def _row(subject: Subject, name: str, request: Request, target: Target, convention: str) -> Row:
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
    gpus = target.gpus or row.plan.gpus_needed(target.memory) or 0
    found = row.plan.gpus_by_bytes(target.memory) or 0
    largest = largest_batch(model, name, request, gpus, target.memory) if model and gpus else -1
    if row.plan.per_gpu(gpus or 1) > target.memory:
        gpus = 0
    return replace(row, gpus=gpus, by_bytes=found, largest=largest)


def _nowhere(rows: list[Row], target: Target) -> str:
    """Why nothing fits, and what to change."""
    best = min(rows, key=lambda row: row.plan.total)
    made, request = best.plan, best.plan.request
    where = (
        f"{target.gpus} x {target.name}" if target.gpus else f"any number of {target.name} up to {made.splits()[-1]}"
    )
    least = gib(made.per_gpu(target.gpus or made.splits()[-1]))
    what = f"--batch={request.batch} of {request.tokens:,} tokens" if "kv_cache" in made.roles else made.model
    options = "--gpus, " if target.gpus else "--gpu, "
    if best.largest > 0:
        return (
            f"{what} does not fit {where} ({gib(target.memory)} each): {made.format} takes {least} on each; "
            f"lower --batch to {best.largest}, or change {options}--format, --kv-format or the tokens"
        )
    return (
        f"{what} does not fit {where} ({gib(target.memory)} each): {made.format} takes {least} on each; "
        f"change {options}--format, --kv-format, --overhead or the tokens"
    )


def as_json(subject: Subject, target: Target, rows: list[Row]) -> dict[str, Any]:
    """All of it; sizes are bytes."""
    model = subject.architecture
    found: dict[str, Any] = {"model": subject.name, "source": subject.source, "parameters": subject.stated}
    if model:
        found |= {"parameters": model.parameters, "activated": model.activated, "groups": model.by_group()}
        found |= {"architecture": asdict(model), "attention": model.attention}
    if target.memory:
        found["gpu"] = asdict(target)
    found["request"] = asdict(rows[0].plan.request)
    found["plans"] = [_row_json(row, model) for row in rows]
    return found


def _row_json(row: Row, model: Architecture | None) -> dict[str, Any]:
    made = row.plan
    found: dict[str, Any] = {"format": made.format, "roles": made.roles, "total": made.total}
    if model:
        tokens = made.request.tokens
        found |= {"kv_format": made.kv_format, "kv_bytes_per_sequence": kv_bytes(model, tokens, made.kv_format)}
    if row.gpus:
        found |= {"gpus": row.gpus, "gpus_by_bytes": row.by_bytes, "per_gpu": row.per_gpu}
    if row.largest >= 0:
        found["largest_batch"] = row.largest
    if row.article:
        found["article"] = {**asdict(row.article), "total_gb_and_gib_mixed": f"{row.article.total:.2f}"}
    return found

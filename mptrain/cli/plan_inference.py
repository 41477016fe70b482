"""``mptrain plan --inference``: what a model takes to be served, in each format, and on how many GPUs."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from mptrain.cli.arguments import command_parser
from mptrain.memory import gpus
from mptrain.memory.inference import catalogue, huggingface
from mptrain.memory.inference import table as inference_table
from mptrain.memory.inference.plan import KV_FORMATS, Request
from mptrain.memory.inference.serving import Subject, Target, as_json, row_of, why_nowhere
from mptrain.memory.inference.weights import FORMATS, KEEP, WIDE
from mptrain.memory.units import gib, parse_bytes
from mptrain.tools.files import json_text
from mptrain.tools.settings import require

DEFAULT_FORMATS = ("bf16", "fp8", "int4")
MOST_GPUS = 100_000
EPILOG = "Sizes need a unit: 80GiB is 2^30 bytes each, 80GB 10^9."


def run(argv: list[str]) -> int:
    """Plan and print. ValueError for what cannot be planned or fits nowhere, naming the option to change."""
    args = _parser().parse_args(argv)
    console = Console()
    if args.list:
        models, cards = catalogue.models(), gpus.by_memory()
        if args.json:
            print(json_text({"models": [*map(asdict, models)], "gpus": [*map(asdict, cards)]}, indent=1))
        else:
            inference_table.print_catalogue(console, models, cards)
        return 0
    subject, target = _subject(args), _target(args)
    request = _request(args, subject)
    rows = [row_of(subject, name, request, target, args.convention) for name in dict.fromkeys(args.format)]
    if target.memory and not any(row.gpus and row.largest != 0 for row in rows):
        raise ValueError(why_nowhere(rows, target))
    if args.json:
        print(json_text(as_json(subject, target, rows), indent=1))
    else:
        inference_table.print_plan(console, subject, target, rows)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__, epilog=EPILOG, allow_abbrev=False)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", metavar="NAME|PATH", help="of the catalogue, or a config.json, or its folder")
    what.add_argument("--parameters", metavar="N", help="only a number of parameters: 1e9, 7B")
    what.add_argument("--list", action="store_true", help="the catalogue of models and GPUs, and no plan")
    text = f"one or more of {' '.join(FORMATS)} (default: {' '.join(DEFAULT_FORMATS)})"
    parser.add_argument("--format", nargs="+", action="extend", metavar="F", help=text)
    parser.add_argument("--keep", metavar="REGEX", help=f"layers or groups not quantized, full match (default: {KEEP})")
    parser.add_argument("--keep-format", metavar="F", help=f"of those, norms, biases: {' '.join(WIDE)} (default: bf16)")
    parser.add_argument("--group-size", type=int, metavar="N", help="weights a scale, for int4 (default: 128) and int8")
    text = f"format of the KV cache: {' '.join(KV_FORMATS)} (default: the compute format)"
    parser.add_argument("--kv-format", metavar="F", help=text)
    parser.add_argument("--batch", type=int, metavar="N", help="sequences at once (default: 1)")
    for name in ("input", "output"):
        parser.add_argument(
            f"--{name}-tokens", type=int, metavar="N", help="of each sequence (default: 2048, or half of the positions)"
        )
    parser.add_argument("--prefill", type=int, metavar="N", help="most tokens in one pass (default: 8192)")
    text = "of CUDA context, libraries, fragmentation on each GPU, an assumption (default: 1GiB)"
    parser.add_argument("--overhead", metavar="SIZE", help=text)
    parser.add_argument("--gpu", metavar="NAME", help="how many of these, and the largest batch on them (--list)")
    parser.add_argument(
        "--fit", metavar="SIZE", help="memory of one GPU that may be used, instead of all that --gpu has"
    )
    parser.add_argument(
        "--gpus", type=int, metavar="N", help="number of GPUs (default: the minimum; one with --fit alone)"
    )
    text = "article: also the planning article's sums, which mix GB and GiB"
    parser.add_argument("--convention", choices=("exact", "article"), default="exact", help=text)
    parser.add_argument("--json", action="store_true", help="print bytes as JSON instead of a table")
    parser.set_defaults(format=None)
    return parser


def _subject(args: argparse.Namespace) -> Subject:
    args.format = args.format or list(DEFAULT_FORMATS)
    if args.parameters is not None:
        count = catalogue.parse_count(args.parameters)
        return Subject(f"{count:,} parameters", "", count)
    path, named = Path(args.model), args.model.lower() in catalogue.model_names()
    if path.suffix == ".json" or len(path.parts) > 1 or (path.exists() and not named):
        architecture = huggingface.read(path)
        return Subject(architecture.name, str(path), architecture.parameters, architecture.activated, architecture)
    model = catalogue.model(args.model)
    architecture = model.architecture
    active = catalogue.parse_count(model.activated) if model.activated else architecture.activated
    return Subject(model.name, model.source, catalogue.parse_count(model.parameters), active, architecture)


def _request(args: argparse.Namespace, subject: Subject) -> Request:
    """Return the given options. ValueError for those that mean nothing for a bare number of parameters."""
    names = ("batch", "input_tokens", "output_tokens", "prefill", "kv_format", "keep")
    given = {name: getattr(args, name) for name in (*names, "keep_format", "group_size")}
    given = {name: value for name, value in given.items() if value is not None}
    useless = [name for name in names if name in given and subject.architecture is None]
    if useless:
        option = useless[0].replace("_", "-")
        raise ValueError(f"--{option} needs --model=NAME: --parameters has no layers, heads or tokens")
    model = subject.architecture
    if model is not None and model.learned_positions:
        for name in ("input_tokens", "output_tokens"):
            given.setdefault(name, max(1, min(2048, model.context // 2)))
    if args.overhead is not None:
        given["overhead"] = parse_bytes(args.overhead, "--overhead")
    return Request(**given)


def _target(args: argparse.Namespace) -> Target:
    if args.gpus is not None:
        require(1 <= args.gpus <= MOST_GPUS, "--gpus", args.gpus, f"from 1 to {MOST_GPUS:,}")
        if args.gpu is None and args.fit is None:
            raise ValueError(f"--gpus={args.gpus} needs their memory: set --gpu=H100 or --fit=80GiB")
    if args.gpu is None and args.fit is None:
        return Target()
    gpu = gpus.named(args.gpu) if args.gpu else None
    name = f"{gpu.name} {gpu.stated}" if gpu else "GPU"
    memory = gpu.memory if gpu else 0
    if args.fit is not None:
        memory = parse_bytes(args.fit, "--fit")
        require(memory > 0, "--fit", args.fit, "above 0 B, e.g. 80GiB")
        if gpu and memory > gpu.memory:
            raise ValueError(f"--fit={args.fit} is more than the {gib(gpu.memory)} ({gpu.stated}) that {gpu.name} has")
    return Target(name, memory, args.gpus or (0 if gpu else 1))

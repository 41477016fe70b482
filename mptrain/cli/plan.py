"""``mptrain plan``: Memory of a training run before it starts, in all precisions; --inference: of serving a model"""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from mptrain.build.preflight import require_consistent
from mptrain.cli import plan_inference
from mptrain.cli.arguments import command_parser
from mptrain.config import RunConfig, composed, parse_open
from mptrain.distributed.layout import Layout
from mptrain.formats import Format
from mptrain.memory import gpus
from mptrain.memory.training.fit import Remedy, largest_batch, largest_sequence, remedies
from mptrain.memory.training.plan import TrainingPlan, plan, rank_job
from mptrain.memory.training.table import print_fit, print_plans, print_remedies, told
from mptrain.memory.training.trace import Job
from mptrain.memory.units import parse_bytes
from mptrain.precision.policy import PrecisionPolicy
from mptrain.report.plan_page import page
from mptrain.tools.files import json_text, write_whole
from mptrain.tools.settings import require

BESIDE = ("fp32", "tf32", "bf16", "fp16", "fp8")


def run(argv: list[str]) -> int:
    """Plan and print. ValueError for settings that cannot work, and if no batch fits."""
    if "--inference" in argv:
        return plan_inference.run([word for word in argv if word != "--inference"])
    args = _parsed(argv)
    config = composed(args.overrides)
    card = gpus.named(args.gpu) if args.gpu else None
    gpu = card is not None or config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    capacity = parse_bytes(args.fit, "--fit") if args.fit else card.memory if card else 0
    job = _job(config, args.ranks, gpu=gpu)
    console = Console()
    with console.status("tracing a step in each precision"):
        plans = [plan(one, check=one is job) for one in _side_by_side(job)]
    mine = plans[0]
    where = f"a rank of {job.layout}" if args.ranks > 1 else "one process"
    device = args.gpu or ("a CUDA GPU" if gpu else "this CPU")
    title = f"training {_name(config)} on {device}, {where}: {_sizes(job)}"
    print_plans(console, title, plans)
    figures: dict[str, Any] = {"title": title, "plans": [_plain(one) for one in plans]}
    tried: list[Remedy] = []
    if capacity:
        figures |= _fitted(console, job, plans, capacity)
        with console.status("looking for what would save memory"):
            tried = remedies(job, mine) if mine.total > capacity else []
        if tried:
            print_remedies(console, tried, capacity)
        figures["remedies"] = [asdict(one) | {"plan": _plain(one.plan)} for one in tried]
    if args.json:
        write_whole(args.json, json_text(figures, indent=1) + "\n")
    if args.html:
        write_whole(args.html, page(title, plans, capacity))
    if capacity and not any(figures["largest_batch"].values()):
        rest = any(one.plan.total <= capacity for one in tried)
        more = "see above what would make it fit" if rest else "take more or larger devices: --ranks, dist=fsdp"
        raise ValueError(f"no batch fits {told(capacity)}: one sample needs more in every precision; {more}")
    return 0


def _parsed(argv: list[str]) -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument("overrides", nargs="*", metavar="SETTING=VALUE", help="as for train.py, e.g. model=gpt-small")
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="processes, for dist=ddp, fsdp, dist.tp=2")
    parser.add_argument("--gpu", default="", metavar="NAME", help="plan for this GPU (names: --inference --list)")
    parser.add_argument(
        "--fit", default="", metavar="SIZE", help="memory to fit, e.g. 80GiB: the largest batch, and how"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all of it, in bytes")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also draw it")
    parser.epilog = "mptrain plan --inference --help: what a trained model needs"
    args = parser.parse_args(argv)
    require(1 <= args.ranks <= 1 << 17, "--ranks", args.ranks, "from 1 to 131072")
    return args


def _job(config: RunConfig, ranks: int, *, gpu: bool) -> Job:
    """Return the job to plan. Data is read only if the model takes a size from it that the settings leave open."""
    module, model_config = parse_open("mptrain.models", "model", config.model)
    names = ("vocab_size",) if module.INPUT == "tokens" else ("image_size", "channels", "classes")
    if not all(getattr(model_config, name, 1) for name in names):
        block = model_config.block_size
        data_module, data_config = parse_open("mptrain.data", "data", config.data, block_size=block)
        sizes = data_module.build(data_config).sizes
        module, model_config = parse_open("mptrain.models", "model", config.model, **sizes)
    require_consistent(config, model_config)
    return rank_job(module, model_config, config, Layout.of(config.dist, ranks), gpu=gpu)


def _side_by_side(job: Job) -> list[Job]:
    """Return the job in several precisions, its own first; BF16 weights only with precisions that multiply in BF16."""
    policies = [PrecisionPolicy.named(name) for name in BESIDE if name != job.policy.name]
    if job.optim.weights != "fp32":
        policies = [policy for policy in policies if policy.compute is Format.bf16]
    return [job, *(replace(job, policy=policy) for policy in policies)]


def _fitted(console: Console, job: Job, plans: list[TrainingPlan], capacity: int) -> dict[str, Any]:
    length = job.config.block_size
    with console.status("looking for the largest batch and the longest sequence"):
        batches = {one.policy.name: largest_batch(one, capacity) for one in _side_by_side(job)}
        sequence = largest_sequence(job, capacity) if length and job.model.INPUT == "tokens" else 0
    print_fit(console, capacity, plans, batches, sequence)
    return {"capacity": capacity, "largest_batch": batches, "largest_block_size": sequence}


def _name(config: RunConfig) -> str:
    """Return the kind of the model and the settings that tell its sizes apart."""
    if "config" in config.model:
        return f"{config.model['kind']} {config.model['config']}"
    sizes = [f"{key}={config.model[key]}" for key in ("n_layer", "n_embd") if key in config.model]
    return " ".join([str(config.model["kind"]), *sizes])


def _sizes(job: Job) -> str:
    length = job.config.block_size
    unit = f" x {length:,} tokens" if length else ""
    rounds = f", {job.accumulate} micro-batches" if job.accumulate > 1 else ""
    return f"batch {job.batch_size}{unit}{rounds}{', checkpointing' if job.checkpointing else ''}"


def _plain(training_plan: TrainingPlan) -> dict[str, Any]:
    return asdict(training_plan) | {"live": training_plan.live, "total": training_plan.total}

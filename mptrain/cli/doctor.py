"""``mptrain doctor``: Which backends this machine has; with --audit, what every matrix product of a step runs in"""

from __future__ import annotations

import sys

import torch
from rich.console import Console
from rich.table import Table

from mptrain import kernels
from mptrain.cli.arguments import command_parser
from mptrain.config import RunConfig, composed, parse_open
from mptrain.precision import Precision
from mptrain.precision.backends import all_backends, resolve
from mptrain.precision.policy import PrecisionPolicy, conf_dir
from mptrain.report.audit import print_audit
from mptrain.telemetry.audit import StepAudit
from mptrain.telemetry.coverage import Audit
from mptrain.tools import machine

ROWS = 128  # rows of every matrix product: enough for every FP8 GEMM
SIZES = {"vocab_size": 256, "image_size": 8, "channels": 1, "classes": 10}  # where neither model nor data sets one


def run(argv: list[str]) -> int:
    """Print which backends this machine has; with ``--audit precision=fp8 ...``, the precision of every GEMM of a
    step."""
    parser = command_parser(__doc__)
    parser.add_argument("--audit", nargs="*", metavar="SETTING=VALUE", help="audit one step, e.g. precision=fp8")
    args = parser.parse_args(argv)
    if args.audit is not None:
        return _audit(args.audit)
    device = machine.pick_device("auto")
    console = Console()
    console.print(f"{machine.describe(device)}, torch {torch.__version__}", highlight=False)
    for path in sorted((conf_dir() / "precision").glob("*.yaml")):
        policy = PrecisionPolicy.named(path.stem)
        table = Table(title=f"precision={policy.name}", title_justify="left", show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        chosen = False
        for backend in all_backends():
            why = backend.missing(policy, device, auto=True)
            first, chosen = why is None and not chosen, chosen or why is None
            table.add_row(backend.name, "used" if first else why or "available")
        console.print(table)
    console.print(f"quantizer on {device}: {kernels.implementation(device)}", highlight=False)
    for name, why in kernels.why_not().items():
        console.print(f"  {name}: {why or 'available'}", highlight=False)
    return 0


def _audit(overrides: list[str]) -> int:
    """Print the audit; return 1 if less than audit.min_coverage ran in what the policy asks (claims of a backend
    count)."""
    config = composed(overrides)
    audit, what = audited_step(config)
    console = Console()
    console.print(what, highlight=False, soft_wrap=True)
    print_audit(console, audit)
    console.print("attention's share grows with the length of the sequences", highlight=False)
    try:
        audit.require(config.audit.min_coverage)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def audited_step(config: RunConfig) -> tuple[Audit, str]:
    """Audit one step on random samples, and describe it in a few words. No data, no run folder, no compiler.

    ValueError names the setting that cannot work here.
    """
    device = machine.pick_device(config.device)
    resolve(config.precision, device)
    sizes = {name: int(config.data.get(name) or size) for name, size in SIZES.items()}
    module, settings = parse_open("mptrain.models", "model", config.model, **sizes)
    torch.manual_seed(config.seed)
    model = module.build(settings).to(device)
    precision = Precision(config.precision).prepare(model)
    if config.trainer.checkpointing:
        model.recompute = precision.recompute
    batch = model.example(ROWS)
    step = StepAudit(model, precision)
    with step:
        with precision.forward():
            loss = model(**batch)
        precision.backward(loss)
    assert step.result is not None
    shape = " x ".join(str(size) for size in next(iter(batch.values())).shape)
    what = f"random {module.INPUT} ({shape}), backend {precision.backend.name} ({precision.backend.carrier})"
    return step.result, f"{machine.describe(device)}: {what}"

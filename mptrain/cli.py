"""``mptrain``: what there is to know and measure beside training (``python train.py`` trains)."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from mptrain import build, kernels
from mptrain.bench import resume as verify
from mptrain.config import RunConfig, clear_errors, composed
from mptrain.distributed.joining import left_cleanly
from mptrain.doctor import audited_step
from mptrain.precision.backends.base import MODULES, load
from mptrain.precision.policy import PrecisionPolicy, conf_dir
from mptrain.report.audit import print_audit
from mptrain.report.compare import compare as comparing
from mptrain.report.compare import files as output
from mptrain.report.compare import watch
from mptrain.report.compare.terminal import print_comparison_table
from mptrain.report.deploy import matrix as deployment
from mptrain.report.inspect import formats as casts
from mptrain.report.inspect import page
from mptrain.report.inspect import tensors as figures
from mptrain.report.inspect import terminal as tables
from mptrain.runs import baseline
from mptrain.runs import export as exporting
from mptrain.telemetry.histogram import JUDGED
from mptrain.tools import machine
from mptrain.tools.files import json_text
from mptrain.tools.settings import did_you_mean, from_plain, require

Command = Callable[[list[str]], int]


def main(argv: list[str] | None = None) -> int:
    """Run one command; exit code 2 and a clear message for what the user can mend."""
    words = sys.argv[1:] if argv is None else argv
    with clear_errors():
        if not words or words[0] in ("-h", "--help"):
            print(usage())
            return 0
        if words[0] not in COMMANDS:
            raise ValueError(f"unknown command {words[0]!r}{did_you_mean(words[0], [*COMMANDS])}")
        return COMMANDS[words[0]](words[1:])


def usage() -> str:
    shown = [
        (name, (command.__doc__ or "").splitlines()[0])
        for name, command in COMMANDS.items()
        if name not in ("probe", "run")
    ]
    lines = [f"  {name:14}{text}" for name, text in shown]
    return "usage: mptrain COMMAND [...]\n\n" + "\n".join(lines) + "\n\nTo train: python train.py --help"


def doctor(argv: list[str]) -> int:
    """Which backends this machine has; with ``--audit precision=fp8 ...``: what every GEMM of a step runs in."""
    if argv[:1] == ["--audit"]:
        return _audit(argv[1:])
    _no_arguments("doctor", argv)
    device = machine.pick_device("auto")
    console = Console()
    console.print(f"{machine.describe(device)}, torch {torch.__version__}", highlight=False)
    for path in sorted((conf_dir() / "precision").glob("*.yaml")):
        policy = PrecisionPolicy.named(path.stem)
        table = Table(title=f"precision={policy.name}", title_justify="left", show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        chosen = False
        for name in MODULES:
            why = load(name).missing(policy, device, auto=True)
            first, chosen = why is None and not chosen, chosen or why is None
            table.add_row(name, "used" if first else why or "available")
        console.print(table)
    console.print(f"quantizer on {device}: {kernels.implementation(device)}", highlight=False)
    for name, why in kernels.why_not().items():
        console.print(f"  {name}: {why or 'available'}", highlight=False)
    return 0


def _audit(overrides: list[str]) -> int:
    """Exit code 1 if less than audit.min_coverage ran in what the policy asks (claims of a backend count)."""
    config = composed(overrides)
    audit, said = audited_step(config)
    console = Console()
    console.print(said, highlight=False, soft_wrap=True)
    print_audit(console, audit)
    console.print("attention's share grows with the length of the sequences", highlight=False)
    try:
        audit.require(config.audit.min_coverage)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def formats(argv: list[str]) -> int:
    """The number formats: ranges and resolution; with numbers (``1e-3 2^-10 inf``), what each format makes of them."""
    if not {"-h", "--help"} & {*argv}:
        argv = ["--", *argv]  # so that -1e-3 is a number and no option
    parser = argparse.ArgumentParser(prog="mptrain formats", description=formats.__doc__)
    parser.add_argument("values", nargs="*", metavar="VALUE", help="1e-3, 2^-10, 0x1p-10, inf, nan")
    numbers = [casts.parse_number(text) for text in parser.parse_args(argv).values]
    for table in [casts.fate(number) for number in numbers] or [casts.overview()]:
        Console().print(table)
    return 0


def inspect(argv: list[str]) -> int:
    """What each format makes of the tensors of a run's sampled step, or of the weights in a .safetensors file."""
    parser = argparse.ArgumentParser(prog="mptrain inspect", description=inspect.__doc__)
    what = "a run's folder, a checkpoint in one, or FILE.safetensors"
    parser.add_argument("path", type=Path, metavar="RUN", help=what)
    parser.add_argument("--step", type=int, help="a recorded step (default: the last)")
    parser.add_argument("--role", default="", help="only this role: input, weight, grad_output, ...")
    parser.add_argument("--layer", default="", metavar="REGEX", help="only layers in whose name this is found")
    parser.add_argument("--format", default="", metavar="F", help="one format with all its figures")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also draw every histogram into one HTML file")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON instead of tables")
    parser.add_argument("--all", action="store_true", help=f"every row, not only the worst {tables.SHOWN}")
    asked = parser.parse_args(argv)
    only = figures.format_named(asked.format) if asked.format else None
    tensors = figures.select(figures.load(asked.path, asked.step), asked.role, asked.layer)
    rows = figures.figures(tensors, (only,) if only else JUDGED)
    if asked.html:
        asked.html.write_text(page.page(tensors, rows))
    if asked.json:
        print(json_text({"title": tensors.title, "rows": figures.plain(rows)}, indent=1))
    else:
        tables.print_tables(Console(), tensors, rows, only, asked.all)
    return 0


def compare(argv: list[str]) -> int:
    """Is each precision equivalent to FP32, faster, smaller, healthy? Runs or whole sweeps, with a verdict."""
    parser = argparse.ArgumentParser(prog="mptrain compare", description=compare.__doc__)
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, or a folder of runs (a sweep)"
    )
    parser.add_argument("--baseline", type=Path, metavar="RUN", help="compare with runs like this one (default: FP32)")
    what = "largest difference that counts as equal, relative to the loss or in accuracy (default: %(default)s)"
    parser.add_argument("--margin", type=float, default=comparing.MARGIN_FRAC, metavar="FRAC", help=what)
    for name, kind in (
        ("html", "the report with its figures"),
        ("markdown", "for a pull request"),
        ("json", "all of it"),
    ):
        parser.add_argument(f"--{name}", type=Path, metavar="FILE", help=f"also write {kind}")
    parser.add_argument("--watch", action="store_true", help="refresh while runs are at work; Ctrl-C ends it")
    asked = parser.parse_args(argv)
    require(asked.margin > 0, "--margin", asked.margin, "above 0, e.g. 0.005")

    def once(console: Console) -> None:
        comparison = comparing.compare(asked.runs, asked.baseline, asked.margin)
        print_comparison_table(console, comparison)
        matrix = deployment.read(asked.runs[0] / deployment.FILE) if len(asked.runs) == 1 else None
        files = {"html": asked.html, "markdown": asked.markdown, "data": asked.json}
        output.write_asked(comparison, **files, deployed=matrix)

    if asked.watch:
        watch.follow(asked.runs, Console(), once)
    else:
        once(Console())
    return 0


def export(argv: list[str]) -> int:
    """A trained model as a folder that Hugging Face's transformers loads: ``mptrain export RUN OUT``."""
    parser = argparse.ArgumentParser(prog="mptrain export", description=export.__doc__)
    parser.add_argument("source", type=Path, metavar="RUN", help="a run's folder, or a checkpoint in one")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to make")
    parser.add_argument(
        "--dtype", choices=exporting.DTYPES, default="fp32", help="of the weights (default: %(default)s)"
    )
    parser.add_argument("--average", action="store_true", help="the running average of the weights (optim.ema_decay)")
    asked = parser.parse_args(argv)
    print(exporting.export(asked.source, asked.out, asked.dtype, asked.average))
    return 0


def plan(argv: list[str]) -> int:
    """Memory before a run: training by role, or ``plan --inference``: weights, KV cache, GPUs (``--help``)."""
    if "--inference" in argv:
        from mptrain.memory import inference_command

        return inference_command.run([word for word in argv if word != "--inference"])
    from mptrain.memory import command

    return command.run(argv)


def quantize(argv: list[str]) -> int:
    """A trained model, or a Hugging Face one, in INT8, INT4 or FP8: ``mptrain quantize RUN --to int8``."""
    from mptrain.quantization import command

    return command.run(argv)


def deploy_matrix(argv: list[str]) -> int:
    """Trained in {fp32, bf16, fp16, fp8} x deployed in {fp32, bf16, int8, int4, fp8}: accuracy, size, speed."""
    from mptrain.quantization import matrix_command

    return matrix_command.run(argv)


def bench(argv: list[str]) -> int:
    """``bench cpu``, ``telemetry``, ``dist``, ``plan``, ``gpu``, ``verdict``: against targets, peers and limits."""
    subjects = ("cpu", "telemetry", "dist", "plan", "gpu", "verdict")
    if not argv or argv[0] not in subjects:
        known = ", ".join(f"bench {name}" for name in subjects)
        raise ValueError(f"bench needs a subject: mptrain {known}")
    code: int = importlib.import_module(f"mptrain.bench.{argv[0]}").run(argv[1:])
    return code


def probe(argv: list[str]) -> int:
    """The FP32 probe of a run, started by it: settings (JSON file) in, figures (JSON file) out."""
    asked, answer = argv
    config = from_plain(RunConfig, json.loads(Path(asked).read_text()), "config")
    Path(answer).write_text(baseline.figures_json(build.probe(config)))
    return 0


def run(argv: list[str]) -> int:
    """A run from a JSON file of settings: what verify-resume starts, alone or under torchrun."""
    with left_cleanly():
        made = build.build(from_plain(RunConfig, json.loads(Path(argv[0]).read_text()), "config"))
        if made is None:
            raise SystemExit(0)
        made.train()
        stopped = made.trainer.interrupts.stopped_by
        raise SystemExit(0 if stopped is None else 128 + stopped)


def verify_resume(argv: list[str]) -> int:
    """Kill runs and compare what goes on, bit for bit, with runs that nobody killed."""
    parser = argparse.ArgumentParser(prog="mptrain verify-resume", description=verify_resume.__doc__)
    parser.add_argument("overrides", nargs="*", metavar="SETTING=VALUE", help="as for train.py, e.g. dist=fsdp")
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16", "fp16", "fp8", "fp8-delayed"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2], help="numbers of processes (default: 1 2)")
    parser.add_argument("--steps", type=int, default=20, help="of each run (default: %(default)s)")
    parser.add_argument("--kills", type=int, default=0, help="SIGKILLs at random moments, under torchrun's restarts")
    parser.add_argument("--folder", type=Path, default=Path("runs/verify-resume"), help="default: %(default)s")
    asked = parser.parse_args(argv)
    console = Console()
    found = verify.main(
        asked.overrides,
        asked.folder,
        lambda text: console.print(text, highlight=False),
        ranks=asked.ranks,
        precisions=asked.precision,
        steps=asked.steps,
        kills=asked.kills,
    )
    table = Table(title="killed and resumed, against never killed")
    for name in ("run", "kills", "verdict", "seconds"):
        table.add_column(name, overflow="fold")
    for one in found:
        same = "the same bits" if one.worst == 0 else f"losses within {one.worst:.1g} nats"
        table.add_row(one.what, str(one.kills), "; ".join(one.differences[:3]) or same, f"{one.seconds:.0f}")
    console.print(table)
    return 1 if any(one.differences for one in found) else 0


def _no_arguments(command: str, argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog=f"mptrain {command}", description=COMMANDS[command].__doc__)
    parser.parse_args(argv)


COMMANDS: dict[str, Command] = {
    "doctor": doctor,
    "formats": formats,
    "inspect": inspect,
    "compare": compare,
    "export": export,
    "plan": plan,
    "quantize": quantize,
    "deploy-matrix": deploy_matrix,
    "bench": bench,
    "probe": probe,
    "run": run,
    "verify-resume": verify_resume,
}

if __name__ == "__main__":
    sys.exit(main())

"""``mptrain deploy-matrix``: Trained in {fp32, bf16, ...} x deployed in {int8, fp8, ...}: accuracy, size, speed"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from mptrain.cli.arguments import command_parser
from mptrain.quantization import matrix
from mptrain.quantization.methods import METHODS
from mptrain.report.compare.compare import compare
from mptrain.report.compare.files import write_all
from mptrain.report.deploy.matrix import FILE
from mptrain.report.deploy.terminal import print_matrix
from mptrain.runs.read import is_run
from mptrain.tools.files import json_text, write_whole
from mptrain.tools.machine import pick_device
from mptrain.tools.settings import to_plain


def run(argv: list[str]) -> int:
    """Measure and print; for a single folder also write ``deploy.json`` into it, and its report again."""
    args = _parser().parse_args(argv)
    console = Console()
    result = matrix.deploy(
        args.runs,
        args.to,
        batches=args.batches,
        repeats=args.repeats,
        group_size=args.group_size,
        keep=args.keep,
        device=pick_device(args.device),
        say=lambda text: console.print(text, style="dim", highlight=False),
    )
    print_matrix(console, result)
    text = json_text(to_plain(result), indent=1) + "\n"
    if args.json:
        write_whole(args.json, text)
    if len(args.runs) == 1:
        folder = args.runs[0]
        write_whole(folder / FILE, text)
        report = f" and {folder / 'report.html'}" if not is_run(folder) and _reported(folder) else ""
        console.print(f"written: {folder / FILE}{report}", highlight=False, soft_wrap=True)
    return 0


def _reported(folder: Path) -> bool:
    """Write the sweep's report with the matrix in it; return False if its runs cannot be compared.

    (Runs may be deployed that cannot be compared.)
    """
    try:
        write_all(compare([folder]), folder)
    except ValueError:
        return False
    return True


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="runs, or one folder of them (a sweep)")
    known = ", ".join(name for name, method in METHODS.items() if not method.calibrated)
    what = f"formats to deploy in, of {known} (default: {' '.join(matrix.FORMATS)})"
    parser.add_argument("--to", nargs="+", default=list(matrix.FORMATS), metavar="FORMAT", help=what)
    size = " or ".join(f"{count} {unit}" for unit, count in matrix.SAMPLES.items())
    what = f"validation batches, of {size.replace('tokens', 'sequences')} (default: %(default)s)"
    parser.add_argument("--batches", type=int, default=matrix.BATCHES, metavar="N", help=what)
    what = "timed forwards of each format, 0 for no speeds (default: %(default)s)"
    parser.add_argument("--repeats", type=int, default=matrix.REPEATS, metavar="N", help=what)
    parser.add_argument(
        "--group-size", type=int, metavar="N", help="numbers that share a scale, where there are groups"
    )
    parser.add_argument("--keep", default="", metavar="REGEX", help="layers left as they are (full match)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the matrix there")
    return parser

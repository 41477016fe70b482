"""``mptrain compare``: Is each precision equivalent to FP32, faster, smaller, healthy? A verdict on runs and sweeps"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from mptrain.cli.arguments import command_parser
from mptrain.report.compare import compare as comparing
from mptrain.report.compare import files, watch
from mptrain.report.compare.terminal import print_comparison_table
from mptrain.report.deploy import matrix
from mptrain.tools.settings import require


def run(argv: list[str]) -> int:
    """Compare runs or whole sweeps, print the verdicts, write the requested reports."""
    parser = command_parser(__doc__)
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, or a folder of runs (a sweep)"
    )
    what = "use this run's settings as the baseline (default: FP32)"
    parser.add_argument("--baseline", type=Path, metavar="RUN", help=what)
    what = "largest difference that counts as equal, relative to the loss or in accuracy (default: %(default)s)"
    parser.add_argument("--margin", type=float, default=comparing.MARGIN_FRAC, metavar="FRAC", help=what)
    for name, kind in (
        ("html", "the report with its figures"),
        ("markdown", "for a pull request"),
        ("json", "all of it"),
    ):
        parser.add_argument(f"--{name}", type=Path, metavar="FILE", help=f"also write {kind}")
    parser.add_argument("--watch", action="store_true", help="refresh while runs are in progress; stop with Ctrl-C")
    args = parser.parse_args(argv)
    require(args.margin > 0, "--margin", args.margin, "above 0, e.g. 0.005")

    def once(console: Console) -> None:
        comparison = comparing.compare(args.runs, args.baseline, args.margin)
        print_comparison_table(console, comparison)
        deployed = matrix.read(args.runs[0] / matrix.FILE) if len(args.runs) == 1 else None
        paths = {"html": args.html, "markdown": args.markdown, "data": args.json}
        files.write_files(comparison, **paths, deployed=deployed)

    if args.watch:
        watch.follow(args.runs, Console(), once)
    else:
        once(Console())
    return 0

"""``mptrain inspect``: What each format makes of the tensors of a run's recorded step, or of weights in a file"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from mptrain.cli.arguments import command_parser
from mptrain.report.inspect import page, tensors
from mptrain.report.inspect import terminal as tables
from mptrain.telemetry.histogram import JUDGED
from mptrain.tools.files import json_text


def run(argv: list[str]) -> int:
    """Print what each format makes of the tensors. ValueError for what cannot be read."""
    parser = command_parser(__doc__)
    what = "a run's folder, a checkpoint in one, or FILE.safetensors"
    parser.add_argument("path", type=Path, metavar="RUN", help=what)
    parser.add_argument("--step", type=int, help="a recorded step (default: the last)")
    parser.add_argument("--role", default="", help="only this role: input, weight, grad_output, ...")
    parser.add_argument("--layer", default="", metavar="REGEX", help="only layers with a match in their name")
    parser.add_argument("--format", default="", metavar="F", help="one format with all its figures")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also draw every histogram into one HTML file")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON instead of tables")
    parser.add_argument("--all", action="store_true", help=f"every row, not only the worst {tables.SHOWN}")
    args = parser.parse_args(argv)
    only = tensors.format_named(args.format) if args.format else None
    chosen = tensors.select(tensors.load(args.path, args.step), args.role, args.layer)
    rows = tensors.figures(chosen, (only,) if only else JUDGED)
    if args.html:
        args.html.write_text(page.page(chosen, rows))
    if args.json:
        print(json_text({"title": chosen.title, "rows": tensors.plain(rows)}, indent=1))
    else:
        tables.print_tables(Console(), chosen, rows, only, args.all)
    return 0

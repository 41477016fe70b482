"""``mptrain verify-resume``: Kill runs, resume them, and compare them bit for bit with uninterrupted runs"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from mptrain.bench import resume
from mptrain.cli.arguments import command_parser


def run(argv: list[str]) -> int:
    """Kill runs and compare the resumed ones, bit for bit, with uninterrupted runs."""
    parser = command_parser(__doc__)
    parser.add_argument("overrides", nargs="*", metavar="SETTING=VALUE", help="as for train.py, e.g. dist=fsdp")
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16", "fp16", "fp8", "fp8-delayed"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2], help="numbers of processes (default: 1 2)")
    parser.add_argument("--steps", type=int, default=20, help="of each run (default: %(default)s)")
    parser.add_argument("--kills", type=int, default=0, help="SIGKILLs at random moments, under torchrun's restarts")
    parser.add_argument("--folder", type=Path, default=Path("runs/verify-resume"), help="default: %(default)s")
    args = parser.parse_args(argv)
    console = Console()
    verdicts = resume.main(
        args.overrides,
        args.folder,
        lambda text: console.print(text, highlight=False),
        ranks=args.ranks,
        precisions=args.precision,
        steps=args.steps,
        kills=args.kills,
    )
    table = Table(title="interrupted vs. uninterrupted runs")
    for name in ("run", "kills", "verdict", "seconds"):
        table.add_column(name, overflow="fold")
    for verdict in verdicts:
        same = "the same bits" if verdict.worst == 0 else f"losses within {verdict.worst:.1g} nats"
        table.add_row(
            verdict.what, str(verdict.kills), "; ".join(verdict.differences[:3]) or same, f"{verdict.seconds:.0f}"
        )
    console.print(table)
    return 1 if any(verdict.differences for verdict in verdicts) else 0

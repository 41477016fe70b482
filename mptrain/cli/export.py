"""``mptrain export``: A trained model as a folder that Hugging Face's transformers loads"""

from __future__ import annotations

from pathlib import Path

from mptrain.cli.arguments import command_parser
from mptrain.runs import export


def run(argv: list[str]) -> int:
    """Write a trained model as a folder that Hugging Face's transformers loads: ``mptrain export RUN OUT``."""
    parser = command_parser(__doc__)
    parser.add_argument("source", type=Path, metavar="RUN", help="a run's folder, or a checkpoint in one")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to make")
    parser.add_argument("--dtype", choices=export.DTYPES, default="fp32", help="of the weights (default: %(default)s)")
    parser.add_argument("--average", action="store_true", help="the running average of the weights (optim.ema_decay)")
    args = parser.parse_args(argv)
    print(export.export(args.source, args.out, args.dtype, args.average))
    return 0

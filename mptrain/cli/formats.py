"""``mptrain formats``: Ranges and resolution of the number formats, or what each makes of given numbers (1e-3 2^-10)"""

from __future__ import annotations

from rich.console import Console

from mptrain.cli.arguments import command_parser
from mptrain.report.inspect import formats


def run(argv: list[str]) -> int:
    """Print ranges and resolution of the formats or, for given numbers (``1e-3 2^-10 inf``), how each represents
    them."""
    if not {"-h", "--help"} & {*argv}:
        argv = ["--", *argv]  # so that -1e-3 is a number, not an option
    parser = command_parser(__doc__)
    parser.add_argument("values", nargs="*", metavar="VALUE", help="1e-3, 2^-10, 0x1p-10, inf, nan")
    numbers = [formats.parse_number(text) for text in parser.parse_args(argv).values]
    for table in [formats.fate(number) for number in numbers] or [formats.overview()]:
        Console().print(table)
    return 0

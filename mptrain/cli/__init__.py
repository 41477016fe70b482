"""The command line: ``mptrain COMMAND``. (``python train.py`` trains.)

Each file of this folder whose docstring begins with ``mptrain NAME`` is a command: its function ``run(argv)``
gets the arguments after the name and returns the exit status. Only the command in use is imported.
"""

from __future__ import annotations

import ast
import importlib
import pkgutil
import sys
from pathlib import Path

from mptrain.cli.errors import clear_errors
from mptrain.tools.settings import did_you_mean

ORDER = ("doctor", "formats", "inspect", "compare", "export", "plan", "quantize", "deploy-matrix", "bench")


def main(argv: list[str] | None = None) -> int:
    """Run one command; exit with status 2 and a clear message for errors that the user can correct."""
    words = sys.argv[1:] if argv is None else argv
    with clear_errors():
        if not words or words[0] in ("-h", "--help"):
            print(usage())
            return 0
        if words[0] == "--version":
            from mptrain import __version__

            print(f"mptrain {__version__}")
            return 0
        known = commands()
        if words[0] not in known:
            raise ValueError(f"unknown command {words[0]!r}{did_you_mean(words[0], [*known])}")
        module = importlib.import_module(f"mptrain.cli.{words[0].replace('-', '_')}")
        status: int = module.run(words[1:])
        return status


def commands() -> dict[str, str]:
    """Return every command and what it does in a line, read off the files without importing them."""
    descriptions: dict[str, str] = {}
    for module in pkgutil.iter_modules(__path__):
        source = (Path(__path__[0]) / f"{module.name}.py").read_text()
        name, text = module.name.replace("_", "-"), ast.get_docstring(ast.parse(source)) or ""
        if text.startswith(f"``mptrain {name}``"):
            descriptions[name] = text.splitlines()[0].partition(": ")[2]
    return dict(
        sorted(descriptions.items(), key=lambda item: (ORDER.index(item[0]) if item[0] in ORDER else len(ORDER), item))
    )


def usage() -> str:
    """Return the text of ``mptrain --help``."""
    lines = [f"  {name:14}{text}" for name, text in commands().items()]
    return (
        "usage: mptrain COMMAND [...]\n\n"
        + "\n".join(lines)
        + "\n\nmptrain COMMAND --help lists what a command takes; mptrain --version tells the version."
        + "\nTo train: python train.py --help"
    )

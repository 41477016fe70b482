"""The argument parser of a command, from the docstring of its module."""

from __future__ import annotations

import argparse
from typing import Any


def command_parser(doc: str | None, **options: Any) -> argparse.ArgumentParser:
    """Return the parser of the command whose module has the docstring ````mptrain NAME``: DESCRIPTION``."""
    command, _, description = (doc or "").partition(": ")
    return argparse.ArgumentParser(prog=command.strip("`"), description=description, **options)

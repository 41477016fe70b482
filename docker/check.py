"""Ends a build: each module is imported, its version printed and held against pyproject.toml; the C kernels build.

python docker/check.py [--kept FILE] MODULE...   --kept: lines name==version that must still be installed
"""

import argparse
import importlib
import os
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.requirements import Requirement
from requirements import PYPROJECT, name_of, requirements

EXTRAS = ["te", "native", "sweeps"]


def unmet(module: str) -> Iterator[str]:
    """Imports ``module``, prints its version; what is wrong with it."""
    name = name_of(module.partition(".")[0])
    try:
        importlib.import_module(module)
        found = version(name)
    except (ImportError, OSError, PackageNotFoundError) as error:
        yield f"{module}: {type(error).__name__}: {error}"
        return
    print(f"{name} {found}")
    for line in requirements(EXTRAS):
        # NVIDIA's builds are pre-releases of the version they are numbered after: 2.12.0a0 has all of 2.11.
        if name_of(line) == name and not Requirement(line).specifier.contains(found, prereleases=True):
            yield f"{name} {found} does not meet {line}: take another base image"


def changed(kept: Path) -> Iterator[str]:
    """The lines of ``kept`` that pip did not leave alone."""
    for line in kept.read_text(encoding="utf-8").split():
        name, _, before = line.partition("==")
        try:
            now = version(name)
        except PackageNotFoundError:
            now = "nothing"
        if now != before:
            yield f"{name} was {before} in the base image and is {now} now"


def kernels() -> Iterator[str]:
    """Why the C kernels cannot be built here; their library is not kept, the next machine has another processor."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        os.environ["MPTRAIN_CACHE"] = folder
        from mptrain.kernels import c

        if reason := c.missing(torch.device("cpu")):
            yield f"C kernels: {reason}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("modules", nargs="+")
    parser.add_argument("--kept", type=Path)
    asked = parser.parse_args()
    print(f"python {sys.version.split()[0]}, {PYPROJECT.parent}")
    wrong = [reason for module in asked.modules for reason in unmet(module)]
    wrong += [] if asked.kept is None else changed(asked.kept)
    wrong += kernels() if "mptrain" in asked.modules and not wrong else []
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()

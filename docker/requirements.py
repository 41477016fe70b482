"""What pyproject.toml asks for, one requirement a line, so that an image installs it before the sources are copied.

python docker/requirements.py --only torch                   one of the dependencies
python docker/requirements.py --without torch native sweeps  the others and those of two extras
python docker/requirements.py --installed                    name==version of what a base image brings and pip must keep
"""

import argparse
import re
import tomllib
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"
KEPT = re.compile(r"(pytorch-)?(torch|triton)(-.*)?|torch(ao|vision|audio)|transformer-engine(-.*)?|(nvidia|cuda)-.*")


def name_of(requirement: str) -> str:
    """The distribution's name, normalized: ``transformer-engine`` of ``transformer_engine[pytorch]>=2.8``."""
    found = re.match(r"[A-Za-z0-9._-]+", requirement.strip())
    if found is None:
        raise ValueError(f"not a requirement: {requirement!r}")
    return re.sub(r"[-_.]+", "-", found[0]).lower()


def requirements(extras: list[str]) -> Iterator[str]:
    """Those of the project and of ``extras``; ValueError for an extra that it does not have."""
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    optional = project["optional-dependencies"]
    yield from project["dependencies"]
    for extra in extras:
        if extra not in optional:
            raise ValueError(f"no extra {extra!r} in pyproject.toml; it has {', '.join(optional)}")
        for requirement in optional[extra]:
            if name_of(requirement) == project["name"]:  # pip would look for it on the index
                raise ValueError(f"extra {extra!r} names the project itself: {requirement}; name its parts")
            yield requirement


def installed() -> Iterator[str]:
    """``name==version`` of torch, Triton, Transformer Engine and CUDA's parts, where they are installed."""
    found = {name_of(part.name): part.version for part in distributions()}
    return (f"{name}=={version}" for name, version in sorted(found.items()) if KEPT.fullmatch(name))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("extras", nargs="*")
    parser.add_argument("--only", metavar="NAME")
    parser.add_argument("--without", metavar="NAME")
    parser.add_argument("--installed", action="store_true")
    asked = parser.parse_args()
    if asked.installed:
        lines = list(installed())
    else:
        wanted = [(name_of(line), line) for line in requirements(asked.extras)]
        lines = [line for name, line in wanted if asked.only in (None, name) and asked.without != name]
    print("\n".join(lines))


if __name__ == "__main__":
    main()

"""Common parts of the benchmarks: rows of figures, alternating variants, the report, and the command line."""

from __future__ import annotations

import argparse
import datetime
import operator
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch

from mptrain.tools.files import json_text, write_whole
from mptrain.tools.machine import cpu_name

TWIN = " (A/A)"
Step = Callable[[], object]
How = Callable[[float, float], float]


@dataclass
class Row:
    """One figure. ``target``: a bound from above or below (``at_most``); None: for information."""

    name: str
    target: float | None = None
    at_most: bool = True
    unit: str = "x"
    measured: float | None = None
    wall: float | None = None
    noise: float | None = None  # the figure of the A/A twin: 1 x or 0 us on an idle machine
    reason: str = ""

    SECOND: ClassVar[str] = "wall"  # the field of the second clock, for information

    @property
    def verdict(self) -> str:
        if self.measured is None:
            return f"not measured: {self.reason}"
        if self.target is None:
            return "information"
        return "met" if (self.measured <= self.target if self.at_most else self.measured >= self.target) else "missed"

    def __str__(self) -> str:
        bound = "" if self.target is None else f"{'<=' if self.at_most else '>='} {self.target:g}"
        values = (self.measured, getattr(self, self.SECOND), self.noise)
        figures = [f"{'' if value is None else f'{value:.3g}':>8}" for value in values]
        return f"{self.name:56} {self.unit:3}{figures[0]} {bound:>8} {figures[1]}{figures[2]}  {self.verdict}"


AnyRow = TypeVar("AnyRow", bound=Row)


def timed(work: Step) -> tuple[float, float]:
    """Return (CPU, wall) seconds of ``work`` in this process."""
    cpu_s, wall_s = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu_s, time.perf_counter() - wall_s


def paired_median(ours: Iterable[float], theirs: Iterable[float], how: How = operator.truediv) -> float:
    """Return the median of ``how(a, b)`` over the repetitions."""
    return statistics.median(how(a, b) for a, b in zip(ours, theirs, strict=True))


class Turns:
    """Seconds of alternating variants, in reverse order every other time, by the two clocks of ``timer``."""

    def __init__(
        self, variants: dict[str, Step], repeats: int, timer: Callable[[Step], tuple[float, float]] = timed
    ) -> None:
        self.samples: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
        for work in variants.values():  # warm up
            timer(work)
        order = list(variants.items())
        for _ in range(repeats):
            for name, work in order:
                self.samples[name].append(timer(work))
            order.reverse()

    def fill(self, row: AnyRow, name: str, reference: str, how: How = operator.truediv) -> AnyRow:
        """Return the row with ``how(variant, reference)`` by both clocks, and with that of the reference's twin (the
        noise)."""
        if not {name, reference} <= self.samples.keys():
            return row
        twin = reference + TWIN
        noise = self._paired(twin, reference, how) if twin in self.samples else None
        filled = replace(row, measured=self._paired(name, reference, how), noise=noise)
        setattr(filled, row.SECOND, self._paired(name, reference, how, clock=1))
        return filled

    def _paired(self, name: str, reference: str, how: How, clock: int = 0) -> float:
        ours, theirs = ([sample[clock] for sample in self.samples[key]] for key in (name, reference))
        return paired_median(ours, theirs, how)

    def seconds(self, name: str) -> float:
        """Return the median by the first clock."""
        return statistics.median(first for first, _ in self.samples[name])


def machine(command: str, argv: list[str]) -> dict[str, str]:
    """Describe the machine that the figures belong to, and the command that measures them."""
    return {
        "cpu": cpu_name(),
        "cores": str(os.cpu_count()),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "date": now(),
        "command": " ".join([command, *argv]),
    }


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


class Report:
    """Print each row as it comes, below ``head``, and rewrite the file at ``path`` with all so far."""

    def __init__(self, path: Path | None, about: dict[str, str], head: str = "") -> None:
        self._path, self._about = path, about
        self._rows: list[dict[str, Any]] = []
        print(", ".join(f"{key} {value}" for key, value in about.items()))
        if head:
            print(head)

    def add(self, row: Row) -> None:
        print(row, flush=True)
        self._rows.append(asdict(row) | {"verdict": row.verdict})
        if self._path is not None:
            write_whole(self._path, json_text({"machine": self._about, "rows": self._rows}, indent=1))


def arguments(
    command: str, doc: str | None, dry_run: str = "tiny sizes: does it run, not how fast"
) -> argparse.ArgumentParser:
    """Return a parser with the options that all benchmarks have; the first line of ``doc`` describes the command."""
    parser = argparse.ArgumentParser(prog=command, description=(doc or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write rows to this file as they come")
    parser.add_argument("--dry-run", action="store_true", help=dry_run)
    return parser


@contextmanager
def one_thread() -> Iterator[None]:
    """Give torch one thread inside the context."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)

"""The seeds that a sweep named before its first verdict: which of them count, and whether more looks are allowed.

A verdict's error rate holds for one look at a number of seeds fixed beforehand. ``sweep.json`` records it: seeds
added to a judged sweep do not count, unless it had named its last number of seeds (``sweep_seeds``).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mptrain.report.compare.comparison import Kind
from mptrain.report.compare.intervals import LOOKS
from mptrain.tools.files import object_in

FILE = "sweep.json"
JUDGED = {kind.name for kind in Kind} - {Kind.baseline.name, Kind.none.name}


@dataclass(frozen=True)
class Planned:
    """``seeds``: in the order they were named, empty where that is not known and all count. ``last``: the last number
    of them, of several looks (:data:`~mptrain.report.compare.intervals.LOOKS`); 0: one look at all."""

    seeds: tuple[int, ...] = ()
    last: int = 0

    def uncounted(self, seed: int) -> str:
        """Return why a run with this seed does not count, empty if it does."""
        if not self.seeds or seed in self.seeds:
            return ""
        return "its seed was added after the verdict: use another sweep_dir, or name sweep_seeds=10 at the first start"

    def counted(self, finished: Collection[int]) -> list[int]:
        """Return the ``finished`` seeds that a verdict goes by: of several looks, those of the largest reached."""
        seeds = [seed for seed in self.seeds or sorted(finished) if seed in finished]
        looks = [n for n in LOOKS.get(self.last, ()) if n <= len(seeds)]
        return seeds[: max(looks)] if looks else seeds


def planned(folders: Iterable[Path]) -> Planned:
    """Return what the sweep that these runs are of has named; nothing for runs of several sweeps, or of none."""
    plans = {plan for parent in {folder.resolve().parent for folder in folders} if (plan := _read(parent)).seeds}
    return plans.pop() if len(plans) == 1 else Planned()


def named(folder: Path, seeds: Iterable[int] | None, last: int) -> Planned:
    """Return what a sweep started in ``folder`` with these ``seeds`` (None: not a list) has named beforehand.

    ValueError for a ``last`` that is unknown, or named after a verdict.
    """
    before = _read(folder)
    if last and (last not in LOOKS or seeds is None):
        known = ", ".join(map(str, LOOKS))
        raise ValueError(f"sweep_seeds={last} cannot work: use 0 or one of {known}, and a list of seeds (seed=0,1,2)")
    if len(before.seeds) < 2 or not _judged(folder):
        return Planned(tuple(dict.fromkeys((*before.seeds, *(seeds or ())))), last)
    if last not in (0, before.last):
        was = f"sweep_seeds={before.last}" if before.last else "none"
        raise ValueError(f"sweep_seeds={last} comes after the first verdict (named was {was}): use another sweep_dir")
    added = (seeds or ()) if before.last else ()
    return Planned(tuple(dict.fromkeys((*before.seeds, *added))), before.last)


def _read(folder: Path) -> Planned:
    plan = object_in(folder / FILE)
    seeds, last = plan.get("seeds"), plan.get("last_seeds")
    known = isinstance(seeds, list) and all(isinstance(seed, int) for seed in seeds)
    return Planned(tuple(seeds), last if last in LOOKS else 0) if known and seeds else Planned()


def _judged(folder: Path) -> bool:
    groups: list[dict[str, Any]] = object_in(folder / "report.json").get("groups", [])
    return any(variant["verdict"]["kind"] in JUDGED for group in groups for variant in group["variants"])

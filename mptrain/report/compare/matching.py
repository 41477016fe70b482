"""Matching of comparable runs: groups of the same data and schedule, and in them variants of one precision.

A group's runs have model, corpus, batches and optimizer in common (so that equal seeds saw equal data from equal
weights); a variant's have the precision in common too, how weights and moments are stored included, and differ by seed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mptrain.runs.identity import STORAGE, numerics, short_hash, updates
from mptrain.runs.read import Run, leaf_names

SENT = {"compress": "none", "gather": "compute"}  # of dist: formats of gradients and weights in transit
USUAL = {"weights": "fp32", "moments": "fp32", "inject": "", **SENT}  # defaults, left out of a variant's label
SCHEDULE = ("max_steps", "batch_size", "accumulate", "clip", "eval_batches")  # of trainer: what affects the loss


@dataclass(frozen=True)
class Matched:
    """Runs of one variant; ``settings``: flat, those that make up its precision; ``key``: a hash of them."""

    key: str
    name: str
    settings: dict[str, Any]
    runs: tuple[Run, ...]

    @property
    def stored_fp32(self) -> bool:
        """FP32 weights (or masters) and moments, and no fire drill."""
        return all(self.settings[key] == "fp32" for key in STORAGE) and not self.settings["debug.inject"]

    @property
    def is_fp32(self) -> bool:
        s = self.settings
        plain = s["compute"] == "fp32" and s["quantization.scaling"] == "none" and s["loss_scale.kind"] == "none"
        return plain and self.stored_fp32 and s["compress"] == SENT["compress"]


@dataclass(frozen=True)
class MatchedGroup:
    """Comparable variants; ``settings``: flat, those that all of their runs share."""

    settings: dict[str, Any]
    variants: tuple[Matched, ...]


def groups_of(runs: Iterable[Run]) -> list[MatchedGroup]:
    """Sort every run that has settings into groups and variants, in the order of their first run.

    A run that never began has no corpus on record: it joins those with its settings of the data.
    """
    known = [run for run in runs if run.config]
    corpora = {short_hash(run.config["data"]): run.about["corpus"] for run in known if "corpus" in run.about}
    by_settings: dict[str, list[tuple[dict[str, Any], Run]]] = defaultdict(list)
    for run in known:
        corpus = run.about.get("corpus") or corpora.get(short_hash(run.config["data"]))
        settings = trial(run, corpus)
        by_settings[short_hash(settings)].append((settings, run))
    return [
        MatchedGroup(flat(members[0][0]), _variants([run for _, run in members])) for members in by_settings.values()
    ]


def _variants(runs: list[Run]) -> tuple[Matched, ...]:
    by_key: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        by_key[short_hash(variant(run))].append(run)
    variants = []
    for key, members in by_key.items():
        name = str(members[0].config["precision"].get("name", "?"))
        members.sort(key=lambda run: (run.seed or 0, run.folder.name))
        variants.append(Matched(key, name, flat(variant(members[0])), tuple(members)))
    return tuple(variants)


def trial(run: Run, corpus: str | None) -> dict[str, Any]:
    """Return the settings that the runs of a group share.

    ``corpus``: hash of the data's content, None if it is not known.
    """
    settings = run.config
    trainer = {key: settings["trainer"].get(key) for key in SCHEDULE}
    data = {"corpus": corpus} if corpus else settings["data"]
    shared = {"model": settings["model"], "data": data, "optim": updates(settings["optim"]), "trainer": trainer}
    dist = settings.get("dist", {})
    if dist.get("kind", "single") == "single" and dist.get("tp", 1) == 1:
        return shared
    return shared | {"dist": {key: dist.get(key) for key in ("kind", "tp", "replicas")}}  # speeds depend on the layout


def variant(run: Run) -> dict[str, Any]:
    """Return the settings that the runs of a variant share as well."""
    settings = run.config
    storage = {key: settings["optim"].get(key, "fp32") for key in STORAGE}
    inject = settings.get("debug", {}).get("inject", "")
    sent = {key: settings.get("dist", {}).get(key, usual) for key, usual in SENT.items()}
    return {**numerics(settings["precision"]), **storage, **sent, "debug": {"inject": inject}}


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by their dotted names."""
    dotted: dict[str, Any] = {}
    for key, value in values.items():
        dotted |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return dotted


def differing(settings: Iterable[dict[str, Any]]) -> list[str]:
    """Return the names whose values differ."""
    every = list(settings)
    names = dict.fromkeys(name for flat_settings in every for name in flat_settings)
    return [name for name in names if len({str(flat_settings.get(name)) for flat_settings in every}) > 1]


def labels(groups: Iterable[MatchedGroup]) -> dict[str, str]:
    """Map the key of each variant to its label: the precision's name, and the settings that distinguish it from
    others."""
    variants = {v.key: v for group in groups for v in group.variants}
    named: dict[str, list[Matched]] = defaultdict(list)
    for matched in variants.values():
        named[matched.name].append(matched)
    by_key = {}
    for name, alike in named.items():
        leaves = leaf_names(differing([matched.settings for matched in alike]))
        for matched in alike:
            values = {leaf: matched.settings[key] for key, leaf in leaves.items() if key in matched.settings}
            differences = [f"{leaf}={_brief(value)}" for leaf, value in values.items() if USUAL.get(leaf) != value]
            by_key[matched.key] = " ".join([name, *differences])
    return by_key


def group_labels(groups: list[MatchedGroup]) -> list[str]:
    """Name the settings that distinguish the groups; empty for a single one."""
    leaves = leaf_names(differing([group.settings for group in groups]))
    return [", ".join(f"{leaf}={_brief(group.settings.get(key))}" for key, leaf in leaves.items()) for group in groups]


def difference(ours: MatchedGroup, theirs: MatchedGroup) -> str:
    """Explain why the runs of two groups cannot be compared."""
    names = differing([ours.settings, theirs.settings])
    return "; ".join(
        f"{n} is {_brief(ours.settings.get(n))} here and {_brief(theirs.settings.get(n))} there" for n in names
    )


def _brief(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value) or "''"
    return text if len(text) <= 24 else f"{text[:12]}…{text[-8:]}"

"""The figures of ``mptrain inspect``: every tensor of a sampled step, or of a checkpoint, in each format.

Each row is one tensor (layer, role). Formats are judged at their best power-of-two scale, except those with
FP32's range (BF16, TF32, FP32): these are used unscaled, so they are judged at 1.
"""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mptrain.checkpoint import checkpoints
from mptrain.formats import Format
from mptrain.runs.read import natural
from mptrain.telemetry import record
from mptrain.telemetry.histogram import JUDGED, Histogram, Histograms, Share
from mptrain.tools.settings import did_you_mean

UNSCALED = (Format.bf16, Format.tf32, Format.fp32)
FORMATS = {fmt.name: fmt for fmt in (*JUDGED, Format.tf32, Format.fp32)}
PERCENTILES = (1.0, 50.0, 99.0)
BLOCKS = (32, 128)


@dataclass(frozen=True)
class Judgement:
    """A format at a scale: shares of all elements, and bits left below its maximum."""

    scale: float
    saturated: Share
    flushed: Share
    subnormal: Share
    headroom_bits: float

    @property
    def lost(self) -> float:
        """Estimated share of elements that are not kept: at the maximum, or zero."""
        return self.saturated.estimate + self.flushed.estimate


@dataclass(frozen=True)
class Cast:
    """The cast of the run: counts are exact; None where the record has no count."""

    format: str
    scale: float | None = None
    elements: int | None = None
    saturated: int | None = None
    flushed: int | None = None
    inf: int | None = None
    nan: int | None = None
    subnormal: Share | None = None
    headroom_bits: float | None = None
    sqnr_db: float | None = None


@dataclass(frozen=True)
class Spread:
    """Bits between the tensor's amax and the median block's, and the 1st percentile block's (zero blocks apart)."""

    median: int
    first: int


@dataclass(frozen=True)
class LostUpdates:
    """Coordinates that an update asked to move and that did not, by the storage of the weights."""

    asked: float
    bf16: float
    fp32: float
    stochastic: float
    remainder: float


@dataclass(frozen=True)
class Row:
    """One tensor. Figures that the record does not hold are None or empty."""

    index: int  # among the rows of Tensors
    layer: str
    role: str
    used: Cast | None = None
    amax: float | None = None
    elements: int | None = None
    zeros: int = 0
    inf: int = 0
    nan: int = 0
    percentiles: dict[str, float] = field(default_factory=dict)
    formats: dict[str, Judgement] = field(default_factory=dict)
    spread: dict[str, Spread] = field(default_factory=dict)
    lost: LostUpdates | None = None

    @property
    def severity(self) -> tuple[float, ...]:
        """Worst last: non-finite values, what the run's cast lost, what the judged formats would lose."""
        bad = self.inf + self.nan
        cast = 0.0
        if self.used and self.used.elements:
            bad = max(bad, (self.used.inf or 0) + (self.used.nan or 0))
            cast = ((self.used.saturated or 0) + (self.used.flushed or 0)) / self.used.elements
        eight_bits = [j.lost for name, j in self.formats.items() if name.startswith("fp8") or len(self.formats) == 1]
        low = [j.subnormal.estimate for name, j in self.formats.items() if name == "fp8_e4m3" or len(self.formats) == 1]
        return (float(bad > 0), cast, max(eight_bits, default=0.0), max(low, default=0.0))


@dataclass(frozen=True)
class Tensors:
    """The inspected tensors: names, and the tables of a record (or the histograms of a file's tensors)."""

    title: str
    rows: list[tuple[str, str, str]]
    tables: dict[str, Tensor]
    notes: list[str] = field(default_factory=list)

    @property
    def histograms(self) -> Histograms | None:
        counts = self.tables.get("histogram")
        return None if counts is None else Histograms.of_tables(counts, self.tables.get("amax"))


def load(path: Path, step: int | None = None) -> Tensors:
    """Read a run's folder (the record of ``step``, default the last), a checkpoint or a .safetensors file.

    ValueError for other paths.
    """
    ours = checkpoints.is_ours(path)
    if path.is_dir() and not ours:
        return _of_run(path, step)
    if not path.exists():
        raise ValueError(f"{path} does not exist: give a run's folder, a checkpoint in one, or a .safetensors file")
    if step is not None:
        raise ValueError(f"--step is for the folder of a run; {path} is {'a checkpoint' if ours else 'not a folder'}")
    return _of_file(path)


def _of_run(folder: Path, step: int | None) -> Tensors:
    path = folder / record.FILE
    if not path.exists():
        saved = [path for path in folder.rglob("step-*") if checkpoints.is_ours(path)]
        files = sorted(saved or folder.rglob("*.safetensors"))
        other = f"; for its weights: mptrain inspect {files[-1]}" if files else ""
        what = (
            "this run sampled no histograms" if (folder / "config.json").exists() else "it is not the folder of a run"
        )
        raise ValueError(f"no {record.FILE} in {folder}: {what}{other}")
    sample = record.read_step(path, step)
    about = "".join(f", {name} {value}" for name, value in sample.about.items() if isinstance(value, int | float | str))
    return Tensors(f"{folder}, step {sample.step}{about}", sample.rows, sample.tables)


def _of_file(path: Path) -> Tensors:
    histograms: list[tuple[tuple[str, str], Histogram]] = []
    dtypes, skipped = Counter[str](), Counter[str]()
    ours = checkpoints.is_ours(path)
    for name, dtype, tensor in checkpoints.float_tensors(path):
        place = place_of(name, ours)
        if tensor is None or place is None or not tensor.numel():
            skipped[dtype] += 1
            continue
        histograms.append((place, Histogram.of(tensor)))
        dtypes[dtype] += 1
    if not histograms:
        raise ValueError(f"{path} holds no floating-point weights ({sum(skipped.values())} other tensors)")
    histograms.sort(key=lambda one: natural(one[0][0]))  # alphabetically, layer 10 would come before layer 2
    notes = [f"other tensors, left out: {_listed(skipped)}"] if skipped else []
    amax = torch.tensor([histogram.amax for _, histogram in histograms])
    tables = {"histogram": torch.stack([histogram.counts for _, histogram in histograms]), "amax": amax}
    return Tensors(f"{path}: {_listed(dtypes)}", [(*place, "") for place, _ in histograms], tables, notes)


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{n} {dtype}" for dtype, n in counts.most_common())


def place_of(name: str, ours: bool) -> tuple[str, str] | None:
    """Return (layer, role) of a tensor in a file; of a checkpoint of mptrain, None for all but weights and moments."""
    if ours:
        part, _, name = name.partition("/")
        if part == "optimizer":
            layer, _, role = name.rpartition("/")
            return (f"optimizer {layer.removeprefix('state/')}", role) if role not in ("step", "") else None
        if part != "model":
            return None
    layer, _, leaf = name.rpartition(".")
    return (layer, leaf) if leaf in ("weight", "bias") and layer else (name, "weight")


def select(tensors: Tensors, role: str = "", layer: str = "") -> Tensors:
    """Return the rows of one role, and of layers whose name matches the regex. ValueError if there are none."""
    indices = list(range(len(tensors.rows)))
    if role:
        roles = sorted({row[1] for row in tensors.rows})
        if role not in roles:
            raise ValueError(f"role {role!r} is not recorded{did_you_mean(role, roles)}")
        indices = [index for index in indices if tensors.rows[index][1] == role]
    if layer:
        try:
            pattern = re.compile(layer)
        except re.error as error:
            raise ValueError(f"--layer {layer!r} is not a regular expression: {error}") from error
        layers = sorted({tensors.rows[index][0] for index in indices})
        indices = [index for index in indices if pattern.search(tensors.rows[index][0])]
        if not indices:
            some = dict.fromkeys([*difflib.get_close_matches(layer, layers, n=3, cutoff=0.5), *layers[:10]])
            raise ValueError(f"no layer matches {layer!r}{did_you_mean(layer, list(some))}")
    tables = {name: table[torch.tensor(indices, dtype=torch.int64)] for name, table in tensors.tables.items()}
    return Tensors(tensors.title, [tensors.rows[index] for index in indices], tables, tensors.notes)


def format_named(name: str) -> Format:
    """Return the format of this name. ValueError with the nearest one if it is not in :data:`FORMATS`."""
    if name not in FORMATS:
        raise ValueError(f"format {name!r} is unknown{did_you_mean(name, [*FORMATS])}")
    return FORMATS[name]


def figures(tensors: Tensors, formats: tuple[Format, ...] = JUDGED) -> list[Row]:
    """Judge every row in ``formats``; return them worst first."""
    histograms = tensors.histograms
    judged = _judged(histograms, formats) if histograms else [{} for _ in tensors.rows]
    cast = _judged_as_cast(tensors, histograms) if histograms else {}
    rows = [_row(tensors, histograms, index, judged[index], cast.get(index)) for index in range(len(tensors.rows))]
    return sorted(rows, key=lambda row: row.severity, reverse=True)


def _judged(histograms: Histograms, formats: tuple[Format, ...]) -> list[dict[str, Judgement]]:
    rows: list[dict[str, Judgement]] = [{} for _ in histograms.counts]
    for fmt in formats:
        unscaled = torch.ones(len(rows), dtype=torch.float64)
        scale = unscaled if fmt in UNSCALED else histograms.best_scale(fmt)
        for row, judged in zip(rows, _at_scale(histograms, fmt, scale), strict=True):
            row[fmt.name] = judged
    return rows


def _judged_as_cast(tensors: Tensors, histograms: Histograms) -> dict[int, Judgement]:
    """Map row indices to the format of the run's cast, judged at the scale in use."""
    judged: dict[int, Judgement] = {}
    if "scale" not in tensors.tables:
        return judged
    scale = tensors.tables["scale"].double()
    usable = (scale.isfinite() & (scale > 0)).tolist()
    for name in {row[2] for row in tensors.rows} & FORMATS.keys():
        indices = [index for index, row in enumerate(tensors.rows) if row[2] == name and usable[index]]
        some = Histograms(histograms.counts[indices], histograms.amax[indices])
        judged |= zip(indices, _at_scale(some, FORMATS[name], scale[indices]), strict=True)
    return judged


def _at_scale(histograms: Histograms, fmt: Format, scale: Tensor) -> list[Judgement]:
    verdict = histograms.judge(fmt, scale)
    headroom = histograms.headroom_bits(fmt, scale).tolist()
    shares = [list(zip(*(part.tolist() for part in kind), strict=True)) for kind in verdict[1:]]
    places = zip(scale.tolist(), *shares, headroom, strict=True)
    return [Judgement(s, Share(*sat), Share(*flu), Share(*sub), room) for s, sat, flu, sub, room in places]


def _row(
    tensors: Tensors, histograms: Histograms | None, index: int, formats: dict[str, Judgement], cast: Judgement | None
) -> Row:
    layer, role, fmt = tensors.rows[index]
    recorded = {name: table[index] for name, table in tensors.tables.items()}
    one = histograms.row(index) if histograms else None
    seen: dict[str, Any] = {"amax": float(recorded["amax"]) if "amax" in recorded else None}
    if one:
        seen = {"amax": one.amax, "elements": one.elements, "zeros": one.zeros, "inf": one.inf, "nan": one.nan}
        seen["percentiles"] = {f"{q:g}": one.percentile(q) for q in PERCENTILES}
    lost = LostUpdates(*recorded["lost"].tolist()) if "lost" in recorded and role == "update" else None
    used = _used(fmt, recorded, cast) if fmt else None
    return Row(index, layer, role, used, formats=formats, spread=_spread(recorded, seen["amax"]), lost=lost, **seen)


def _used(name: str, recorded: dict[str, Tensor], cast: Judgement | None) -> Cast:
    scale = float(recorded.get("scale", math.nan))  # NaN: the tensor had several scales
    figures: dict[str, Any] = {"scale": scale} if math.isfinite(scale) else {}
    if cast:
        figures |= {"subnormal": cast.subnormal, "headroom_bits": cast.headroom_bits}
    if "counts" in recorded:
        figures |= dict(
            zip(("elements", "saturated", "flushed", "inf", "nan"), recorded["counts"].tolist(), strict=True)
        )
    if "errors" in recorded:
        signal, noise = recorded["errors"].tolist()
        figures["sqnr_db"] = 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else None
        if signal > 0 and noise == 0:
            figures["sqnr_db"] = math.inf
    return Cast(name, **figures)


def _spread(recorded: dict[str, Tensor], amax: float | None) -> dict[str, Spread]:
    """Read the exponent fields of block amaxes (0: zero or subnormal, 255: not finite; both apart)."""
    if "blocks" not in recorded or not amax or not math.isfinite(amax):
        return {}
    top = math.frexp(amax)[1] + 126
    spreads = {}
    for size, counts in zip(BLOCKS, recorded["blocks"], strict=True):
        below = counts[1:255].cumsum(0)
        if below[-1]:
            median, first = (
                top - 1 - int(torch.searchsorted(below, max(1, math.ceil(q * int(below[-1]))))) for q in (0.5, 0.01)
            )
            spreads[str(size)] = Spread(median, first)
    return spreads


def plain(value: Any) -> Any:
    """Return rows as JSON can hold them: dataclasses and shares as dicts."""
    if isinstance(value, Share):
        return value._asdict()
    if hasattr(value, "__dataclass_fields__"):
        return {name: plain(getattr(value, name)) for name in value.__dataclass_fields__}
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [plain(inner) for inner in value]
    return value

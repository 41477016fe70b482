"""Deployment matrices as the report gets them, made up."""

from __future__ import annotations

from mptrain.report.compare.comparison import Interval
from mptrain.report.deploy.matrix import Deployed, Matrix

FORMATS = {
    "fp32": (12.5, 1.0),
    "bf16": (6.25, 0.5),
    "int8": (3.31234, 0.265),
    "int4": (1.75, 0.14),
    "fp8": (3.3, 0.264),
}
TRAINED = ("fp32", "bf16", "fp16", "fp8")
WHY = "head: 97 is not a multiple of <128>: use --group-size 97"


def around(mean: float, half: float, n: int = 3) -> Interval:
    return Interval(mean, mean - half, mean + half, n, "t over seeds")


def cell(trained: str, deployed: str) -> Deployed:
    place = TRAINED.index(trained)
    if (trained, deployed) == ("fp8", "int4"):
        return Deployed(trained, deployed, why=WHY)
    lost = {"int4": 0.0312345, "fp8": 0.004, "int8": 0.0002}.get(deployed, 0.0)
    own = None if deployed == "fp32" else around(lost, 0.0011)
    base = None if trained == deployed == "fp32" else around(lost + 0.001 * place, 0.002)
    mib, frac = FORMATS[deployed]
    return Deployed(
        trained,
        deployed,
        3,
        around(8.12345678 * (1 + lost), 0.05),
        own,
        base,
        0.0 if own is None else 1.23e-5,
        1.0 - lost,
        mib,
        frac,
        0 if deployed in ("fp32", "bf16") else 17,
        "" if own is None else "blocks.3.mlp.down",
        None if own is None else 19.8765,
        None if own is None else 0.4321,
        None if own is None else 0.4,
        None if own is None else 0.5,
    )


def realistic() -> Matrix:
    cells = [cell(trained, deployed) for trained in TRAINED for deployed in FORMATS]
    notes = ["FP8 is stored in 8 bits & multiplied in FP32 <here>."]
    return Matrix("sweep-1000", "perplexity", "tokens", 256, 8, "Some CPU, AVX512, 2 threads", cells, notes)


def images() -> Matrix:
    """One run, in one format beside FP32, whose interval is over samples; nothing was timed."""
    share = Interval(0.9749, 0.9529, 0.9885, 359, "Clopper-Pearson")
    lost = Interval(-0.0056, -0.0171, 0.0061, 359, "Agresti-Min")
    cells = [
        Deployed("fp32", "fp32", 1, share, None, None, 0.0, 1.0, 3.0, 1.0),
        Deployed("fp32", "int4", 1, share, lost, lost, 0.0123, 0.98, 0.5, 0.167),
    ]
    return Matrix("vit-fp32-1", "top-1", "images", 359, 64, "Some CPU", cells)

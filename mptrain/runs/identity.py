"""The identity of a run, written when it begins (``run.json``), to decide which runs are comparable.

Two runs of one fingerprint saw the same initial weights, batches and learning rates on the same machine, so they
differ by precision alone. How weights and moments are stored is precision too: an FP32 run is the baseline of one
that keeps them in BF16. Unused settings of a policy (the amax history of one that quantizes nothing) are not a
difference.
"""

from __future__ import annotations

import copy
import hashlib
import json
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mptrain.tools.launcher import world_size
from mptrain.tools.settings import to_plain

if TYPE_CHECKING:
    from torch import nn

FILE = "run.json"
HISTORY = "history.json"  # what changed from one attempt of a run to the next
LOCK = ".lock"  # in a run's folder, held while the run is in progress
JOB_LOCK = ".job.lock"  # next to it, held by the sweep from before it prepares the job
COMPARED = ("model", "data", "optim", "trainer", "seed")  # settings that make two runs comparable step by step
STORAGE = ("weights", "moments")  # of optim: storage formats
ASIDE = (  # these change no number of a run
    "run_dir", "runs_dir", "sweep_dir", "sweep_seeds", "resume", "resume_anyway",
    "baseline", "logger", "checkpoint",
)  # fmt: skip
MARKED = 1 << 16  # values per parameter that are hashed


def fingerprint(config: Any, corpus: str, machine: str, torch_version: str, fp32_gemm: str) -> str:
    """Return a hash (16 hex digits) of all that must be equal for two runs to differ by precision alone."""
    plain = to_plain(config)
    same = {key: plain[key] for key in COMPARED if key != "data"}  # the corpus's hash says more than its path
    dist = plain["dist"]
    if dist["kind"] != "single" or dist["tp"] > 1:  # speed and memory depend on the layout
        same["layout"] = [dist["kind"], dist["tp"], dist["replicas"], world_size()]
    same["optim"] = updates(same["optim"])
    return short_hash([same, corpus, machine, torch_version, fp32_gemm])


def updates(optim: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of ``optim`` that define the updates: without storage formats, and without the default kind,
    which older runs do not name."""
    usual = {"kind": "adamw"}
    return {key: value for key, value in optim.items() if key not in STORAGE and usual.get(key) != value}


def short_hash(value: Any) -> str:
    """Return 16 hex digits of a JSON value's SHA-256; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def job_mark(plain: dict[str, Any]) -> str:
    """Return a hash of the settings (as plain values) that change a run: equal for two that would compute the same."""
    relevant = {key: value for key, value in plain.items() if key not in ASIDE}
    optim = {key: relevant["optim"][key] for key in STORAGE if key in relevant["optim"]} | updates(relevant["optim"])
    return short_hash(relevant | {"precision": numerics(relevant["precision"]), "optim": optim})


def numerics(policy: dict[str, Any]) -> dict[str, Any]:
    """Return a precision policy (plain values) without its name and its unused settings."""
    policy = copy.deepcopy(policy)
    policy.pop("name", None)
    patterns = policy["keep"], policy.pop("keep_default", "")  # older runs have both in `keep`
    policy["keep"] = "|".join(filter(None, patterns))
    quantization, loss_scale = policy["quantization"], policy["loss_scale"]
    if quantization["scaling"] == "none":
        policy["quantization"] = {"scaling": "none"}
        policy["keep"] = ""
    elif quantization["scaling"] != "delayed":
        policy["quantization"] = {key: v for key, v in quantization.items() if key not in ("history", "warm_start")}
    used = {"none": ("kind",), "static": ("kind", "init")}.get(loss_scale["kind"], tuple(loss_scale))
    policy["loss_scale"] = {key: loss_scale[key] for key in used}
    return policy


def weights_mark(model: nn.Module) -> str:
    """Return a hash of the initial weights: name, shape and first values of every parameter.

    Parameters are drawn from one random stream, so two initialisations differ in the first values already;
    hashing all would take 0.4 s for 124 M parameters and half a minute for 8 G.
    """
    mark = hashlib.sha256()
    for name, parameter in model.named_parameters():
        whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter  # a collective
        first = whole.detach().flatten()[:MARKED].float().cpu()
        mark.update(f"{name} {tuple(parameter.shape)}".encode())
        mark.update(first.numpy().tobytes())
    return mark.hexdigest()[:16]


def environment() -> dict[str, Any]:
    """Return host, version and commit (None outside a checkout)."""
    return {"host": platform.node(), "mptrain": _version(), "commit": _commit()}


def _version() -> str | None:
    try:
        return version("mptrain")
    except PackageNotFoundError:  # not installed: run from a checkout
        return None


def _commit() -> str | None:
    """Return the commit of the checkout this package is in, with ``-dirty`` for uncommitted changes."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None

"""Who may import whom, as a table, read off the source with ast: lazy imports inside functions count like any other."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import mptrain

PACKAGE = Path(mptrain.__file__).parent
ROOT = PACKAGE.parent
ANY = ("*",)

# Module (or the folder it is in) -> what of mptrain it may import, itself and its folder apart. The most exact row
# counts. `*` is for the composition root and for programs; a row is missing only for a module that is a new concept.
INTERNAL: dict[str, tuple[str, ...]] = {
    "": ("convert", "distributed", "formats", "outcome", "policy", "precision", "scaling"),  # the public names
    "formats": (),
    "tools.files": (),
    "tools.settings": (),
    "tools.registry": ("tools.settings",),
    "tools.machine": (),
    "interrupts": (),
    "tools.quiet": (),
    "models": ("tools.registry",),
    "models._huggingface": ("tools.quiet",),
    "data": ("tools.files", "tools.registry"),
    "policy": ("formats", "tools.settings"),
    "scaling": ("policy",),
    "convert": (),
    "kernels": ("formats",),
    "distributed": ("convert", "kernels", "formats", "tools.settings"),
    "outcome": ("scaling",),
    "regions": ("emulation.thread", "kernels.counters"),
    "gradients": ("distributed",),
    "agreement": ("distributed",),
    "verified": ("convert", "formats", "policy"),
    "blame": ("convert", "distributed", "kernels.counters", "outcome"),
    "emulation": ("kernels", "formats", "policy", "distributed"),
    "backends": ("convert", "kernels", "formats", "policy", "distributed", "emulation", "tools.quiet", "regions"),
    "backends.base": ("convert", "kernels.counters", "policy", "distributed"),  # backends themselves only by name
    "precision": (
        "policy", "scaling", "backends.base", "convert", "kernels.counters", "outcome", "distributed",
        "agreement", "blame", "gradients", "regions", "verified",
    ),
    "checkpoint": ("storage", "distributed"),
    "optim": ("tools.settings", "distributed", "tools.quiet"),
    "telemetry": (
        "kernels", "formats", "distributed", "outcome", "scaling", "tools.settings", "policy", "convert", "precision",
        "memory.live", "emulation.gemm", "emulation.products",
    ),
    "trainer": ("precision", "telemetry", "checkpoint", "distributed", "outcome", "interrupts", "protocols",
        "validation", "keeping", "spikes", "trainer_config",
    ),
    "identity": ("tools.settings", "distributed"),
    "baseline": ("tools.files", "tools.settings", "identity"),
    "loggers": ("tools.files", "telemetry.record"),
    "wandb_logger": (
        "loggers", "telemetry.record", "telemetry.histogram", "report.drawing", "report.comparison",
    ),
    "sweep": ANY,
    "folder": ("config", "tools.files", "identity", "tools.settings"),
    "memory": ("formats", "tools.settings", "tools.files"),
    "memory.live": ("kernels", "distributed"),  # what the meter of a real step shares with a plan
    "memory.cuda": ("formats", "policy"),
    "memory.trace": ("backends.base", "distributed", "emulation", "kernels", "optim", "policy", "precision"),
    "memory.training": ("backends.base", "distributed", "tools.settings"),
    "memory.fit": ("distributed", "formats", "policy"),
    "memory.command": ANY,
    "quantization": (
        "convert", "tools.files", "tools.machine", "tools.settings", "tools.quiet", "trained", "models", "data", "optim", "precision",
        "report",
    ),
    "report": (
        "baseline", "identity", "checkpoint", "tools.files", "formats", "kernels.bins", "tools.settings", "telemetry",
    ),
    "config": (
        "tools.registry", "tools.settings", "policy", "optim", "trainer_config", "telemetry", "distributed",
    ),
    "trained": ("models", "checkpoint", "tools.files", "tools.settings"),
    "export": ("models", "tools.files", "trained"),
    "doctor": ("backends.base", "config", "tools.machine", "precision", "telemetry"),  # one step, no run
    "storage": (),
    "spikes": (),
    "trainer_config": ("tools.settings",),
    "keeping": ("checkpoint", "distributed", "telemetry.ledger"),
    "protocols": ("checkpoint", "telemetry.record"),
    "validation": ("precision", "distributed", "protocols"),
    "resumption": ("config", "tools.files", "identity", "tools.settings"),
    "assembly": ANY,
    "verify": ANY,
    "prepare": ANY,  # with build and run the composition root
    "run": ANY,
    "build": ANY,
    "cli": ANY,
    "bench": ANY,
}  # fmt: skip

# Package -> the only modules that may import it. What is not named here is not a dependency; but bench measures
# against whatever peers there are.
EXTERNAL: dict[str, tuple[str, ...]] = {
    "torch": ANY,
    "hydra": ("config", "sweep"),
    "omegaconf": ("config", "resumption", "sweep"),
    "transformer_engine": ("backends.transformer_engine",),
    "torchao": ("backends.native", "optim", "quantization"),
    "wandb": ("wandb_logger",),
    "triton": ("kernels.triton",),
    "safetensors": ("checkpoint", "storage", "export", "quantization"),
    "submitit": ("sweep",),
    "yaml": ("policy", "memory"),
    "numpy": ("data", "kernels.exhaustive", "report"),
    "scipy": ("report",),
    "sklearn": ("data.digits",),
    "rich": ("loggers", "wandb_logger", "build", "run", "cli", "report", "sweep", "memory", "quantization"),
    "ml_dtypes": ("kernels.exhaustive",),
    "transformers": ("quantization", "models._huggingface", "models._experts", "models.hf"),
}


def within(module: str, folder: str) -> bool:
    """Is ``module`` that module, or one of that folder?"""
    return module == folder or module.startswith(f"{folder}.")


def name_of(path: Path, package: Path) -> str:
    """``backends.base`` for backends/base.py, ``models`` for models/__init__.py, empty for the package itself."""
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imports(source: str, module: str, is_package: bool, modules: set[str]) -> set[str]:
    """Dotted names that the source imports, wherever it stands: statements, and import_module("...") of a literal.

    ``from mptrain import x`` is the module x if there is one, else a name of the package itself; a relative import
    is resolved against ``module``.
    """
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = ["mptrain", *module.split(".")] if module else ["mptrain"]
                here = parents[: len(parents) - node.level + is_package]
                base = ".".join([*here, *filter(None, [node.module])])
            for alias in node.names:
                longer = f"{base}.{alias.name}"
                found.add(longer if longer.removeprefix("mptrain.") in modules else base)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                found.add(node.args[0].value)
    return found


def row_of(module: str) -> str | None:
    """The most exact row of INTERNAL for a module."""
    rows = [row for row in INTERNAL if row and within(module, row)]
    return max(rows, key=len, default="" if module == "" else None)


def breaches(module: str, imported: set[str]) -> list[str]:
    """What a module imports and may not, with the rule."""
    found = []
    row = row_of(module)
    if row is None:
        return [f"mptrain.{module} has no row in INTERNAL: say what it may import"]
    allowed = (*INTERNAL[row], row.partition(".")[0]) if row else INTERNAL[row]
    for name in sorted(imported):
        top, _, rest = name.partition(".")
        if top == "mptrain":
            fine = "*" in INTERNAL[row] or (rest and any(within(rest, other) for other in allowed))
            if rest and row == "backends.base" and within(rest, "backends"):
                fine = False
            if not fine:
                found.append(f"mptrain.{module} imports {name}; it may: {', '.join(allowed)}")
        elif top not in sys.stdlib_module_names and row != "bench":
            users = EXTERNAL.get(top, ())
            if "*" not in users and not any(within(module, user) for user in users):
                found.append(f"mptrain.{module} imports {name}; only these may: {', '.join(users) or 'none'}")
    return found


def tree(package: Path) -> dict[str, set[str]]:
    """Every module of a package with what it imports."""
    files = {name_of(path, package): path for path in sorted(package.rglob("*.py"))}
    known = set(files) - {""}
    return {
        module: imports(path.read_text(), module, path.name == "__init__.py", known) for module, path in files.items()
    }


TREE = tree(PACKAGE)


@pytest.mark.parametrize("module", TREE, ids=lambda module: module or "mptrain")
def test_a_module_imports_what_its_row_allows(module):
    assert breaches(module, TREE[module]) == []


def test_the_program_composes_and_does_nothing_else():
    """train.py: hydra, the configuration, the composition root and the sweeps of it."""
    known = set(TREE) - {""}
    found = imports((ROOT / "train.py").read_text(), "", False, known)
    allowed = {"hydra", "hydra.core.hydra_config", "omegaconf"}
    allowed |= {f"mptrain.{name}" for name in ("build", "config", "policy", "resumption", "sweep")}
    allowed |= {"mptrain.distributed.joining"}  # how a process of several ends
    assert {name for name in found if name.partition(".")[0] not in sys.stdlib_module_names} <= allowed
    assert {"mptrain.build", "mptrain.config"} <= found


def test_no_module_below_imports_the_composition_root():
    for module, imported in TREE.items():
        if not any(within(module, top) for top in ("build", "cli", "bench", "sweep")):
            assert not imported & {"mptrain.build", "mptrain.cli", "mptrain.sweep"}, module


def test_the_table_has_no_row_or_rule_that_a_typo_made_idle():
    """Rows are modules that exist, or folders of the design still to come; what they allow has a row itself."""
    to_come = {"memory", "quantization", "report", "bench", "machine", "baseline"}
    for row, allowed in INTERNAL.items():
        assert row in TREE or row in to_come or any(within(module, row) for module in TREE), row
        for other in allowed:
            assert other == "*" or row_of(other) is not None, other
    for users in EXTERNAL.values():
        for user in users:
            assert user == "*" or row_of(user) is not None, user


def test_no_permission_is_idle():
    """What nobody imports any more is taken from the tables: it would let the next import in unseen."""
    idle = []
    for row, allowed in INTERNAL.items():
        used = {name.removeprefix("mptrain.") for module in TREE if row_of(module) == row for name in TREE[module]}
        idle += [(row, other) for other in allowed if other != "*" and not any(within(name, other) for name in used)]
    for package, users in EXTERNAL.items():
        by = [module for module in TREE if any(name.partition(".")[0] == package for name in TREE[module])]
        idle += [(package, user) for user in users if user != "*" and not any(within(module, user) for module in by)]
    assert idle == []


def test_no_cycle_of_modules():
    """Modules in an order in which each imports only earlier ones (a package's __init__ stands for itself)."""
    names = {f"mptrain.{module}" if module else "mptrain": module for module in TREE}
    left = {m: {names[i] for i in found if i in names} - {m} for m, found in TREE.items()}
    while left:
        free = [module for module, needed in left.items() if not needed & left.keys()]
        assert free, f"a cycle among {sorted(left)}"
        for module in free:
            del left[module]


PLANTED = {
    # (file, source) -> a piece of what the check must say; None: nothing
    ("trainer.py", "import hydra"): "trainer imports hydra; only these may",
    ("trainer.py", "def f():\n    import wandb"): "trainer imports wandb",
    ("trainer.py", "from mptrain.config import RunConfig"): "trainer imports mptrain.config",
    ("trainer.py", "from mptrain import config"): "trainer imports mptrain.config",
    ("trainer.py", "from . import config"): "trainer imports mptrain.config",
    ("trainer.py", "from .backends.native import Backend"): "trainer imports mptrain.precision.backends.native",
    ("trainer.py", "import mptrain"): "trainer imports mptrain; it may",
    ("trainer.py", "from mptrain import Precision"): "trainer imports mptrain; it may",
    ("trainer.py", "import importlib\nimportlib.import_module('mptrain.models.gpt')"): "imports mptrain.models.gpt",
    ("trainer.py", "import sympy"): "trainer imports sympy; only these may: none",
    ("trainer.py", "import math, torch.nn as nn\nfrom mptrain.telemetry.ledger import Ledger"): None,
    (
        "backends/base.py",
        "from mptrain.precision.backends.native import Backend",
    ): "base imports mptrain.precision.backends.native",
    ("backends/base.py", "from .autocast import Backend"): "base imports mptrain.precision.backends.autocast",
    ("backends/base.py", "from mptrain.precision.policy import BackendName"): None,
    ("backends/emulated.py", "import transformer_engine.pytorch as te"): "only these may: backends.transformer_engine",
    ("backends/emulated.py", "from .autocast import set_tf32"): None,
    (
        "models/gpt.py",
        "from mptrain.precision.policy import PrecisionPolicy",
    ): "models.gpt imports mptrain.precision.policy",
    ("models/gpt.py", "from .. import formats"): "models.gpt imports mptrain.formats",
    ("models/gpt.py", "import numpy"): "models.gpt imports numpy",
    ("models/__init__.py", "from . import gpt"): None,
    ("formats.py", "from mptrain.tools.settings import require"): "formats imports mptrain.tools.settings",
    ("precision.py", "from mptrain.kernels import quantize"): "precision imports mptrain.kernels; it may",
    ("precision.py", "from mptrain.precision.counters import Counters"): None,
    ("bench/cpu.py", "import lightning"): None,
    ("optim.py", "import torchao"): None,
    ("convert.py", "import torchao"): "convert imports torchao; only these may: backends.native, optim, quantization",
    ("invented.py", "import math"): "mptrain.invented has no row in INTERNAL",
}


@pytest.mark.parametrize(("planted", "wanted"), PLANTED.items(), ids=[f"{f}-{s[-30:]}" for f, s in PLANTED])
def test_a_planted_import_is_found(planted, wanted, tmp_path):
    """The check can fail: a file of the package with one more import, in a tree of the same names."""
    file, source = planted
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(source)
    known = (set(TREE) | {name_of(path, tmp_path)}) - {""}
    module = name_of(path, tmp_path)
    found = breaches(module, imports(path.read_text(), module, path.name == "__init__.py", known))
    if wanted is None:
        assert found == []
    else:
        assert len(found) == 1
        assert wanted in found[0]

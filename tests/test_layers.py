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

# Folder (or module at the top of the package) -> the folders it may import. A row names rows above it only, so that
# folders form no circle and no setting travels back up. `*` is for what composes the rest, and for programs.
INTERNAL: dict[str, tuple[str, ...]] = {
    "formats": (),
    "tools": (),
    "kernels": ("formats",),
    "distributed": ("formats", "kernels", "tools"),
    "precision": ("distributed", "formats", "kernels", "tools"),
    "": ("distributed", "formats", "precision"),  # the public names
    "models": ("tools",),
    "data": ("tools",),
    "optim": ("distributed", "tools"),
    "checkpoint": ("distributed",),
    "memory": ("distributed", "formats", "kernels", "models", "optim", "precision", "tools"),
    "telemetry": ("distributed", "formats", "kernels", "memory", "precision", "tools"),
    "training": ("checkpoint", "distributed", "precision", "telemetry", "tools"),
    "config": ("distributed", "optim", "precision", "telemetry", "tools", "training"),
    "runs": ("checkpoint", "config", "models", "tools"),
    "report": ("checkpoint", "formats", "kernels", "runs", "telemetry", "tools"),
    "loggers": ("report", "telemetry", "tools"),
    "quantization": ("data", "models", "optim", "precision", "report", "runs", "tools"),
    "build": ANY,
    "bench": ANY,
    "sweep": ANY,
    "cli": ANY,
}

# Package -> the only folders or modules that may import it. What is not named here is not a dependency; but bench
# measures against whatever peers there are.
EXTERNAL: dict[str, tuple[str, ...]] = {
    "torch": ANY,
    "hydra": ("config", "sweep"),
    "omegaconf": ("config", "runs.resumption", "sweep"),
    "transformer_engine": ("precision.backends.te",),
    "torchao": ("precision.backends.native", "optim", "quantization"),
    "wandb": ("loggers.wandb",),
    "triton": ("kernels.triton",),
    "safetensors": ("checkpoint", "runs.export", "quantization"),
    "submitit": ("sweep",),
    "yaml": ("precision.policy", "memory"),
    "numpy": ("data", "kernels.exhaustive", "report", "runs.read"),
    "scipy": ("report",),
    "jinja2": ("report.html",),
    "markupsafe": ("report",),
    "sklearn": ("data.digits",),
    "rich": ("loggers", "build", "cli", "report", "sweep", "memory", "quantization"),
    "ml_dtypes": ("kernels.exhaustive",),
    "transformers": ("quantization", "models._huggingface", "models._experts", "models.hf"),
}
BACKENDS = (
    "autocast",
    "native",
    "te",
    "emulated.backend",
)  # chosen by name, and imported when asked for


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


def folder_of(module: str) -> str:
    """``precision`` for precision.backends.base, empty for the package itself."""
    return module.partition(".")[0]


def breaches(module: str, imported: set[str]) -> list[str]:
    """What a module imports and may not, with the rule."""
    folder = folder_of(module)
    if folder not in INTERNAL:
        return [f"mptrain.{module} has no row in INTERNAL: say what its folder may import"]
    allowed, found = INTERNAL[folder], []
    for name in sorted(imported):
        top, _, rest = name.partition(".")
        if top == "mptrain":
            fine = "*" in allowed or (rest and folder_of(rest) in (*allowed, folder))
            if module != rest and any(rest == f"precision.backends.{backend}" for backend in BACKENDS):
                own = module.removeprefix("precision.backends.")
                fine = folder == "bench" or own in (*BACKENDS, "emulated")
            if not fine:
                found.append(f"mptrain.{module} imports {name}; it may: {', '.join((*allowed, folder))}")
        elif top not in sys.stdlib_module_names and folder != "bench":
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
    allowed |= {f"mptrain.{name}" for name in ("build", "config", "precision.policy", "runs.resumption", "sweep")}
    allowed |= {"mptrain.cli.errors", "mptrain.distributed.joining"}  # how a process ends, and one of several
    assert {name for name in found if name.partition(".")[0] not in sys.stdlib_module_names} <= allowed
    assert {"mptrain.build", "mptrain.config"} <= found


def test_folders_form_no_circle():
    """Each row names rows above it, but for those that compose; what these import, imports none of them."""
    order = list(INTERNAL)
    for folder, allowed in INTERNAL.items():
        above = order[: order.index(folder)]
        assert "*" in allowed or set(allowed) <= set(above), folder
    composing = [folder for folder, allowed in INTERNAL.items() if "*" in allowed]
    assert composing == ["build", "bench", "sweep", "cli"]
    users = {
        folder: {folder_of(name.removeprefix("mptrain.")) for module in TREE if folder_of(module) == folder
                 for name in TREE[module] if name.startswith("mptrain.")} - {folder}
        for folder in INTERNAL
    }  # fmt: skip
    left = dict(users)
    while left:
        free = [folder for folder, needed in left.items() if not needed & left.keys()]
        assert free, f"a circle of folders among {sorted(left)}"
        for folder in free:
            del left[folder]


def test_a_newcomer_finds_at_most_24_names_and_nothing_long():
    names = {path.name for path in PACKAGE.iterdir() if path.name not in ("__pycache__", "py.typed")}
    assert len(names) <= 24, sorted(names)
    sources = {path: path.read_text() for path in PACKAGE.rglob("*.py")}
    sources |= {path: path.read_text() for path in (ROOT / "tests").rglob("*.py")}
    assert [str(path) for path, source in sources.items() if len(source.splitlines()) > 350] == []
    assert len(sources[PACKAGE / "training" / "trainer.py"].splitlines()) <= 250, "the loop is read on one screen"
    package = [source for path, source in sources.items() if path.is_relative_to(PACKAGE)]
    functions = [node for source in package for node in ast.walk(ast.parse(source)) if hasattr(node, "args")]
    assert [node.name for node in functions if hasattr(node, "name") and node.end_lineno - node.lineno >= 55] == []


def test_no_docstring_begins_with_what():
    """Docstrings say what a thing is, or what a call does, in the imperative."""
    begun = [
        f"{path.relative_to(PACKAGE)}:{node.body[0].lineno}"
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and (ast.get_docstring(node) or "").startswith("What")
    ]
    assert begun == []


def test_no_row_or_permission_is_idle():
    """What nobody imports any more is taken from the tables: it would let the next import in unseen."""
    idle: list[tuple[str, str]] = []
    for folder, allowed in INTERNAL.items():
        modules = [module for module in TREE if folder_of(module) == folder]
        assert modules, f"there is no {folder}"
        used = {folder_of(name.removeprefix("mptrain.")) for module in modules for name in TREE[module] if "." in name}
        idle += [(folder, other) for other in allowed if other != "*" and other not in used]
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
    ("training/trainer.py", "import hydra"): "training.trainer imports hydra; only these may",
    ("training/trainer.py", "def f():\n    import wandb"): "training.trainer imports wandb",
    ("training/trainer.py", "from mptrain.config import RunConfig"): "training.trainer imports mptrain.config",
    ("training/trainer.py", "from mptrain import config"): "training.trainer imports mptrain.config",
    ("training/trainer.py", "from .. import config"): "training.trainer imports mptrain.config",
    ("training/trainer.py", "from ..precision.backends.native import Backend"): "precision.backends.native; it may",
    ("training/trainer.py", "import mptrain"): "training.trainer imports mptrain; it may",
    ("training/trainer.py", "from mptrain import Precision"): "training.trainer imports mptrain; it may",
    ("training/trainer.py", "import importlib\nimportlib.import_module('mptrain.models.gpt')"): "mptrain.models.gpt",
    ("training/trainer.py", "import sympy"): "training.trainer imports sympy; only these may: none",
    ("training/trainer.py", "import math, torch.nn as nn\nfrom mptrain.telemetry.ledger import Ledger"): None,
    ("precision/backends/__init__.py", "from mptrain.precision.backends.native import Backend"): "backends imports",
    ("precision/backends/__init__.py", "from .autocast import Backend"): "imports mptrain.precision.backends.autocast",
    ("precision/backends/__init__.py", "from mptrain.precision.policy import PrecisionPolicy"): None,
    ("precision/backends/emulated/linear.py", "import transformer_engine.pytorch as te"): "only these may",
    ("models/gpt.py", "from mptrain.precision.policy import PrecisionPolicy"): "models.gpt imports",
    ("models/gpt.py", "from .. import formats"): "models.gpt imports mptrain.formats",
    ("models/gpt.py", "import numpy"): "models.gpt imports numpy",
    ("models/__init__.py", "from . import gpt"): None,
    ("formats.py", "from mptrain.tools.settings import require"): "formats imports mptrain.tools.settings",
    ("kernels/tiles.py", "from mptrain.precision.counters import Counters"): "kernels.tiles imports mptrain.precision",
    ("precision/runtime.py", "from mptrain.precision.counters import Counters"): None,
    ("telemetry/meters.py", "from mptrain.report.wording import percent"): "telemetry.meters imports mptrain.report",
    ("bench/cpu.py", "import lightning"): None,
    ("optim/__init__.py", "import torchao"): None,
    ("precision/convert.py", "import torchao"): "convert imports torchao; only these may: precision.backends.native",
    ("invented.py", "import math"): "mptrain.invented has no row in INTERNAL",
}  # fmt: skip


@pytest.mark.parametrize(("planted", "wanted"), PLANTED.items(), ids=[f"{f}-{s[-30:]}" for f, s in PLANTED])
def test_a_planted_import_is_found(planted, wanted, tmp_path):
    """The check can fail: a file of the package with one more import, in a tree of the same names."""
    file, source = planted
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
    known = (set(TREE) | {name_of(path, tmp_path)}) - {""}
    module = name_of(path, tmp_path)
    found = breaches(module, imports(path.read_text(), module, path.name == "__init__.py", known))
    if wanted is None:
        assert found == []
    else:
        assert len(found) == 1
        assert wanted in found[0]

"""A wheel that was built has what a checkout has: the settings, the templates, the models and GPUs of the planner."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAIN = "import sys; from mptrain.cli import main; sys.exit(main())"
EARLIER = ROOT / "tests" / "golden" / "earlier"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The unpacked wheel, from the files that git tracks."""
    source, built, unpacked = (tmp_path_factory.mktemp(name) for name in ("source", "built", "unpacked"))
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout: which files belong to it is not known")
    for name in filter(lambda n: not n.startswith("tests/"), listed.stdout.splitlines()):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            (source / name).symlink_to(os.readlink(ROOT / name))
        elif (ROOT / name).exists():
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", built, source]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (wheel,) = built.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(unpacked)
    return unpacked


def test_it_renders_a_page(installed, tmp_path):
    runs = sorted(str(folder) for folder in EARLIER.iterdir() if (folder / "metrics.jsonl").exists())
    page = tmp_path / "report.html"
    command = [sys.executable, "-c", MAIN, "compare", *runs, "--html", str(page)]
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = page.read_text()
    assert "prefers-color-scheme: dark" in text
    assert "<table data-table='summary'>" in text


def test_it_has_every_file_that_is_not_python(installed):
    kinds = {".yaml", ".html", ".css", ".c", ".h", ".typed"}
    tracked = subprocess.run(["git", "ls-files", "mptrain"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    wanted = {name for name in tracked if Path(name).suffix in kinds or name.endswith("py.typed")}
    wanted |= {f"mptrain/{path.relative_to(ROOT)}" for path in (ROOT / "conf").rglob("*.yaml")}
    assert {name for name in wanted if not (installed / name).exists()} == set()

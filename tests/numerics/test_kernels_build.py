"""Building the C kernels at first use: cached, atomic, and never fatal."""

import ctypes
import os
import subprocess
import sys

import pytest
import torch

from mptrain.kernels import c

CPU = torch.device("cpu")


@pytest.fixture
def fresh_build(monkeypatch, tmp_path):
    """Build as on a new machine, unoptimised to be quick: into tmp_path/cache, temporary files in tmp_path/tmp."""
    if c.missing(CPU):
        pytest.skip(f"C kernels: {c.missing(CPU)}")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("MPTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(c.tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(c, "FLAGS", ("-O0", "-fPIC"))
    c._fingerprint.cache_clear()
    return c._library.__wrapped__


def test_built_once_then_loaded_from_the_cache(fresh_build, monkeypatch, tmp_path):
    assert fresh_build()[1] == ""
    made = [path.name for path in (tmp_path / "cache" / "kernels").iterdir()]
    assert len(made) == 1
    monkeypatch.setattr(c, "_build", None)  # a second build would now fail
    assert isinstance(fresh_build()[0], ctypes.CDLL)


def test_damaged_cache_file_is_built_again(fresh_build, monkeypatch, tmp_path):
    fresh_build()
    (file,) = (tmp_path / "cache" / "kernels").iterdir()
    # Elsewhere: a path that this process has loaded once is not opened again.
    monkeypatch.setenv("MPTRAIN_CACHE", str(tmp_path / "other"))
    damaged = tmp_path / "other" / "kernels" / file.name
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(b"\x7fELF, cut short")
    assert fresh_build()[1] == ""
    assert damaged.stat().st_size > 10_000


def test_unusable_cache_falls_back_to_a_private_temporary_folder(fresh_build, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert fresh_build()[1] == ""
    (folder,) = (tmp_path / "tmp").glob("mptrain-*")
    assert folder.stat().st_mode & 0o077 == 0
    assert len(list(folder.glob("quantize-*.so"))) == 1


def test_interrupted_build_leaves_nothing_behind(fresh_build, monkeypatch, tmp_path):
    real = subprocess.run

    def interrupted(command, **options):
        if "-shared" in command:
            raise KeyboardInterrupt
        return real(command, **options)

    with monkeypatch.context() as patch:
        patch.setattr(c.subprocess, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fresh_build()
    assert list((tmp_path / "cache" / "kernels").iterdir()) == []
    assert fresh_build()[1] == ""


def test_without_a_working_compiler_the_reason_is_told(fresh_build, monkeypatch, tmp_path):
    monkeypatch.setenv("CC", "no-such-compiler")
    assert "no C compiler found (tried no-such-compiler)" in fresh_build()[1]
    broken = tmp_path / "broken-cc"
    broken.write_text("#!/bin/sh\necho 'fatal error: disk on fire' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    assert "disk on fire" in fresh_build()[1]
    environment = {**os.environ, "MPTRAIN_KERNELS": ""}
    script = "import torch; from mptrain import kernels; print(kernels.implementation(torch.device('cpu')))"
    ran = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "eager"


@pytest.mark.parametrize(
    ("file", "right", "wrong"),
    [
        ("common.h", "0x43e00000u", "0x43d00000u"),  # E4M3's maximum: 416
        ("observe.h", "#define LAST 2040", "#define LAST 2039"),
    ],
)
def test_a_wrong_library_is_refused(fresh_build, monkeypatch, tmp_path, file, right, wrong):
    for source in c.SOURCES.glob("*.[ch]"):
        text = source.read_text()
        (tmp_path / source.name).write_text(text.replace(right, wrong) if source.name == file else text)
    monkeypatch.setattr(c, "SOURCES", tmp_path)
    assert "differ from torch's casts" in fresh_build()[1]


def test_two_processes_may_build_at_once(fresh_build, tmp_path):
    script = (
        "import torch; from mptrain.kernels import c; c.FLAGS = ('-O0', '-fPIC');"
        "assert c.missing(torch.device('cpu')) == ''"
    )
    builders = [subprocess.Popen([sys.executable, "-c", script]) for _ in range(2)]
    assert [builder.wait(60) for builder in builders] == [0, 0]
    assert len(list((tmp_path / "cache" / "kernels").iterdir())) == 1

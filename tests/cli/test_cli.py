"""The ``mptrain`` command, in this process."""

import math
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import torch

import mptrain
from mptrain import cli, kernels
from mptrain.formats import Format
from mptrain.report.inspect import formats
from mptrain.tools import machine


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")


def test_help_names_every_command(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    shown = [line.split()[0] for line in text.splitlines() if line.startswith("  ")]
    assert shown == [
        "doctor", "formats", "inspect", "compare", "export", "plan", "quantize", "deploy-matrix", "bench",
        "verify-resume",
    ]  # fmt: skip
    assert list(cli.commands()) == shown


@pytest.mark.parametrize("command", cli.commands())
def test_every_command_has_a_help_that_lists_its_options(command, capsys):
    with pytest.raises(SystemExit) as leaving:
        raise SystemExit(cli.main([command, "--help"]))
    assert leaving.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: mptrain {command}")
    assert "--help" in text
    assert "``" not in text


def test_the_version_is_that_of_the_package(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"mptrain {mptrain.__version__}\n"


@pytest.mark.parametrize("module", ["mptrain", "mptrain.cli", "mptrain.cli.formats", "mptrain.cli.compare"])
def test_what_needs_no_torch_does_not_import_it(module):
    """Importing torch takes two seconds."""
    script = f"import sys, {module}; sys.exit(any(name in sys.modules for name in ('torch', 'hydra', 'wandb')))"
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 0


def test_the_names_of_the_package_are_there_when_asked_for():
    assert {name for name in mptrain.__all__ if getattr(mptrain, name) is not None} == set(mptrain.__all__)
    assert set(mptrain.__all__) <= set(dir(mptrain))
    with pytest.raises(AttributeError, match="has no attribute 'Precison'"):
        _ = mptrain.Precison


def test_an_unknown_command_is_answered_with_the_nearest(capsys):
    with pytest.raises(SystemExit) as leaving:
        cli.main(["docter"])
    assert leaving.value.code == 2
    assert "did you mean 'doctor'" in capsys.readouterr().err


def test_formats_shows_what_the_definitions_say(capsys):
    assert cli.main(["formats"]) == 0
    text = capsys.readouterr().out
    for fmt in Format:
        assert str(fmt) in text
    row = next(line for line in text.splitlines() if "fp8_e4m3" in line)
    assert "448" in row
    assert "0.015625" in row


def fates(capsys, *values):
    """For each value, format -> the words of its line."""
    assert cli.main(["formats", *values]) == 0
    found = []
    for line in capsys.readouterr().out.splitlines():
        words = line.split()
        if words[:1] == ["format"]:
            found.append({})
        elif found and words and words[0] in Format.__members__:
            found[-1][words[0]] = words[1:]
    return found


@pytest.mark.parametrize("text", ["1e-3", "-2^-10", "0x1.8p+4", "500", "-3.4e4", "0.3", "2^-20", "0"])
def test_formats_shows_what_the_casts_of_others_make_of_a_number(text, capsys):
    value = formats.parse_number(text)
    (rows,) = fates(capsys, text)
    others = {
        "fp16": np.float16,
        "bf16": ml_dtypes.bfloat16,
        "fp8_e4m3": ml_dtypes.float8_e4m3fn,
        "fp8_e5m2": ml_dtypes.float8_e5m2,
        "fp4_e2m1": ml_dtypes.float4_e2m1fn,
    }
    for name, dtype in others.items():
        cast = float(np.array(value, dtype=np.float32).astype(dtype))
        shown = float(rows[name][0])
        if np.isfinite(cast):
            assert shown == pytest.approx(cast, rel=1e-8), name
            assert ("flushed" in rows[name]) == (cast == 0 and value != 0), name
        else:  # E4M3 makes NaN of what it cannot hold, E5M2 Inf; ours stops at the maximum and says so
            assert abs(shown) == Format[name].value.max
            assert "saturates" in rows[name]
        kept = cast if np.isfinite(cast) else shown
        wanted = "exact" if kept == value else f"{abs(kept - value) / abs(value):.2%}"
        assert rows[name][1] == wanted or "e-" in rows[name][1]
    assert float(rows["int8"][0]) == max(-127, min(127, round(value)))
    assert set(rows) == set(Format.__members__) - {"e8m0"}


def test_formats_of_subnormals_infinities_and_nan(capsys):
    small, infinite, nan = fates(capsys, "2^-8", "-inf", "nan")
    assert "subnormal:" in small["fp8_e4m3"]
    assert "subnormal:" not in small["fp8_e5m2"]
    assert infinite["fp16"][0] == "-inf"
    assert "Inf:" in infinite["fp8_e4m3"]
    assert nan["fp8_e4m3"][0] == "nan"
    assert nan["int8"][:2] == ["-", "-"]


@pytest.mark.parametrize("text", ["abc", "2^^3", "", "1e", "0x", "10^400", "0^-1"])
def test_what_is_no_number_is_refused(text, capsys):
    with pytest.raises(SystemExit) as leaving:
        cli.main(["formats", "1", text])
    assert leaving.value.code == 2
    assert "is not a number" in capsys.readouterr().err


def test_formats_knows_who_has_inf_and_nan_and_its_exponent_bits():
    found = {fmt.name: (formats.exponent_bits(fmt.value), fmt.value.has_inf, fmt.value.has_nan) for fmt in Format}
    for fmt in Format:
        if fmt.value.dtype is not None and fmt.value.dtype.is_floating_point:  # as torch casts
            assert bool(torch.tensor(math.nan).to(fmt.value.dtype).float().isnan()) == fmt.value.has_nan, fmt
    assert found == {
        "fp32": (8, True, True),
        "tf32": (8, True, True),
        "bf16": (8, True, True),
        "fp16": (5, True, True),
        "fp8_e4m3": (4, False, True),
        "fp8_e5m2": (5, True, True),
        "fp4_e2m1": (2, False, False),
        "e8m0": (8, False, True),
        "int8": (0, False, False),
        "int4": (0, False, False),
    }


def test_doctor_says_for_every_precision_which_backend_is_used_and_why_not_the_others(capsys):
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    for name in ("fp32", "tf32", "bf16", "fp16", "fp8", "fp8-delayed", "fp8-rowwise", "fp8-block"):
        assert f"precision={name}" in text
    blocks = text.split("precision=")[1:]
    assert all(block.count("used") == 1 for block in blocks)
    device = machine.pick_device("auto")
    assert f"quantizer on {device}: {kernels.implementation(device)}" in text


def test_bench_needs_a_subject(capsys):
    with pytest.raises(SystemExit) as leaving:
        cli.main(["bench"])
    assert leaving.value.code == 2
    assert "bench cpu" in capsys.readouterr().err

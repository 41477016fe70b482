"""The ``mptrain`` command, in this process."""

import pytest

from mptrain import cli, kernels, machine
from mptrain.formats import Format


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")


def test_help_names_every_command_but_the_probe(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for name in ("doctor", "formats", "bench"):
        assert f"  {name}" in text
    assert "probe" not in text


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


def test_doctor_says_for_every_precision_which_backend_is_used_and_why_not_the_others(capsys):
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    for name in ("fp32", "tf32", "bf16", "fp16", "fp8", "fp8-delayed"):
        assert f"precision={name}" in text
    blocks = text.split("precision=")[1:]
    assert all(block.count("used") == 1 for block in blocks)
    device = machine.pick_device("auto")
    assert f"quantizer on {device}: {kernels.implementation(device)}" in text


def test_bench_needs_a_device(capsys):
    with pytest.raises(SystemExit) as leaving:
        cli.main(["bench"])
    assert leaving.value.code == 2
    assert "bench cpu" in capsys.readouterr().err

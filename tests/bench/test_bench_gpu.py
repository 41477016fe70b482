"""``mptrain bench gpu --dry-run``: every line of the benchmark, on a CPU."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mptrain.bench import gpu
from mptrain.memory.gpus import dense_tflops

pytestmark = [  # torch.compile's own
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny products on several threads wait for each other: 300 ms a step instead of 4 on a shared machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_dry_run_has_a_row_for_every_variant(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "ROUNDS", 2)
    path = tmp_path / "bench.json"
    assert gpu.run(["--dry-run", "--models", "gpt-small", "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert found["machine"]["torch"] == torch.__version__
    assert found["machine"]["command"].startswith("mptrain bench gpu --dry-run")
    rows = {row["variant"]: row for row in found["rows"]}
    assert list(rows) == [variant.name for variant in gpu.variants(dry_run=True)]
    for row in rows.values():
        if "@te" in row["variant"]:
            assert "Transformer Engine" in row["reason"]
            continue
        if row["compiled"] and (row["precision"] in ("fp16", "tf32") or "@emulated" in row["variant"]):
            assert row["reason"] == "an emulation is not worth compiling"
            continue
        assert row["reason"] == "", row
        assert row["steps"] == len(row["times_ms"]) == 4, "two rounds of two steps"
        assert row["mfu"] is None, "a CPU has no peak in the table"
        assert (row["tokens_per_s"] is None) == row["emulated"]
    for name in ("fp8@native", "fp8@native compiled", "fp8@emulated", "fp8-delayed@emulated", "fp16", "tf32"):
        assert rows[name]["emulated"], name
    assert rows["fp8@emulated"]["converted"] == 8
    assert rows["bf16"]["to_bf16"] == 1.0
    assert "to_bf16" in rows["bf16 (A/A)"]
    assert "to_bf16" not in rows["fp8@emulated"], "the speed of an emulation is not compared"
    printed = capsys.readouterr().out
    assert printed.count("n/a (emulated)") == sum(bool(row.get("emulated")) for row in rows.values())


def test_running_out_of_memory_or_time_is_a_row(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gpu.Settings, "model", full)
    assert gpu.run(["--dry-run", "--models", "gpt-1.3b"]) == 0
    assert "out of memory at batch 2 x 32" in capsys.readouterr().out
    assert gpu.run(["--dry-run", "--models", "gpt-1.3b", "--minutes", "-1"]) == 0
    assert "the time budget of -1 minutes was spent" in capsys.readouterr().out


def test_mfu_weighs_each_flop_by_the_peak_of_its_format() -> None:
    h100 = dense_tflops("NVIDIA H100 80GB HBM3")
    half = gpu.mfu(1e6, 1e9, 0.5, "bf16", h100)
    assert half == pytest.approx(1e15 * (0.5 / 1979e12 + 0.5 / 989e12))
    assert gpu.mfu(1e6, 1e9, 0.0, "fp32", h100) == pytest.approx(1e15 / 67e12)
    assert gpu.mfu(1e6, 1e9, 0.5, "bf16", dense_tflops("NVIDIA A100-SXM4-80GB")) is None, "it has no FP8"


def test_sizes_are_those_of_the_table() -> None:
    settings = gpu.Settings(torch.device("meta"), 1.0, None)
    wanted = {"gpt-small": 124e6, "gpt-350m": 355e6, "gpt-1.3b": 1.31e9}
    for name, parameters in wanted.items():
        model = settings.model(gpu.SIZES[name])
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=0.02)


def test_what_cannot_be_measured_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.run(["--models", "gpt-tiny"]) == 2
    assert "known: gpt-small" in capsys.readouterr().out
    if not torch.cuda.is_available():
        assert gpu.run([]) == 2
        assert "--dry-run" in capsys.readouterr().out

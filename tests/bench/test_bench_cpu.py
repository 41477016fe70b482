"""``mptrain bench cpu --dry-run``: every line of the benchmark, with tiny sizes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mptrain.bench import cpu, rows

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # torch.compile's own


def test_dry_run_measures_every_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads, path = torch.get_num_threads(), tmp_path / "bench.json"
    assert cpu.run(["--dry-run", "--repeats", "3", "--json", str(path)]) == 0
    assert torch.get_num_threads() == threads
    found = json.loads(path.read_text())
    assert found["machine"]["torch"] == torch.__version__
    assert found["machine"]["threads"] == "1"
    assert found["machine"]["command"].startswith("mptrain bench cpu --dry-run")
    rows = {row["name"]: row for row in found["rows"]}
    assert {f"GPT step: {name} / {base}" for name, base, *_ in cpu.GPT_ROWS} <= rows.keys()
    assert len(rows) == 4 + 2 + len(cpu.GPT_ROWS), "trainer, kernels, GPT"
    for name, row in rows.items():
        assert row["measured"] is not None, row
        assert row["wall"] is not None
        assert row["verdict"] in (("information",) if row["target"] is None else ("met", "missed"))
        assert row["measured"] > 0 or row["unit"] == "us", "a ratio of times"
        assert (row["noise"] is None) == ("torchao" in name), "its reference has no twin"
    printed = capsys.readouterr().out
    assert all(name in printed for name in rows)


def test_a_missing_implementation_is_a_row_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = {name: cpu.GPT_VARIANTS[name] for name in ("bf16",)} | {"fp8, C kernels": ("fp8", "emulated", "fortran")}
    monkeypatch.setattr(cpu, "GPT_VARIANTS", wanted)
    rows = {row.name: row for row in cpu.measure_gpt(cpu.TINY)}
    row = rows["GPT step: fp8, C kernels / bf16"]
    assert row.verdict.startswith("not measured: use(): unknown kernels 'fortran'")


def test_figures_are_medians_of_paired_ratios() -> None:
    turns = rows.Turns({"a": int, "b": int, "b" + rows.TWIN: int}, repeats=3)
    turns.samples = {
        "a": [(2.0, 1.0), (30.0, 1.0), (9.0, 1.0)],
        "b": [(1.0, 1.0), (10.0, 2.0), (1.0, 4.0)],
        "b" + rows.TWIN: [(1.0, 0.0), (20.0, 0.0), (3.0, 0.0)],
    }
    row = turns.fill(rows.Row("a / b", 3.0), "a", "b")
    assert (row.measured, row.wall, row.noise) == (3.0, 0.5, 2.0)
    assert row.verdict == "met"
    assert rows.Row("a / b", 3.0, at_most=False, measured=2.9).verdict == "missed"
    assert "information" in str(rows.Row("a / b", measured=1.0))


def test_the_null_model_is_the_one_described() -> None:
    assert sum(p.numel() for p in cpu.NullModel().parameters()) == 952

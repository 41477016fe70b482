"""What a run says of its own plan."""

import json
import runpy
from pathlib import Path

import pytest

from mptrain.bench import plan as bench
from mptrain.memory.training.grading import REST, Grade, graded
from mptrain.memory.training.plan import TrainingPlan

MEASURE = Path(__file__).parents[2] / "recipes" / "measure.py"
GIB = 2**30


def planned(**roles: int) -> TrainingPlan:
    sizes = {role.replace("_", " "): size * GIB for role, size in roles.items()}
    return TrainingPlan("bf16", "autocast", "forward", sizes, {}, {}, "", 1, 1)


def test_errors_are_shares_of_the_measured_peak():
    found = graded(planned(weights=4, activations=5), {"weights": 4.0, "activations": 5.5, "workspace": 0.5})
    assert found.off_frac == pytest.approx(9 / 10 - 1)
    assert found.by_role() == pytest.approx({"weights": 0.0, "activations": -0.05, "workspace": -0.05})
    assert found.metrics()["memory/plan_error_frac"] == pytest.approx(-0.1)
    assert found.metrics()["memory/plan_error_workspace_frac"] == pytest.approx(-0.05)
    assert json.loads(json.dumps(found.plain()))["planned_gib"] == 9


def test_what_an_allocator_knows_only_together_is_compared_together():
    measured = {"weights": 4.0, "gradients": 4.0, "moments": 8.0, REST: 5.0}  # gradients: all, whenever they came
    found = graded(planned(weights=4, moments=8, gradients=1, weight_copies=2, activations=5), measured)
    assert found.planned_gib == {"weights": 4.0, "moments": 8.0, REST: 8.0}
    assert found.measured_gib == {"weights": 4.0, "moments": 8.0, REST: 9.0}
    assert found.off_frac == pytest.approx(20 / 21 - 1)


def test_a_run_that_measured_nothing_has_no_grade():
    assert graded(planned(weights=4), {}) is None


def test_the_benchmark_has_every_cell_and_sees_a_plan_that_is_off(tmp_path, monkeypatch, capsys, one_thread):
    assert len(list(bench.cells(dry_run=False))) == 4 * 2 * 2 * 2
    monkeypatch.setattr(bench, "MODELS", ("gpt-nano",))
    path = tmp_path / "plan.json"
    assert bench.run(["--dry-run", "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert [row["verdict"] for row in found["rows"]] == ["met"]
    assert max(row["measured"] for row in found["rows"]) < 0.1
    table = runpy.run_path(str(MEASURE))["plan_table"](found)
    assert "1 of 1 (at most 3 %)" in table
    off = Grade({"weights": 1.0, "activations": 0.9}, {"weights": 1.0, "activations": 1.0})
    monkeypatch.setattr(bench, "grade", lambda overrides: off)
    row = bench.row_of("planted", [])
    assert (row.verdict, row.largest_role, row.measured) == ("missed", "activations", pytest.approx(5.0))

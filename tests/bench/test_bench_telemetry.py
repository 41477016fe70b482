"""``mptrain bench telemetry --dry-run``: every line of the benchmark, with tiny sizes."""

import json

import pytest
import torch

from mptrain import cli
from mptrain.bench.telemetry import DEFAULT, Clock


def test_dry_run(tmp_path, capsys):
    threads, path = torch.get_num_threads(), tmp_path / "bench.json"
    assert cli.main(["bench", "telemetry", "--dry-run", "--json", str(path)]) == 0
    assert torch.get_num_threads() == threads
    found = json.loads(path.read_text())
    assert found["machine"]["threads"] == "1"
    rows = {row["name"]: row for row in found["rows"]}
    shares = [rows[f"tiny: inside the calls, every {n}"]["measured"] for n in (1, 10)]
    shares.append(rows[f"tiny: inside the calls, every {DEFAULT} (default)"]["measured"])
    assert shares[0] > shares[1] > shares[2] > 0
    assert rows["tiny: whole step, recorder, every step"]["measured"] > 1
    assert rows["tiny: whole step, hooks that call .item(), every step"]["noise"] is not None
    assert "information" in capsys.readouterr().out


def test_the_clock_counts_nested_calls_once(monkeypatch):
    now = iter([0.0, 1.0, 10.0])
    monkeypatch.setattr("time.thread_time", lambda: next(now))
    clock = Clock()
    inner = clock.wrapping(lambda: None)
    clock.wrapping(inner)()
    assert clock.seconds == pytest.approx(10.0)

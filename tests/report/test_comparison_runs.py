"""Which runs are compared with which; damaged ones; the command."""

import json
import shutil
import threading
import time
from dataclasses import replace

import pytest
from compared_runs import STEPS, by_label, shifted, sweep
from fake_runs import falling, settings, write

from mptrain import cli
from mptrain.distributed.layout import DistConfig
from mptrain.report.compare import watch
from mptrain.report.compare.compare import NothingToCompare, compare
from mptrain.report.compare.comparison import Kind
from mptrain.runs.folder import claim
from mptrain.runs.read import Status, expand, read


def test_other_data_or_weights_are_refused_with_the_difference(tmp_path):
    write(tmp_path / "a", settings("fp32"))
    write(tmp_path / "b", settings("fp8"), about={"corpus": "dead"})
    with pytest.raises(NothingToCompare, match=r"b and .*a cannot be compared.* data.corpus is dead here and c0ffee"):
        compare([tmp_path / "a", tmp_path / "b"])
    write(tmp_path / "c", settings("bf16"), about={"initial_weights": "x", "torch": "2.12"})
    found = by_label(compare([tmp_path / "a", tmp_path / "c"]))["bf16"]
    assert found.verdict.text == "no finished run"
    assert found.runs[0].why == (
        "excluded: initial weights differ from a, the baseline run with this seed (torch 2.12 here, 2.13.0 there)"
    )


def test_each_learning_rate_has_its_own_baseline(tmp_path):
    for lr in (1e-3, 3e-3):
        for name in ("fp32", "fp8"):
            write(tmp_path / f"{name},{lr}", settings(name, lr=lr))
    write(tmp_path / "fp8,0.1", settings("fp8", lr=0.1))
    comparison = compare([tmp_path])
    assert [group.label for group in comparison.groups] == ["lr=0.001", "lr=0.003", "lr=0.1"]
    assert [group.baseline for group in comparison.groups] == ["fp32", "fp32", None]
    assert "lr=0.1: no baseline ran with these settings (optim.lr is 0.1 here and 0.001 there)" in comparison.notes
    assert comparison.groups[2].variants[0].verdict.text.startswith("no baseline: add runs with precision=fp32")


def test_variants_are_called_by_what_tells_them_apart(tmp_path):
    write(tmp_path / "fp32", settings("fp32"))
    write(tmp_path / "fp32h", settings("fp32", 1, quantization={"history": 7}))  # unused: the same variant
    for history in (1, 16):
        write(tmp_path / f"d{history}", settings("fp8-delayed", quantization={"history": history}))
    write(tmp_path / "bf16", settings("bf16"))
    write(tmp_path / "pure", settings("bf16", weights="bf16"))
    found = by_label(compare([tmp_path]))
    assert set(found) == {"fp32", "fp8-delayed history=1", "fp8-delayed history=16", "bf16", "bf16 weights=bf16"}
    assert len(found["fp32"].runs) == 2


def test_without_fp32_the_runs_with_fp32_masters_are_the_baseline(tmp_path):
    for seed in range(3):
        write(tmp_path / f"m{seed}", settings("bf16", seed))
        write(tmp_path / f"p{seed}", settings("bf16", seed, weights="bf16"), shifted(seed, 0.1))
    comparison = compare([tmp_path])
    assert comparison.groups[0].baseline == "bf16"
    assert by_label(comparison)["bf16 weights=bf16"].verdict.kind is Kind.worse


def test_a_named_baseline_takes_the_place_of_fp32(tmp_path):
    root = sweep(tmp_path, {"fp32": 0.0, "bf16": 0.0, "fp8": 0.06})
    comparison = compare([root], baseline=root / "fp8,0" / ".." / "bf16,1")
    assert len(by_label(comparison)["bf16"].runs) == 3
    assert comparison.groups[0].baseline == "bf16"
    assert by_label(comparison)["fp32"].verdict.kind is Kind.equivalent


def test_a_run_done_twice_counts_once_and_says_so(tmp_path):
    write(tmp_path / "a", settings("fp32"), summary={"ended": "2026-01-01T00:00:00"})
    write(tmp_path / "b", settings("fp32"), summary={"ended": "2026-01-02T00:00:00"})
    write(tmp_path / "c", settings("bf16"))
    rows = {row.name: row.why for row in by_label(compare([tmp_path]))["fp32"].runs}
    assert rows == {"a": "repeated by b, which counts", "b": ""}


def test_damaged_and_unfinished_runs_are_rows_that_say_so(tmp_path):
    root = sweep(tmp_path, {"fp32": 0.0, "fp8": 0.0})
    half = write(root / "half", settings("fp8", 7), falling()[:90], finished=False)
    with (half / "metrics.jsonl").open("a") as rows:
        rows.write('{"step": 91, "train/lo')
    torn = write(root / "torn", settings("fp8", 8))
    (torn / "summary.json").write_text('{"precision": "fp')
    failed = root / "failed"
    write(failed, settings("fp8", 9), [], finished=False)
    (failed / "error.json").write_text(json.dumps({"error": "out of GPU memory: lower trainer.batch_size"}))
    write(root / "lost", settings("fp8", 10))
    (root / "lost" / "config.json").unlink()
    working = write(root / "working", settings("fp8", 11), falling()[:50], finished=False)
    held = claim(working)
    try:
        comparison = compare([root])
    finally:
        held.close()
    variant = by_label(comparison)["fp8"]
    rows = {row.name: row for row in variant.runs}
    assert variant.loss.val_delta.n == 3
    assert (rows["half"].status, rows["half"].steps) == (Status.stopped, 90)
    assert rows["half"].why == "stopped at step 90 of 200: start it again"
    assert (rows["torn"].status, rows["torn"].why) == (Status.unreadable, "summary.json is incomplete or corrupt")
    assert (rows["failed"].status, rows["failed"].why) == (Status.failed, "out of GPU memory: lower trainer.batch_size")
    assert rows["working"].status is Status.running
    assert rows["working"].why.startswith("at step 50 of 200, last heard of")
    assert any("lost: no config.json: its settings are unknown" in note for note in comparison.notes)
    assert read(working).status is Status.stopped  # nobody holds it any more


def test_other_step_counts_do_not_mix(tmp_path):
    write(tmp_path / "a", settings("fp32", steps=200))
    write(tmp_path / "b", settings("fp8", steps=300), falling(300))
    with pytest.raises(NothingToCompare, match=r"trainer\.max_steps is 300 here and 200 there"):
        compare([tmp_path])


def test_what_is_no_run_is_an_error_with_the_nearest(tmp_path):
    write(tmp_path / "runs" / "gpt-fp8-1", settings("fp8"))
    with pytest.raises(ValueError, match=r"gpt-fp8 is not a run and holds none: did you mean .*gpt-fp8-1\?"):
        expand([tmp_path / "runs" / "gpt-fp8"])
    with pytest.raises(ValueError, match="give the folder of a run or of a sweep"):
        expand([tmp_path / "nowhere" / "x"])


def test_without_a_baseline_no_verdict_is_made_up(tmp_path):
    write(tmp_path / "a", settings("bf16"))
    write(tmp_path / "b", settings("fp8"))
    found = by_label(compare([tmp_path]))
    assert {variant.verdict.kind for variant in found.values()} == {Kind.none}
    assert all(variant.loss.val_delta is None and variant.speed.ratio is None for variant in found.values())


def test_two_hundred_runs_compare_in_seconds(tmp_path):
    lines = [json.dumps({"step": s, "train/loss_step": float(v)}) for s, v in enumerate(falling(1000), 1)]
    for number in range(200):
        name = ("fp32", "bf16", "fp8", "fp8-delayed")[number % 4]
        folder = write(tmp_path / f"{number}", settings(name, number // 4, steps=1000), [2.4])
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        summary = json.loads((folder / "summary.json").read_text()) | {"steps": 1000}
        (folder / "summary.json").write_text(json.dumps(summary))
    start = time.perf_counter()
    comparison = compare([tmp_path])
    assert time.perf_counter() - start < 20
    assert [len(variant.runs) for variant in comparison.groups[0].variants] == [50] * 4


def test_the_command_prints_and_writes_what_it_is_asked(tmp_path, capsys, command_line):
    root = sweep(tmp_path / "s", {"fp32": 0, "fp8": 0.06})
    files = {name: tmp_path / f"out.{name}" for name in ("html", "markdown", "json")}
    assert cli.main(["compare", str(root), *(w for name, path in files.items() for w in (f"--{name}", str(path)))]) == 0
    said = capsys.readouterr().out
    assert "worse by 2." in said
    assert "over 3 seeds, paired t" in said
    report = json.loads(files["json"].read_text())
    assert report["groups"][0]["variants"][1]["verdict"]["kind"] == "worse"
    assert "| fp8 |" in files["markdown"].read_text()
    assert "href='s/fp8%2C0/'" in files["html"].read_text()  # relative to the page
    assert cli.main(["compare", str(root), "--margin", "0.05"]) == 0
    assert "equivalent" in capsys.readouterr().out


def test_the_command_refuses_clearly(tmp_path, capsys, command_line):
    for words, says in (
        (["--margin", "0", "."], "--margin=0.0 cannot work"),
        (["nowhere"], "is not a run and holds none"),
    ):
        with pytest.raises(SystemExit) as leaving:
            cli.main(["compare", *words])
        assert leaving.value.code == 2
        assert says in capsys.readouterr().err


def test_watching_ends_when_nobody_is_at_work_any_more(tmp_path, capsys, command_line, monkeypatch):
    monkeypatch.setattr(watch, "FOLLOW_S", 0.05)
    root = sweep(tmp_path, {"fp32": 0, "fp8": 0.06})
    last = write(root / "fp8,9", settings("fp8", 9), falling()[:50], finished=False)
    held = claim(last)

    def finish():
        write(tmp_path / "copy", settings("fp8", 9))
        (tmp_path / "copy" / "summary.json").rename(last / "summary.json")
        shutil.rmtree(tmp_path / "copy")
        held.close()

    timer = threading.Timer(1.0, finish)
    timer.start()
    assert cli.main(["compare", str(root), "--watch"]) == 0
    timer.join()
    said = capsys.readouterr().out
    assert "running" in said
    assert said.count("worse by") >= 2  # before and after the last run ended


def test_what_gradients_travel_in_is_a_variant_and_a_layout_a_group_of_its_own(tmp_path):
    """Compressed runs are judged against FP32 of the same layout; runs of one process have a baseline of their own."""
    laid = {"ddp": DistConfig(kind="ddp"), "fp8": DistConfig(kind="ddp", compress="fp8"), "single": DistConfig()}
    for seed in range(3):
        for name, precision in (
            ("ddp", "fp32"),
            ("ddp", "bf16"),
            ("fp8", "bf16"),
            ("single", "fp32"),
            ("single", "bf16"),
        ):
            config = replace(settings(precision, seed), dist=laid[name])
            losses = shifted(seed, 0.4 if name == "fp8" else 0.0) if precision != "fp32" else falling(STEPS, seed=seed)
            write(tmp_path / f"{name}-{precision}-{seed}", config, losses)
    groups = compare([tmp_path]).groups
    assert [sorted(variant.label for variant in group.variants) for group in groups] in (
        [["bf16", "bf16 compress=fp8", "fp32"], ["bf16", "fp32"]],
        [["bf16", "fp32"], ["bf16", "bf16 compress=fp8", "fp32"]],
    )
    worse = [v.label for group in groups for v in group.variants if v.verdict and v.verdict.kind is Kind.worse]
    assert worse == ["bf16 compress=fp8"]

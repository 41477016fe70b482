"""``mptrain deploy-matrix`` on tiny runs: every figure against one worked out apart, seeds, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import shutil

import fake_runs
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from commands import CORPUS
from scipy import stats

from mptrain import cli, models
from mptrain.checkpoint.checkpoints import Checkpoints
from mptrain.quantization import matrix
from mptrain.quantization.apply import quantize_model
from mptrain.quantization.source import open_source
from mptrain.report.compare.intervals import PAIRED
from mptrain.report.deploy import matrix as deployment

pytestmark = pytest.mark.usefixtures("one_thread")
GPT = {"kind": "gpt", "n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 16, "tied": False}
VIT = {"kind": "vit", "n_layer": 1, "n_head": 2, "n_embd": 32}
SIZES = {"gpt": {"vocab_size": 256}, "vit": {"image_size": 8, "channels": 1, "classes": 10}}


def run(folder, precision="fp32", seed=0, model=GPT):
    """A run's folder with a checkpoint of random weights, other ones for each precision and seed."""
    own = {"kind": "digits"} if model["kind"] == "vit" else {"kind": "stdlib", "root": str(CORPUS)}
    settings = dataclasses.replace(fake_runs.settings(precision, seed, steps=20), model=model, data=own)
    fake_runs.write(folder, settings)
    module = models.load(model["kind"])
    torch.manual_seed(100 * seed + len(precision))
    values = {key: value for key, value in model.items() if key != "kind"} | SIZES[model["kind"]]
    made = module.build(module.Config(**values))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(3.0)
    Checkpoints(folder / "checkpoints", keep=1).save(20, {"model": made}, {})
    return folder


def losses(model, data, samples):
    """Of each sample, by the model's own loss: nats a token."""
    found = []
    with torch.no_grad():
        for sample in samples:
            batch = data.validation_at([sample])
            found.append(F.cross_entropy(model(batch["tokens"])[0].double(), batch["targets"][0]).item())
    return np.array(found)


def test_one_run_a_precision_has_intervals_over_samples(tmp_path):
    folders = [run(tmp_path / "a", "fp32"), run(tmp_path / "b", "fp8")]
    made = matrix.deploy(folders, ["int8", "int4"], batches=3, repeats=1, group_size=32)
    assert (made.metric, made.unit, made.samples, made.batch) == ("perplexity", "tokens", 24, 8)
    assert (made.trained, made.deployed) == (["fp32", "fp8"], ["fp32", "int8", "int4"])
    base, other = (open_source(folder) for folder in folders)
    data = base.dataset()
    samples = [i * data.validation_samples // 24 for i in range(24)]
    reference = losses(base.model, data, samples)
    before = losses(other.model, data, samples)
    model = copy.deepcopy(other.model)
    report = quantize_model(model, "int4", group_size=32)
    after = losses(model, data, samples)
    cell = made.cell("fp8", "int4")
    assert cell.metric.mean == pytest.approx(math.exp(after.mean()), rel=1e-5)
    for interval, difference in ((cell.own_delta, after - before), (cell.base_delta, after - reference)):
        low, high = stats.t.interval(0.95, 23, loc=difference.mean(), scale=stats.sem(difference))
        wanted = [math.exp(value) - 1 for value in (difference.mean(), low, high)]
        assert [interval.mean, interval.low, interval.high] == pytest.approx(wanted, abs=2e-6)
        assert interval.method == "paired t over samples"
    assert cell.mib == pytest.approx(report.bytes / 2**20)
    assert cell.size_frac == pytest.approx(report.bytes / sum(p.numel() * 4 for p in other.model.parameters()))
    assert cell.layers == 5
    assert cell.worst_db == pytest.approx(20, abs=4)  # of INT4 in groups of 32
    assert cell.speed_low <= cell.speed_ratio <= cell.speed_high
    whole = made.cell("fp32", "fp32")
    assert (whole.kl_nats, whole.same_frac, whole.size_frac, whole.layers) == (0.0, 1.0, 1.0, 0)
    assert (whole.own_delta, whole.base_delta, whole.speed_ratio) == (None, None, None)
    assert made.cell("fp8", "fp32").base_delta.mean == pytest.approx(
        math.exp((before - reference).mean()) - 1, abs=1e-6
    )
    assert abs(made.cell("fp32", "int8").own_delta.mean) < abs(made.cell("fp32", "int4").own_delta.mean)


def test_several_seeds_have_intervals_over_seeds_paired_by_seed(tmp_path):
    folders = [run(tmp_path / f"{p}-{s}", p, s) for p in ("fp32", "bf16") for s in (0, 1, 2)]
    made = matrix.deploy(folders[:-1], ["int8"], batches=1, repeats=0)  # bf16 lacks seed 2
    cell = made.cell("bf16", "int8")
    assert (cell.runs, made.cell("fp32", "int8").runs) == (2, 3)
    means = {}
    for folder in folders[:-1]:
        source = open_source(folder)
        data = source.dataset()
        samples = [i * data.validation_samples // 8 for i in range(8)]
        model = copy.deepcopy(source.model)
        quantize_model(model, "int8")
        means[folder.name] = losses(source.model, data, samples).mean(), losses(model, data, samples).mean()
    assert cell.metric.mean == pytest.approx(math.exp((means["bf16-0"][1] + means["bf16-1"][1]) / 2), rel=1e-5)
    changes = [means[f"bf16-{s}"][1] - means[f"fp32-{s}"][0] for s in (0, 1)]
    low, high = stats.t.interval(0.95, 1, loc=np.mean(changes), scale=PAIRED[2] * stats.sem(changes))
    assert [cell.base_delta.mean, cell.base_delta.low, cell.base_delta.high] == pytest.approx(
        [math.exp(value) - 1 for value in (np.mean(changes), low, high)], rel=1e-3, abs=1e-6
    )
    assert (cell.base_delta.n, cell.base_delta.method) == (2, "paired t over seeds")
    assert cell.speed_ratio is None
    assert made.notes == []


def test_the_command_writes_the_matrix_and_the_report_of_a_sweep(tmp_path, capsys):
    for precision in ("fp32", "bf16"):
        run(tmp_path / "sweep" / precision, precision, model=VIT)
    assert cli.main(["deploy-matrix", str(tmp_path / "sweep"), "--to", "int8", "--json", str(tmp_path / "m.json")]) == 0
    made = deployment.read(tmp_path / "sweep" / "deploy.json")
    assert made == deployment.read(tmp_path / "m.json")
    assert made.metric == "top-1"
    assert made.samples == 355  # all of them, the last batch a small one
    hits = round(355 * made.cell("bf16", "int8").metric.mean)
    exact = stats.binomtest(hits, 355).proportion_ci(0.95, "exact")
    assert made.cell("bf16", "int8").metric.low == pytest.approx(exact.low)
    assert made.cell("bf16", "int8").own_delta.method == "Agresti-Min"
    printed = capsys.readouterr().out
    assert "bf16 > int8" in printed
    assert "data-group='deploy'" in (tmp_path / "sweep" / "report.html").read_text()
    assert json.loads((tmp_path / "sweep" / "deploy.json").read_text())["cells"][0]["trained"] == "fp32"
    assert cli.main(["compare", str(tmp_path / "sweep"), "--markdown", str(tmp_path / "again.md")]) == 0
    assert (tmp_path / "again.md").read_text() == (tmp_path / "sweep" / "report.md").read_text()
    assert "| bf16 > int8 |" in (tmp_path / "again.md").read_text().replace("&gt;", ">")


def test_seeds_in_which_no_image_changed_do_not_make_the_interval_a_point(tmp_path):
    made = matrix.deploy([run(tmp_path / str(s), seed=s, model=VIT) for s in (0, 1)], ["fp16"], batches=2, repeats=0)
    cell = made.cell("fp32", "fp16")
    assert cell.own_delta.mean == 0.0
    assert cell.own_delta.low < 0.0 < cell.own_delta.high
    assert (cell.own_delta.n, cell.own_delta.method) == (256, "Agresti-Min")


def test_what_a_model_cannot_be_had_in_is_a_cell_with_the_reason(tmp_path):
    made = matrix.deploy([run(tmp_path / "a")], ["int4", "fp8-dynamic"], batches=1, repeats=0, group_size=24)
    for name, said in (("int4", "would quantize nothing"), ("fp8-dynamic", "use --to fp8")):
        cell = made.cell("fp32", name)
        assert cell.metric is None
        assert said in cell.why
    assert made.cell("fp32", "fp32").metric is not None


def test_a_run_without_a_checkpoint_is_left_out_and_named(tmp_path):
    whole, torn = run(tmp_path / "a", model=VIT), run(tmp_path / "b", "bf16", model=VIT)
    shutil.rmtree(torn / "checkpoints")
    made = matrix.deploy([whole, torn], ["int8"], batches=1, repeats=0)
    assert made.trained == ["fp32"]
    assert [note for note in made.notes if str(torn) in note and "has no complete checkpoint" in note] == made.notes
    with pytest.raises(ValueError, match="has no complete checkpoint"):
        matrix.deploy([torn], ["int8"], batches=1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": GPT | {"n_head": 4}}, "are of different models or data"),
        ({"model": GPT}, "are both fp32 with seed=0: name the runs to deploy"),
    ],
)
def test_runs_that_make_no_matrix_are_refused(change, said, tmp_path):
    folders = [run(tmp_path / "a"), run(tmp_path / "b", **change)]
    with pytest.raises(ValueError, match=said):
        matrix.deploy(folders, ["int8"], batches=1)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--to", "int5"], "unknown method 'int5': did you mean 'int8'"),
        (["--to", "int8-static"], "leave it out of --to"),
        (["--batches", "0"], "--batches 0 leaves no validation data"),
    ],
)
def test_bad_words_are_one_clear_line(words, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as leaving:
        cli.main(["deploy-matrix", str(run(tmp_path / "a")), *words])
    assert leaving.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line

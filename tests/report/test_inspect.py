"""``mptrain inspect`` on the folder of a run and on safetensors files: figures, tables, drawings and errors."""

import json
import math
import struct

import pytest
import torch
from inspected import FORMATS, LOST, SCALES, count_cast, recorded, tensor_of
from safetensors.torch import save_file

from mptrain.checkpoint.checkpoints import Checkpoints
from mptrain.formats import Format, overflows, round_to, underflows
from mptrain.report.wording import percent, scale_text
from mptrain.telemetry import record
from mptrain.telemetry.histogram import JUDGED

pytestmark = pytest.mark.usefixtures("one_thread")


def rows_of(text):
    return {(row["layer"], row["role"]): row for row in json.loads(text)["rows"]}


def test_figures_are_those_of_the_tensors(run, inspect):
    rows = rows_of(inspect(run, "--json"))
    assert len(rows) == 12
    for (layer, role), row in rows.items():
        x = tensor_of(int(layer.split(".")[1]), role, 10)
        finite = x[x.isfinite()]
        assert row["elements"] == 4096
        assert row["zeros"] == int((x == 0).sum())
        assert row["inf"] + row["nan"] == 4096 - len(finite)
        assert row["amax"] == float(finite.abs().max())
        median = float(finite[finite != 0].abs().median())
        assert row["percentiles"]["50"] == pytest.approx(median, rel=0.126)
        assert [*row["formats"]] == [fmt.name for fmt in JUDGED]
        for name, judged in row["formats"].items():
            y = finite.double() * judged["scale"]
            for kind, oracle in (("saturated", overflows), ("flushed", underflows)):
                actual = float(oracle(y, Format[name]).sum()) / 4096
                assert judged[kind]["low"] <= actual <= judged[kind]["high"]
            assert judged["flushed"]["low"] == judged["flushed"]["high"]


def test_the_cast_of_the_run_is_told_by_its_exact_counts(run, inspect):
    rows = rows_of(inspect(run, "--json", "--step", 1))
    for (layer, role), row in rows.items():
        if role == "update":
            assert row["used"] is None
            continue
        x = tensor_of(int(layer.split(".")[1]), role, 1)
        fmt, scale, used = Format[FORMATS[role]], SCALES[role], row["used"]
        counted = count_cast(x * scale, fmt).tolist()
        assert [used[name] for name in ("elements", "saturated", "flushed", "inf", "nan")] == counted
        finite = x[x.isfinite()].double()
        noise = finite - round_to(finite * scale, fmt) / scale
        assert used["sqnr_db"] == pytest.approx(10 * math.log10(float((finite**2).sum() / (noise**2).sum())))
        assert used["headroom_bits"] == pytest.approx(math.log2(fmt.value.max / (float(finite.abs().max()) * scale)))


def test_the_spread_of_blocks_is_counted_in_bits(run, inspect):
    rows = rows_of(inspect(run, "--json"))
    for layer in range(3):
        x = tensor_of(layer, "weight", 10)
        top = math.floor(math.log2(float(x.abs().max())))
        for size in (32, 128):
            amaxes = x.abs().reshape(-1, size).amax(1)
            amaxes = amaxes[amaxes > 0].sort().values
            spread = rows[f"blocks.{layer}.mlp", "weight"]["spread"][str(size)]
            for name, q in (("median", 0.5), ("first", 0.01)):
                block = float(amaxes[max(0, math.ceil(q * len(amaxes)) - 1)])
                assert spread[name] == top - math.floor(math.log2(block))


def test_lost_updates_are_shown_for_updates_only(run, inspect):
    rows = rows_of(inspect(run, "--json"))
    assert {role for (_, role), row in rows.items() if row["lost"]} == {"update"}
    lost = rows["blocks.0.mlp", "update"]["lost"]
    assert [*lost.values()] == LOST
    text = inspect(run)
    line = next(line for line in text.split("updates lost")[1].splitlines() if "blocks.0.mlp" in line)
    assert line.split()[2:] == ["4,096", "25", "%", "0", "%", "13", "%", "0.07", "%"]


def test_the_worst_row_is_first_and_its_cells_say_why(run, inspect):
    first = json.loads(inspect(run, "--json"))["rows"][0]
    assert (first["layer"], first["role"]) == ("blocks.1.mlp", "grad_output")  # Inf and NaN
    text = inspect(run)
    lines = [line for line in text.splitlines() if "blocks" in line]
    assert lines[0].split()[:2] == ["blocks.1.mlp", "grad_output"]
    row = rows_of(inspect(run, "--json"))["blocks.2.mlp", "weight"]
    cells = next(line for line in lines if line.split()[:2] == ["blocks.2.mlp", "weight"]).split()[2:]
    assert len(cells) == len(JUDGED)
    e2m1 = row["formats"]["fp4_e2m1"]
    assert cells[4] == f"0/{percent(e2m1['flushed']['low'])}/{percent(e2m1['subnormal']['estimate'])}"


@pytest.mark.parametrize("columns", [80, 100, 160])
def test_tables_fit_the_terminal_and_cut_no_figure(run, inspect, columns):
    text = inspect(run, columns=columns)
    lines = text.splitlines()[1:]  # the first is the path, whole to be copied
    assert 60 < max(map(len, lines)) <= columns
    assert "…" not in "".join(line[20:] for line in lines)


def test_one_format_shows_ranges_where_the_bins_do_not_decide(run, inspect):
    text = inspect(run, "--format", "fp8_e4m3", "--role", "input")
    row = rows_of(inspect(run, "--format", "fp8_e4m3", "--role", "input", "--json"))["blocks.0.mlp", "input"]
    assert [*row["formats"]] == ["fp8_e4m3"]
    subnormal = row["formats"]["fp8_e4m3"]["subnormal"]
    assert subnormal["low"] < subnormal["high"]
    line = next(line for line in text.splitlines() if "blocks.0.mlp" in line)
    assert f"{percent(subnormal['low'])}-{percent(subnormal['high'])}%" in line
    assert scale_text(row["formats"]["fp8_e4m3"]["scale"]) in line.split()
    assert "weight" not in text


def test_rows_left_out_are_counted(tmp_path, inspect):
    record.append(tmp_path / record.FILE, recorded(5, layers=9))
    text = inspect(tmp_path)
    assert "16 more of 36 rows" in text
    assert "more of" not in inspect(tmp_path, "--all")
    assert text.count("blocks.") < inspect(tmp_path, "--all").count("blocks.")
    assert "more of" not in inspect(tmp_path, "--layer", r"\.[13]\.")


def test_each_table_of_a_record_may_be_missing(tmp_path, inspect):
    for index, name in enumerate(("histogram", "counts", "scale", "amax", "errors", "blocks", "lost")):
        folder = tmp_path / str(index)
        folder.mkdir()
        record.append(folder / record.FILE, recorded(5, layers=1, without=(name,)))
        assert "blocks.0.mlp" in inspect(folder)
        assert len(rows_of(inspect(folder, "--json"))) == 4
    record.append(tmp_path / record.FILE, record.Record(5, {}, recorded(5).rows, {}))
    assert "blocks.2.mlp" in inspect(tmp_path)


def test_what_is_not_recorded_is_answered_with_what_is(run, refused):
    assert "recorded: 1, 10" in refused(run, "--step", 7)
    assert "did you mean 'weight'" in refused(run, "--role", "wieght")
    assert "did you mean 'fp8_e4m3'" in refused(run, "--format", "fp8_e4m")
    assert "known: blocks.0.mlp, blocks.1.mlp" in refused(run, "--layer", "attention")
    assert "not a regular expression" in refused(run, "--layer", "(")


def test_what_is_no_run_is_answered_clearly(tmp_path, refused):
    assert "does not exist" in refused(tmp_path / "none")
    assert "not the folder of a run" in refused(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": torch.ones(3)}, tmp_path / "step-1.safetensors")
    message = refused(tmp_path)
    assert "sampled no histograms" in message
    assert f"mptrain inspect {tmp_path / 'step-1.safetensors'}" in message
    (tmp_path / record.FILE).write_bytes(b"\0" * 99)
    assert "holds no whole record" in refused(tmp_path)
    (tmp_path / "torn.safetensors").write_bytes((tmp_path / "step-1.safetensors").read_bytes()[:-4])
    assert "truncated" in refused(tmp_path / "torn.safetensors")
    (tmp_path / "notes.txt").write_text("a text")
    assert "not a safetensors file" in refused(tmp_path / "notes.txt")
    save_file({"a": torch.arange(3)}, tmp_path / "whole.safetensors")
    assert "no floating-point weights (1 other" in refused(tmp_path / "whole.safetensors")
    assert "--step is for the folder of a run" in refused(tmp_path / "whole.safetensors", "--step", 1)


def test_weights_of_any_safetensors_file(tmp_path, inspect):
    path = tmp_path / "model.safetensors"
    x = torch.randn(64, 32) * 0.02
    save_file(
        {
            "model.layers.0.q_proj.weight": x.bfloat16(),
            "model.layers.0.q_proj.bias": x[0].half(),
            "encoder/kernel": x,
            "f8": x.to(torch.float8_e4m3fn),
            "ids": torch.arange(4),
        },
        path,
    )
    rows = rows_of(inspect(path, "--json"))
    assert set(rows) == {
        ("model.layers.0.q_proj", "weight"),
        ("model.layers.0.q_proj", "bias"),
        ("encoder/kernel", "weight"),
        ("f8", "weight"),
    }
    assert rows["model.layers.0.q_proj", "weight"]["amax"] == float(x.bfloat16().float().abs().max())
    assert rows["f8", "weight"]["zeros"] == int((x.to(torch.float8_e4m3fn).float() == 0).sum())
    text = inspect(path)
    assert "1 BF16" in text
    assert "1 F8_E4M3" in text
    assert "left out: 1 I64" in text
    assert "as cast" not in text


def test_a_type_that_torch_lacks_is_left_out(tmp_path, inspect):
    """F4 and whatever comes: the header names them, nothing reads them."""
    table = {
        "w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "s": {"dtype": "F8_E8M0", "shape": [4], "data_offsets": [8, 12]},
    }
    head = json.dumps(table).encode()
    (tmp_path / "f.safetensors").write_bytes(
        struct.pack("<Q", len(head)) + head + struct.pack("<2f", 1, 2) + b"\x7f" * 4
    )
    assert set(rows_of(inspect(tmp_path / "f.safetensors", "--json"))) == {("w", "weight")}
    assert "left out: 1 F8_E8M0" in inspect(tmp_path / "f.safetensors")


class Moments:
    """The state of an AdamW of one parameter; making a real one takes seconds for its imports."""

    def state_dict(self):
        state = {"step": torch.tensor(1.0), "exp_avg": torch.ones(4) * 0.1, "exp_avg_sq": torch.ones(4)}
        return {"state": {0: state}, "param_groups": [{"lr": 0.1, "params": [0]}]}

    def load_state_dict(self, state): ...


def test_weights_and_moments_of_a_checkpoint_of_ours(tmp_path, inspect):
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8))
    path = Checkpoints(tmp_path, 1).save(3, {"model": model, "optimizer": Moments()}, {"step": 3})
    rows = rows_of(inspect(path, "--json"))
    assert ("0", "weight") in rows
    assert rows["0", "weight"]["amax"] == float(model[0].weight.detach().abs().max())
    assert ("optimizer 0", "exp_avg") in rows
    assert ("optimizer 0", "exp_avg_sq") in rows
    assert {role for _, role in rows} == {"weight", "bias", "exp_avg", "exp_avg_sq"}
    text = inspect(path)
    assert f"{path}: 6 float32" in text
    assert "left out: 1 float32" in text


def test_a_checkpoint_that_cannot_be_inspected_is_one_message(tmp_path, refused):
    path = Checkpoints(tmp_path / "checkpoints", 1).save(3, {"model": torch.nn.Linear(8, 8)}, {"step": 3})
    assert f"{path} is a checkpoint" in refused(path, "--step", 3)
    (tmp_path / "config.json").write_text("{}")
    path.rename(path.with_name("aside-1-step-00000003"))
    path = Checkpoints(tmp_path / "checkpoints", 1).save(4, {"model": torch.nn.Linear(8, 8)}, {"step": 4})
    assert f"sampled no histograms; for its weights: mptrain inspect {path}\n" in refused(tmp_path)
    content = (path / "rank-00000.safetensors").read_bytes()
    for damaged in (content[:-4], content[:-1] + bytes([content[-1] ^ 1]), b""):
        (path / "rank-00000.safetensors").write_bytes(damaged)
        (line,) = refused(path).splitlines()
        assert f"checkpoint {path} is damaged: " in line
        assert "rank-00000.safetensors" in line
    (path / "checkpoint.json").unlink()
    (line,) = refused(path).splitlines()
    assert f"checkpoint {path} is damaged: checkpoint.json" in line

"""``mptrain plan --inference`` in this process: its tables, its JSON, and one message for what cannot be."""

import json
import re

import pytest

from mptrain import cli
from mptrain.memory.inference import catalogue

R1 = ["--model", "deepseek-r1", "--format", "fp8", "--batch", "30", "--input-tokens", "2048", "--output-tokens", "2048"]


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")


def planned(capsys, *words):
    assert cli.main(["plan", "--inference", *words]) == 0
    return capsys.readouterr().out


def as_json(capsys, *words):
    return json.loads(planned(capsys, *words, "--json"))


def refusal(capsys, *words):
    with pytest.raises(SystemExit) as leaving:
        cli.main(["plan", "--inference", *words])
    assert leaving.value.code == 2
    return capsys.readouterr().err


def test_the_article_beside_the_exact_bytes(capsys):
    text = planned(capsys, *R1, "--convention", "article")
    assert re.search(r"fp8 +671\.00 +37\.00 +100\.08 +808\.08 +815\.46 +759\.45\n", text)
    assert "adds GB (10^9) and GiB (2^30) as one unit" in text
    assert "what this model caches is 4.021 GiB in fp8, 24.9x less" in " ".join(text.split())
    found = as_json(capsys, *R1, "--convention", "article")
    (made,) = found["plans"]
    assert made["roles"]["kv_cache"] == 30 * 4096 * 61 * 576
    assert made["article"]["kv_cache"] == 107_458_068_480
    assert made["article"]["total_gb_and_gib_mixed"] == "808.08"
    assert made["total"] == sum(made["roles"].values())
    assert found["parameters"] == 671_026_404_352


def test_a_bare_count_in_the_articles_table(capsys):
    text = planned(capsys, "--parameters", "1e9", "--format", "fp8", "fp16", "--overhead", "0GiB")
    assert re.search(r"fp8 +0\.931 .* 1,000,000,004\n", text), "a scale beside it"
    assert re.search(r"fp16 +1\.863 .* 2,000,000,000\n", text)
    assert "need --model" in text


def test_formats_stand_side_by_side_with_gpus_and_batches(capsys):
    words = ["--model", "llama-3-70b", "--gpu", "h100", "--format", "bf16", "int4", "--format", "fp8"]
    text = planned(capsys, *words)
    assert [line.split()[0] for line in text.splitlines() if re.match(r"(bf16|int4|fp8) +\d", line)] == words[5:7] + [
        "fp8"
    ]
    assert "H100 80GB: 74.51 GiB each" in text
    found = as_json(capsys, *words)
    for made in found["plans"]:
        assert made["per_gpu"] <= 80 * 10**9 < made["total"] - made["roles"]["kv_cache"] or made["gpus"] == 1
        batch = str(made["largest_batch"])
        at = [*words[:4], "--gpus", str(made["gpus"]), "--format", made["format"], "--batch"]
        assert as_json(capsys, *at, batch)["plans"][0]["gpus"] == made["gpus"]
        assert f"lower --batch to {batch}," in refusal(capsys, *at, str(int(batch) + 1))


@pytest.mark.parametrize("width", [80, 100, 140])
def test_no_number_is_cut_at_any_width(width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    text = planned(capsys, *R1, "--gpu", "H100", "--convention", "article")
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    row = next(line for line in text.splitlines() if re.match(r"fp8 +\d", line))
    for shown in ("627.41", "4.021", "635.46", "16"):
        assert shown in row.split()
    assert ("left out at this width: of which scales, overhead, bytes" in text) == (width == 80)
    assert ("682,321,622,272" in row) == (width == 140)


@pytest.mark.parametrize(
    "words", [["--model", "gpt2", "--batch", "999999999"], [*R1, "--convention", "article"], ["--list"]]
)
def test_nor_in_a_terminal_of_60_columns(words, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "60")
    text = planned(capsys, *words)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 60 + 20 * ("https://" in text), "only a link may be longer"


def test_a_name_of_the_catalogue_is_no_folder(tmp_path, monkeypatch, capsys):
    (tmp_path / "gpt2").mkdir()
    monkeypatch.chdir(tmp_path)
    assert as_json(capsys, "--model", "gpt2")["parameters"] == 124_439_808
    assert "no config.json can be read" in refusal(capsys, "--model", "./gpt2/")
    (tmp_path / "mine").mkdir()
    assert "no config.json can be read at mine/config.json" in refusal(capsys, "--model", "mine")


def test_the_catalogue_is_listed(monkeypatch, capsys):
    text = planned(capsys, "--list")
    for model in catalogue.models():
        assert re.search(rf"{re.escape(model.name)} +{model.architecture.parameters:,} ", text)
    assert re.search(r"H200 +141GB +131\.32", text)
    found = as_json(capsys, "--list")
    assert {gpu["name"]: gpu["memory"] for gpu in found["gpus"]}["A100-40GB"] == 40 * 10**9
    assert all(one["source"].startswith("https://") for kind in ("models", "gpus") for one in found[kind])
    monkeypatch.setenv("COLUMNS", "80")
    text = planned(capsys, "--list")
    assert max(map(len, text.splitlines())) <= 80


def test_a_folder_with_a_config_is_a_model(tmp_path, capsys):
    config = {"model_type": "gpt2", "n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 128, "vocab_size": 100}
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "config.json").write_text(json.dumps(config))
    found = as_json(capsys, "--model", str(tmp_path / "small"), "--format", "fp32")
    assert found["model"] == "small"
    assert found["plans"][0]["roles"]["weights"] == 4 * found["parameters"]
    assert (found["request"]["input_tokens"], found["request"]["output_tokens"]) == (64, 64), "half of its positions"


REFUSED = {
    "nowhere": (
        ["--model", "llama-3-70b", "--fit", "20GiB"],
        "--batch=1 of 4,096 tokens does not fit 1 x GPU (20.00 GiB",
    ),
    "no number": (
        ["--model", "gpt2-xl", "--gpu", "T4", "--overhead", "16GB"],
        "does not fit any number up to 25 x T4 16GB",
    ),
    "huge batch": (["--model", "gpt2", "--gpu", "T4", "--batch", "999999999"], "lower --batch to "),
    "count": (["--parameters", "70B", "--fit", "10GB"], "--parameters 70,000,000,000 does not fit 1 x GPU"),
    "gpu": (["--model", "gpt2", "--gpu", "H10"], "--gpu=H10 is unknown: did you mean 'H100'?"),
    "format": (["--model", "gpt2", "--format", "int3"], "--format=int3 is unknown: did you mean 'int8'?"),
    "model": (["--model", "gpt-2"], "did you mean 'gpt2'?"),
    "path": (["--model", "no/config.json"], "no config.json can be read at no/config.json"),
    "unit": (["--model", "gpt2", "--fit", "80"], "--fit=80 has no unit"),
    "no memory": (["--model", "gpt2", "--fit", "0GiB"], "--fit=0GiB cannot work: it must be above 0 B"),
    "more": (["--model", "gpt2", "--fit", "80GiB", "--gpu", "H100"], "--fit=80GiB is more than the 74.51 GiB (80GB)"),
    "gpus": (["--model", "gpt2", "--gpus", "8"], "--gpus=8 needs their memory"),
    "no gpus": (["--model", "gpt2", "--gpus", "0", "--gpu", "T4"], "--gpus=0 cannot work"),
    "batch": (["--model", "gpt2", "--batch", "0"], "--batch=0 cannot work"),
    "tokens": (["--model", "gpt2", "--input-tokens", "0"], "--input-tokens=0 cannot work"),
    "positions": (["--model", "gpt2", "--input-tokens", "1024"], "gpt2 has 1,024 positions: lower them"),
    "bare": (["--parameters", "1e9", "--batch", "2"], "--batch needs --model=NAME"),
    "no count": (["--parameters", "many"], "--parameters=many is not a count"),
    "negative": (["--parameters=-1e9"], "--parameters=-1e9 is not a count"),
    "fraction": (["--parameters", "0.5"], "--parameters=0.5 cannot work"),
    "absurd": (["--parameters", "1e99"], "--parameters=1e99 cannot work"),
    "nothing": ([], "one of the arguments --model --parameters --list is required"),
}


@pytest.mark.parametrize(("words", "wanted"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_one_message_and_exit_code_2(words, wanted, capsys):
    said = refusal(capsys, *words)
    assert wanted in said
    assert said.count("error: ") == 1
    assert "Traceback" not in said


def test_some_formats_may_not_fit(capsys):
    text = planned(capsys, "--model", "llama-3-70b", "--fit", "80GiB")
    assert re.search(r"bf16 .* none +- +0\n", text)
    assert re.search(r"int4 .* 1 +39\.\d\d +\d\d\n", text)


@pytest.mark.parametrize(
    ("text", "count"),
    [("1e9", 10**9), ("7B", 7 * 10**9), ("1.5B", 15 * 10**8), ("0.5K", 500), ("12", 12), ("1.25e3", 1250)],
)
def test_counts_are_exact(text, count):
    assert catalogue.parse_count(text) == count

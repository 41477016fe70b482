"""``mptrain plan`` of a training run: what it prints, writes and refuses; the search for what fits."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mptrain import cli
from mptrain.memory.training.fit import MOST, largest
from mptrain.memory.training.plan import plan
from mptrain.memory.training.trace import Job
from mptrain.models import gpt
from mptrain.optim import OptimConfig
from mptrain.precision.policy import PrecisionPolicy

TINY = ["model=gpt-nano", "model.n_layer=1", "model.n_embd=32", "model.n_head=2", "model.vocab_size=64"]
TINY += ["model.block_size=64", "precision=bf16"]


def run(*argv: str) -> int:
    try:
        return cli.main(["plan", *argv])
    except SystemExit as end:
        return int(end.code)


@given(st.integers(0, 10**9), st.integers(1, 10**6), st.integers(0, 10**12), st.sampled_from([1, 64]))
def test_the_largest_that_fits_is_found_in_few_looks(base, slope, capacity, step):
    looks = []

    def total(size):
        looks.append(size)
        return base + slope * size + size % 7  # about even

    found = largest(total, capacity, step=step)
    assert found % step == 0
    assert found == 0 or base + slope * found + found % 7 <= capacity
    above = found + step
    assert above > MOST or base + slope * above + above % 7 > capacity
    assert len(looks) <= 10


def test_curved_growth_is_searched_as_well():
    assert largest(lambda n: n * n, 10_000) == 100
    assert largest(lambda n: n * n, 10_000, step=64) == 64
    assert largest(lambda n: 5, 4) == 0
    assert largest(lambda n: 5, 6, step=64) == MOST


def test_all_precisions_stand_side_by_side(capsys, command_line, tmp_path):
    assert run(*TINY, "--json", str(tmp_path / "plan.json"), "--html", str(tmp_path / "plan.html")) == 0
    said = capsys.readouterr().out
    for word in ("bf16", "fp32", "tf32", "fp16", "fp8", "weights", "moments", "activations", "attention: fused"):
        assert word in said, word
    found = json.loads((tmp_path / "plan.json").read_text())
    assert [one["precision"] for one in found["plans"]] == ["bf16", "fp32", "tf32", "fp16", "fp8"]
    for one in found["plans"]:
        assert one["total"] == one["live"] == sum(one["roles"].values()) == max(one["windows"].values())
        assert sum(one["operations"].values()) == one["roles"]["activations"]
    page = (tmp_path / "plan.html").read_text()
    assert page.count("class='bar'") >= 20
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_what_fits_and_what_would_help(capsys, command_line, tmp_path):
    path = tmp_path / "plan.json"
    assert run(*TINY, "trainer.batch_size=256", "--gpu", "H100", "--fit", "625MiB", "--json", str(path)) == 0
    found, said = json.loads(path.read_text()), capsys.readouterr().out
    mine = found["plans"][0]
    assert mine["total"] > found["capacity"] == 625 * 2**20
    assert "does not fit, by" in said
    assert all(size > 0 for size in found["largest_batch"].values())
    saved = [one["saved"] for one in found["remedies"]]
    assert saved == sorted(saved, reverse=True)
    assert all(one["saved"] == mine["total"] - one["plan"]["total"] > 0 for one in found["remedies"])
    assert {"trainer.checkpointing=true", "optim=adamw-8bit"} <= {one["settings"] for one in found["remedies"]}
    batch = found["largest_batch"]["bf16"]
    config = gpt.Config(64, 64, n_layer=1, n_head=2, n_embd=32)
    job = Job(gpt, config, PrecisionPolicy.named("bf16"), OptimConfig(), batch, gpu=True)
    assert plan(job).total <= 625 * 2**20 < plan(replace(job, batch_size=batch + 1)).total


def test_a_rank_of_many_holds_its_share(capsys, command_line, tmp_path):
    path = tmp_path / "plan.json"
    assert run(*TINY, "dist=fsdp", "--ranks", "4", "--json", str(path)) == 0
    sharded = json.loads(path.read_text())["plans"][0]["roles"]
    assert run(*TINY, "--json", str(path)) == 0
    whole = json.loads(path.read_text())["plans"][0]["roles"]
    assert whole["weights"] / 4 <= sharded["weights"] < whole["weights"] / 3.9
    assert "a rank of 4 shards" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([*TINY, "--fit", "300kB"], "no batch fits"),
        ([*TINY, "--fit", "80"], "--fit=80 has no unit"),
        ([*TINY, "--gpu", "H1000"], "did you mean 'H100"),
        ([*TINY, "--ranks", "-1"], "--ranks=-1 cannot work"),
        ([*TINY, "--ranks", "4"], "add dist=ddp"),
        ([*TINY, "trainer.batch_size=-3"], "trainer.batch_size=-3"),
        ([*TINY, "trainer.batch_size=9000000000000"], "at most 2^36 tokens"),
        ([*TINY, "precision=fp8", "precision.backend=te"], "precision.backend=te cannot run precision=fp8"),
        ([*TINY, "precision=fp32", "optim=adamw-bf16"], "optim.weights=bf16 stores BF16 weights"),
        ([*TINY, "dist.tp=4", "--ranks", "4"], "dist.tp=4 would cut through heads"),
        ([*TINY, "model.n_embd=-32"], "n_embd=-32 must be positive"),
        ([*TINY, "precison=fp8"], "did you mean"),
        (["model=gpt-nano", "model.vocab_size=64", "dist=fsdp", "--ranks", "3"], "cannot be shared out among 3 ranks"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_is_one_message_and_exit_code_2(argv, says, capsys, command_line):
    assert run(*argv) == 2
    error = capsys.readouterr().err
    assert says in error
    assert "Traceback" not in error

"""Checkpoints: training goes on bit for bit, in another precision too, and whatever a part holds comes back."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from saved import CPU, SHARD, Part, assert_same, bits

from mptrain import Precision, PrecisionPolicy, models
from mptrain.checkpoint.checkpoints import Checkpoints, load, read_about, require_fit
from mptrain.optim import OptimConfig, Schedule, build_optimizer
from mptrain.precision.policy import conf_dir
from mptrain.telemetry.monitor import Monitor, TelemetryConfig
from mptrain.training.config import TrainerConfig
from mptrain.training.extras import Extras
from mptrain.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = sorted(path.stem for path in (conf_dir() / "precision").glob("*.yaml"))
VOCAB, BLOCK = 48, 8


class Samples:
    """Tokens that follow from (seed, step, micro-batch): each is the one before it plus 1, soon learned."""

    def batch(self, step: int, *, micro: int, microbatches: int, batch_size: int, seed: int, **where: int):
        generator = torch.Generator().manual_seed(1000 * seed + step * microbatches + micro)
        tokens = (torch.randint(VOCAB, (batch_size, 1), generator=generator) + torch.arange(BLOCK + 1)) % VOCAB
        return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}

    def validation(self, batch_size: int, batches: int):
        return (self.batch(index, micro=0, microbatches=1, batch_size=batch_size, seed=9) for index in range(batches))


class Quiet:
    def tick(self, step):
        pass

    def metrics(self, step, values):
        pass

    def event(self, event):
        pass

    def record(self, record):
        pass


def policy_of(name: str) -> PrecisionPolicy:
    """The recipe, with a history that rotates and a loss scale that grows within the steps of a test."""
    policy = PrecisionPolicy.named(name)
    scale = replace(policy.loss_scale, interval=2)
    return replace(policy, loss_scale=scale, quantization=replace(policy.quantization, history=4))


def trainer(name: str, folder: Path, n_embd: int = 32) -> Trainer:
    """Everything new: a tiny GPT with dropout (random states matter), two micro-batches a step, evaluations."""
    module = models.load("gpt")
    torch.manual_seed(0)
    model = module.build(module.Config(VOCAB, BLOCK, n_layer=2, n_head=2, n_embd=n_embd, dropout=0.1))
    precision = Precision(policy_of(name)).prepare(model)
    optim = OptimConfig(lr=1e-2)
    return Trainer(
        TrainerConfig(max_steps=20, batch_size=8, accumulate=2, eval_every=2, eval_batches=1),
        model=model, precision=precision, optimizer=build_optimizer(optim, model), schedule=Schedule.of(optim, 20),
        data=Samples(), sink=Quiet(),
        extras=Extras(monitor=Monitor(model, precision, TelemetryConfig(record_every=2), 20), every=1,
                      checkpoints=Checkpoints(folder, keep=5), about={"precision": name}),
    )  # fmt: skip


def resumed(name: str, folder: Path, step: int) -> Trainer:
    made = trainer(name, folder)
    made.resume(made.extras.checkpoints.path(step))
    return made


def states(run: Trainer):
    """A copy of everything a checkpoint of the run would hold now."""
    return copy.deepcopy({name: part.state_dict() for name, part in run.keeper().parts.items()})


# ---- training goes on -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_next_five_steps_are_bit_equal(name, tmp_path):
    """Losses, weights and every other part of the state, wherever the generator stands; and dropout is part of it."""
    went_on = trainer(name, tmp_path)
    went_on.fit(until=3)
    saved = states(went_on)
    went_on.fit(until=8)
    after = states(went_on)
    resumed_at = resumed(name, tmp_path, 3)
    torch.manual_seed(77)
    assert_same(states(resumed_at), saved)
    resumed_at.fit(until=8)
    assert sorted(went_on.losses) == list(range(1, 9))
    assert resumed_at.losses == {step: went_on.losses[step] for step in range(4, 9)}
    assert_same(states(resumed_at), after)
    assert went_on.ledger.applied + went_on.ledger.skipped == 8
    assert went_on.ledger.applied >= 6
    whole = resumed(name, tmp_path, 3)
    for module in whole.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    whole.fit(until=4)
    assert whole.losses[4] != went_on.losses[4], "dropout does nothing: random numbers are not under test"


@pytest.mark.parametrize(
    ("first", "second"),
    [("fp8", "bf16"), ("bf16", "fp8-delayed"), ("bf16", "fp16"), ("fp16", "fp8"), ("fp8-delayed", "fp32")],
)
def test_another_precision_goes_on_from_the_masters(first, second, tmp_path):
    """The weights are FP32 and no one's: the next loss is that of the run that stayed but for rounding; it trains."""
    stayed = trainer(first, tmp_path)
    stayed.fit(until=6)
    model, optimizer = copy.deepcopy((stayed.model.state_dict(), stayed.optimizer.state_dict()))
    stayed.fit(until=12)
    crossed = resumed(second, tmp_path, 6)
    assert_same(crossed.model.state_dict(), model)
    assert_same(crossed.optimizer.state_dict(), optimizer)
    if second == "fp16":
        assert crossed.precision.scaler.scale.item() == 2.0**16, "BF16 has no scale to go on from"
    crossed.fit(until=12)
    assert abs(crossed.losses[7] - stayed.losses[7]) < 0.004  # 0.0009 at most, while a step moves it by 0.15
    assert crossed.losses[12] < crossed.losses[7] - 0.4
    assert crossed.ledger.applied >= 10
    moved = [not torch.equal(p, q) for p, q in zip(crossed.model.parameters(), stayed.model.parameters(), strict=True)]
    assert all(moved), "two precisions are not bit-equal: one of them did not run"


def test_delayed_scaling_starts_its_history_from_the_current_amax(tmp_path):
    """BF16 left no history. Its first scale is that of the weight itself, not 1, and its first amax the weight's."""
    trainer("bf16", tmp_path).fit(until=3)
    crossed = resumed("fp8-delayed", tmp_path, 3)
    assert crossed.precision.state_dict()["fp8"] == {}
    name = "blocks.0.mlp.up"
    amax = crossed.model.get_submodule(name).weight.detach().abs().max()
    crossed.share = replace(crossed.share, accumulate=1)
    crossed.fit(until=4)
    state = crossed.precision.state_dict()["fp8"]
    assert state[f"{name}/weight/history"].tolist() == [amax.item(), 0.0, 0.0, 0.0]
    assert state[f"{name}/weight/scale"].item() == (torch.tensor(448.0) / amax).item()
    scales = [value for key, value in state.items() if key.endswith("/scale")]
    assert len(scales) == 2 * 4 * 3, "two blocks of four layers with three roles"
    assert all(scale != 1.0 for scale in scales)


@pytest.mark.parametrize("name", NAMES)
def test_the_model_part_is_plain(name, tmp_path):
    """No ``_extra_state``, no scales, no prefix of a wrapper: the names and shapes of the model without precision."""
    run = trainer(name, tmp_path)
    run.fit(until=1)
    plain = models.load("gpt").build(run.model.config).state_dict()
    state = load(run.extras.checkpoints.path(1), CPU)["model"]
    assert {key: value.shape for key, value in state.items()} == {key: value.shape for key, value in plain.items()}
    assert {value.dtype for value in state.values()} == {torch.float32}


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    run = trainer("bf16", tmp_path)
    run.fit(until=1)
    with pytest.raises(ValueError, match=r"the checkpoint's model does not fit this run .* use the model and optim"):
        trainer("bf16", tmp_path, n_embd=16).resume(run.extras.checkpoints.path(1))
    deeper = models.load("gpt").build(replace(run.model.config, n_layer=3))
    with pytest.raises(
        ValueError, match=r"another model: blocks\.2\..* is not there and is \[.*; set model= as it was"
    ):
        require_fit(run.extras.checkpoints.path(1), deeper)
    require_fit(run.extras.checkpoints.path(1), run.model)


# ---- what is in it --------------------------------------------------------------------------------------------------


def through_a_file(folder: Path, state, *, background: bool = False):
    checkpoints = Checkpoints(folder, keep=1, background=background)
    path = checkpoints.save(1, {"part": Part(state)}, {})
    checkpoints.wait()
    return load(path, CPU)["part"]


def test_tied_tensors_are_stored_once(tmp_path):
    shared = torch.randn(256, 256)
    state = {"embed": shared, "head": shared, "other": shared.clone()}
    assert_same(through_a_file(tmp_path, state), state)
    size = (Checkpoints(tmp_path, keep=1).path(1) / SHARD).stat().st_size
    assert 2 * 256 * 256 * 4 < size < 2 * 256 * 256 * 4 + 2000
    run = trainer("fp32", tmp_path / "tied")
    run.fit(until=1)
    again = resumed("fp32", tmp_path / "tied", 1)
    assert again.model.head.weight is again.model.embed.weight
    assert torch.equal(again.model.head.weight, run.model.head.weight)


def test_views_of_one_buffer_survive(tmp_path):
    """Rows of a table, a slice, a transpose, another shape of the same memory, nothing at all."""
    base = torch.arange(24.0).reshape(4, 6)
    state = {
        "row": base[1], "next": base[2], "all": base, "turned": base.t(), "flat": base.view(-1), "every": base[:, ::2],
        "none": base[:0], "empty": torch.zeros(0, 3), "empty too": torch.zeros(0, 3), "scalar": base[0, 5],
        "expanded": torch.ones(1).expand(5),
    }  # fmt: skip
    assert_same(through_a_file(tmp_path, state), state)


DTYPES = (
    torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8,
    torch.int8, torch.int16, torch.int32, torch.int64, torch.bool,
)  # fmt: skip
TENSORS = st.builds(
    lambda dtype, shape, seed: torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(9).to(dtype),
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 3), max_size=3),
    st.integers(0, 99),
)
VALUES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8) | TENSORS
TREES = st.recursive(
    VALUES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=3),
    max_leaves=12,
)


@settings(max_examples=25, deadline=None)
@given(
    state=st.dictionaries(st.text(max_size=4) | st.integers(), TREES, max_size=4),
    background=st.booleans(),
)
def test_any_state_comes_back(state, background, tmp_path_factory):
    """Integer keys stay integers (an optimizer's are), and no name inside can be taken for the file's own marks."""
    again = through_a_file(tmp_path_factory.mktemp("any"), state, background=background)
    assert_same(again, state)
    assert list(again) == list(state)


def test_names_that_meet_in_one_path_are_kept_apart(tmp_path):
    numbers = iter(range(99))
    state = {
        key: torch.tensor(float(next(numbers)))
        for key in (1, "1", "a/b", "a@0", "a@0,0", "a@", "__metadata__", "", "/")
    }
    state["a"] = {"b": torch.tensor(50.0), "": torch.ones(2, 2), "b'": torch.zeros(3)}
    assert_same(through_a_file(tmp_path, state), state)


@pytest.mark.parametrize("background", [False, True])
def test_what_is_saved_is_the_state_at_the_call(background, tmp_path):
    """Training goes on while it is written; the same buffers serve the next one, of other shapes and types too."""
    checkpoints = Checkpoints(tmp_path, keep=9, background=background)
    state = {"x": torch.randn(300_000), "step": 1}
    wanted = []
    for step, change in enumerate((torch.neg, lambda x: x[:1000], torch.Tensor.bfloat16, torch.t), start=1):
        before = state["x"].clone()
        wanted.append((checkpoints.save(step, {"part": Part(state)}, {}), before))
        state["x"].zero_()
        state["x"] = change(before).clone()
    checkpoints.wait()
    for path, before in wanted:
        assert bits(load(path, CPU)["part"]["x"]) == bits(before)


def test_about_travels_with_it(tmp_path):
    about = {"precision": "fp8", "step": 3, "nested": {"é": [1, 2.5, None]}}
    path = Checkpoints(tmp_path, keep=1).save(3, {"part": Part({})}, about)
    assert read_about(path) == about

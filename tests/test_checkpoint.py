"""Checkpoints: training goes on bit for bit, in another precision too, and no death or disk takes what was saved."""

from __future__ import annotations

import copy
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import mptrain
from mptrain import Precision, PrecisionPolicy, models
from mptrain.checkpoint import Checkpoints, load, read_header
from mptrain.optim import OptimConfig, Schedule, build_optimizer
from mptrain.policy import conf_dir
from mptrain.telemetry.meters import Throughput
from mptrain.telemetry.monitor import Monitor, TelemetryConfig
from mptrain.trainer import Trainer, TrainerConfig

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
NAMES = sorted(path.stem for path in (conf_dir() / "precision").glob("*.yaml"))
VOCAB, BLOCK = 48, 8


class Samples:
    """Tokens that follow from (seed, step, micro-batch): each is the one before it plus 1, soon learned."""

    def batch(self, step: int, *, micro: int, microbatches: int, batch_size: int, seed: int):
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
        data=Samples(), sink=Quiet(), monitor=Monitor(model, precision, TelemetryConfig(record_every=2), 20),
        throughput=Throughput(1), every=1,
        checkpoints=Checkpoints(folder, keep=5), about={"precision": name},
    )  # fmt: skip


def resumed(name: str, folder: Path, step: int) -> Trainer:
    made = trainer(name, folder)
    made.load(load(made.checkpoints.path(step), CPU), step)
    return made


def states(run: Trainer):
    """A copy of everything a checkpoint of the run would hold now."""
    return copy.deepcopy({name: part.state_dict() for name, part in run.parts().items()})


def leaves(tree, where: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from leaves(value, f"{where}/{key}")
    elif isinstance(tree, list | tuple):
        for index, value in enumerate(tree):
            yield from leaves(value, f"{where}/{index}")
    else:
        yield where, tree


def assert_same(left, right) -> None:
    """Bit-equal trees of tensors and values; a list for a tuple will do."""
    ours, theirs = dict(leaves(left)), dict(leaves(right))
    assert ours.keys() == theirs.keys()
    for where, value in ours.items():
        other = theirs[where]
        if isinstance(value, torch.Tensor):
            assert value.dtype == other.dtype, where
            assert torch.equal(value, other), where
        else:
            assert type(value) is type(other), where
            assert value == other or value != value, where


# ---- training goes on -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_next_five_steps_are_bit_equal(name, tmp_path):
    """Losses, weights and every other part of the state; and a control in which one part, the random state, is lost."""
    went_on = trainer(name, tmp_path)
    went_on.fit(until=3)
    saved = states(went_on)
    went_on.fit(until=8)
    after = states(went_on)
    resumed_at = resumed(name, tmp_path, 3)
    assert_same(states(resumed_at), saved)
    resumed_at.fit(until=8)
    assert sorted(went_on.losses) == list(range(1, 9))
    assert resumed_at.losses == {step: went_on.losses[step] for step in range(4, 9)}
    assert_same(states(resumed_at), after)
    assert went_on.ledger.applied + went_on.ledger.skipped == 8
    assert went_on.ledger.applied >= 6
    elsewhere = resumed(name, tmp_path, 3)
    torch.manual_seed(77)
    elsewhere.fit(until=4)
    assert elsewhere.losses[4] != went_on.losses[4], "dropout does nothing: the random state is not under test"


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
    crossed.config = replace(crossed.config, accumulate=1)
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
    state = load(run.checkpoints.path(1), CPU)["model"]
    assert {key: value.shape for key, value in state.items()} == {key: value.shape for key, value in plain.items()}
    assert {value.dtype for value in state.values()} == {torch.float32}


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    run = trainer("bf16", tmp_path)
    run.fit(until=1)
    with pytest.raises(ValueError, match=r"the checkpoint's model does not fit this run .* use the model and optim"):
        trainer("bf16", tmp_path, n_embd=16).load(load(run.checkpoints.path(1), CPU), 1)


# ---- what is in a file ----------------------------------------------------------------------------------------------


class Part:
    def __init__(self, state):
        self.state = state

    def state_dict(self):
        return self.state


def through_a_file(folder: Path, state):
    path = Checkpoints(folder, keep=1).save(1, {"part": Part(state)}, {})
    return load(path, CPU)["part"]


def test_tied_tensors_are_stored_once(tmp_path):
    shared = torch.randn(256, 256)
    state = {"embed": shared, "head": shared, "other": shared.clone()}
    assert_same(through_a_file(tmp_path, state), state)
    size = Checkpoints(tmp_path, keep=1).path(1).stat().st_size
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


TENSORS = st.builds(
    lambda dtype, shape, seed: torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(9).to(dtype),
    st.sampled_from(
        [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.uint8, torch.int64, torch.bool]
    ),
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
@given(state=st.dictionaries(st.text(max_size=4).filter(lambda key: "/" not in key) | st.integers(), TREES, max_size=4))
def test_any_state_comes_back(state, tmp_path_factory):
    """Integer keys stay integers (an optimizer's are), and no name inside can be taken for the file's own marks."""
    again = through_a_file(tmp_path_factory.mktemp("any"), state)
    assert_same(again, state)
    assert list(again) == list(state)


def test_about_travels_in_the_header(tmp_path):
    about = {"precision": "fp8", "step": 3, "nested": {"é": [1, 2.5, None]}}
    path = Checkpoints(tmp_path, keep=1).save(3, {"part": Part({})}, about)
    assert read_header(path) == about


# ---- what is not a checkpoint ---------------------------------------------------------------------------------------


def save(checkpoints: Checkpoints, step: int, size: int = 1000) -> Path:
    return checkpoints.save(step, {"part": Part({"step": step, "x": torch.full((size,), float(step))})}, {"step": step})


def check(path: Path, size: int) -> int:
    """The step a file says it is of, after reading all of it."""
    part = load(path, CPU)["part"]
    assert part["x"].shape == (size,)
    assert bool((part["x"] == part["step"]).all())
    assert read_header(path)["step"] == part["step"]
    return part["step"]


def foreign(path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, path, metadata={"format": "pt"})


def pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps({"weight": list(range(1000))}))


def torch_saved(path: Path) -> None:
    torch.save({"weight": torch.zeros(3)}, path)


def longer(path: Path) -> None:
    save(Checkpoints(path.parent / "other", keep=1), 1).rename(path)
    path.write_bytes(path.read_bytes() + b"\0")


NOT_OURS = {
    "missing": (lambda path: None, "no checkpoint at .*: set resume=auto with run_dir, or the path of a checkpoint"),
    "folder": (Path.mkdir, "no checkpoint at"),
    "empty": (Path.touch, "truncated or not a safetensors file .*: resume=auto"),
    "zeros": (lambda path: path.write_bytes(bytes(5000)), "resume=auto"),
    "text": (lambda path: path.write_text("step: 3\n" * 100), "truncated or not a safetensors file .*: resume=auto"),
    "pickle": (pickled, "truncated or not a safetensors file .*: resume=auto"),
    "torch.save": (torch_saved, "truncated or not a safetensors file .*: resume=auto"),
    "longer": (longer, "truncated or not a safetensors file .*: resume=auto"),
    "foreign": (foreign, r"is not a checkpoint of mptrain \(version 1\): give one written by a run"),
}


@pytest.mark.parametrize("name", NOT_OURS)
def test_what_is_not_a_checkpoint_is_refused_and_passed_over(name, tmp_path):
    make, message = NOT_OURS[name]
    checkpoints = Checkpoints(tmp_path, keep=9)
    path = checkpoints.path(99)
    make(path)
    for read in (read_header, lambda path: load(path, CPU)):
        with pytest.raises(ValueError, match=message) as raised:
            read(path)
        assert str(path) in str(raised.value)
    assert checkpoints.newest() is None
    whole = save(checkpoints, 3)
    assert checkpoints.newest() == whole


def test_a_file_cut_anywhere_is_refused_and_passed_over(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=9)
    whole, torn = save(checkpoints, 3), checkpoints.path(4)
    content = save(checkpoints, 4).read_bytes()
    lengths = sorted({0, 1, 7, 8, 9, 100, len(content) - 1, *random.Random(0).sample(range(len(content)), 60)})
    for length in lengths:
        torn.write_bytes(content[:length])
        with pytest.raises(ValueError, match="truncated or not a safetensors file"):
            load(torn, CPU)
        assert checkpoints.newest() == whole, f"{length} of {len(content)} bytes were taken for a checkpoint"
    torn.write_bytes(content)
    assert checkpoints.newest() == torn


# ---- which files stay -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_the_newest_stay(keep, tmp_path):
    checkpoints = Checkpoints(tmp_path, keep)
    (tmp_path / "step-notes.safetensors").touch()  # a file of the user's
    for step in (2, 9, 10, 100, 1000, 20000):
        save(checkpoints, step)
        names = sorted(path.name for path in tmp_path.glob("step-0*"))
        kept = [s for s in (2, 9, 10, 100, 1000, 20000) if s <= step][-keep:]
        assert names == [checkpoints.path(s).name for s in kept]
    assert (tmp_path / "step-notes.safetensors").exists()


def test_a_run_gone_back_keeps_what_it_saves(tmp_path):
    """Continued from step 3 of a run that went to 50: its own checkpoint is not the oldest one to delete."""
    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, 50)
    for step in (4, 5):
        assert check(save(checkpoints, step), 1000) == step
    assert sorted(path.name for path in tmp_path.iterdir()) == [checkpoints.path(s).name for s in (5, 50)]


def test_the_same_step_again_replaces_its_file(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, 5, size=10)
    assert check(save(checkpoints, 5, size=20), 20) == 5
    assert len(list(tmp_path.iterdir())) == 1


# ---- death and disk -------------------------------------------------------------------------------------------------

SAVER = """
import os, sys, torch
from pathlib import Path
from mptrain.checkpoint import Checkpoints

class Part:
    def __init__(self, step):
        self.step = step
    def state_dict(self):
        return {"step": self.step, "x": torch.full((int(sys.argv[2]),), float(self.step))}

torch.set_num_threads(1)
print("ready", flush=True)
for line in sys.stdin:
    child = os.fork()
    if child == 0:  # saves without end
        step = int(line)
        while True:
            Checkpoints(Path(sys.argv[1]), keep=2).save(step, {"part": Part(step)}, {"step": step})
            step += 1
    print(child, flush=True)
    os.waitpid(child, 0)
    print("dead", flush=True)
"""


@contextmanager
def saver(folder: Path, size: int):
    """A process that forks one that saves, each time it is sent a step: so that torch is imported once."""
    paths = [str(Path(mptrain.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.Popen(
        [sys.executable, "-c", SAVER, str(folder), str(size)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONWARNINGS": "ignore"},
        start_new_session=True,
    )  # fmt: skip
    with process:
        assert process.stdout.readline() == "ready\n"
        try:
            yield process
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # its child too, which would save for ever


def watch(folder: Path, least: int) -> None:
    """Whoever looks sees no file of that name before it is whole."""
    for path in folder.glob("*.safetensors"):
        try:
            length = path.stat().st_size
        except FileNotFoundError:  # deleted since, as one too many
            continue
        assert length > least, f"{path.name} could be seen with {length} bytes"


def test_kill_9_while_saving(tmp_path):
    """At random moments, until four kills tore a file and four saves went through: what can be seen is whole."""
    size, torn, kills, newest = 1_000_000, 0, 0, 0
    checkpoints, moment = Checkpoints(tmp_path, keep=2), random.Random(0)
    begun = time.perf_counter()
    save(checkpoints, 0, size)
    one_save = time.perf_counter() - begun
    with saver(tmp_path, size) as process:
        while (torn < 4 or newest < 4) and kills < 60:
            print(newest + 1, file=process.stdin, flush=True)
            child = int(process.stdout.readline())
            deadline = time.perf_counter() + moment.uniform(0.0, 4.0 * one_save)
            while time.perf_counter() < deadline:
                watch(tmp_path, 4 * size)
            os.kill(child, signal.SIGKILL)
            assert process.stdout.readline() == "dead\n"
            kills += 1
            torn += bool(list(tmp_path.glob("partial-*")))
            found = checkpoints.newest()
            assert found.suffix == ".safetensors"
            step = check(found, size)
            assert step >= newest
            for path in tmp_path.glob("*.safetensors"):  # more than keep = 2 if it died before it deleted
                check(path, size)
            newest = step
    assert torn >= 4, f"{kills} kills, {torn} of them in the middle of a save: too little was shown"
    assert newest >= 4
    save(checkpoints, newest + 1, size)
    assert sorted(tmp_path.iterdir()) == sorted(tmp_path.glob("step-*.safetensors")), "torn files stay for ever"


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """The system refuses to let a file grow past ``room`` bytes (EFBIG; Python ignores the signal)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("room", [0, 100, 20_000])
def test_a_disk_without_room_takes_nothing_away(room, tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    before = save(checkpoints, 1)
    with full_disk(room), pytest.raises(OSError, match=r"step-00000002\.safetensors could not be written: .*untouched"):
        save(checkpoints, 2, size=100_000)
    assert list(tmp_path.iterdir()) == [before], "the torn file stays, or the whole one went"
    assert check(before, 1000) == 1
    assert check(save(checkpoints, 2, size=100_000), 100_000) == 2


def test_a_folder_replaced_by_a_file(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    save(checkpoints, 1)
    (tmp_path / "checkpoints").rename(tmp_path / "moved")
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(OSError, match="checkpoints"):
        save(checkpoints, 2)
    assert (tmp_path / "checkpoints").read_text() == "in the way"
    assert check(tmp_path / "moved" / checkpoints.path(1).name, 1000) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to any folder")
def test_a_folder_that_may_not_be_written(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    before = save(checkpoints, 1)
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OSError, match=r"step-00000002|Permission"):
            save(checkpoints, 2)
    finally:
        tmp_path.chmod(0o700)
    assert check(before, 1000) == 1

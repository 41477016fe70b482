"""Checkpoints on disk: what is damaged, foreign or old is told, and no death or full disk takes what was saved."""

from __future__ import annotations

import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from saved import CPU, HEAD, SHARD, Part, check, save
from saved_parts import BOTH, names

from mptrain.checkpoint.checkpoints import Checkpoints, float_tensors, load, read_about

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- what is not a checkpoint ---------------------------------------------------------------------------------------


def whole(path: Path) -> None:
    save(Checkpoints(path.parent / "other", keep=1), 99).rename(path)


def with_head(text: str):
    def make(path: Path) -> None:
        whole(path)
        (path / HEAD).write_text(text)

    return make


def without(name: str):
    def make(path: Path) -> None:
        whole(path)
        (path / name).unlink()

    return make


def longer(path: Path) -> None:
    whole(path)
    with (path / SHARD).open("ab") as file:
        file.write(b"\0")


def edited(path: Path) -> None:
    """By hand, and as JSON well."""
    whole(path)
    text = (path / HEAD).read_text()
    assert '"step": 99' in text
    (path / HEAD).write_text(text.replace('"step": 99', '"step": 98'))


def newer(path: Path) -> None:
    whole(path)
    (path / HEAD).write_text((path / HEAD).read_text().replace('{"mptrain": 2,', '{"mptrain": 3,'))


def of_torch(path: Path) -> None:
    torch.distributed.checkpoint.save({"weight": torch.zeros(3)}, checkpoint_id=path, no_dist=True)


def old(path: Path) -> None:
    header = {"mptrain": "1", "about": '{"step": 99}', "tree": "{}"}
    save_file({"model/weight": torch.zeros(3)}, path, metadata=header)


DAMAGED = f"is damaged: {HEAD}: .*: resume=auto takes the one before"
NOT_OURS = {
    "missing": (lambda path: None, "no checkpoint at .*: set resume=auto with run_dir, or the path of a checkpoint"),
    "empty folder": (Path.mkdir, "no checkpoint at"),
    "folder of torch": (of_torch, "no checkpoint at"),
    "empty": (Path.touch, "is not a checkpoint of mptrain, which is a folder: give one written by a run"),
    "text": (lambda path: path.write_text("step: 3\n" * 100), "is not a checkpoint of mptrain"),
    "pickle": (lambda path: path.write_bytes(pickle.dumps({"weight": [0] * 1000})), "is not a checkpoint of mptrain"),
    "torch.save": (lambda path: torch.save({"weight": torch.zeros(3)}, path), "is not a checkpoint of mptrain"),
    "safetensors": (lambda path: save_file({"weight": torch.zeros(3)}, path), "is not a checkpoint of mptrain"),
    "version 1": (old, r"older mptrain \(version 1\), whose attention weights have another order: .* another run_dir"),
    "newer": (newer, "is of version 3, this mptrain reads 2: update mptrain"),
    "no head": (without(HEAD), DAMAGED),
    "no tensors": (without(SHARD), f"is damaged: {SHARD}: .*: resume=auto takes the one before"),
    "longer": (longer, f"is damaged: {SHARD} has 4... bytes, not 4...: resume=auto takes the one before"),
    "edited": (edited, f"is damaged: the CRC of {HEAD} is wrong: resume=auto takes the one before"),
    "zeros": (with_head("\0" * 500), DAMAGED),
    "no JSON": (with_head("step: 3"), DAMAGED),
    "deep JSON": (with_head("[" * 100_000), DAMAGED),
    "JSON": (with_head('{"step": 3}'), r"is not a checkpoint of mptrain \(version 2\): give one written by a run"),
    "list": (with_head("[1, 2]"), "is not a checkpoint of mptrain"),
    "forged": (with_head('{"mptrain": 2}'), f"is damaged: the CRC of {HEAD} is wrong"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("name", NOT_OURS)
def test_what_is_not_a_checkpoint_is_refused_and_passed_over(name, tmp_path):
    make, message = NOT_OURS[name]
    checkpoints = Checkpoints(tmp_path, keep=9)
    path = checkpoints.path(99)
    make(path)
    reads = [lambda path: load(path, CPU)]
    if name not in ("no tensors", "longer"):  # which read_about leaves alone
        reads.append(read_about)
    for read in reads:
        with pytest.raises(ValueError, match=message) as raised:
            read(path)
        assert str(path) in str(raised.value)
        assert len(str(raised.value).splitlines()) == 1
    assert checkpoints.newest() is None
    whole = save(checkpoints, 3)
    assert checkpoints.newest() == whole
    assert len(checkpoints.passed_over) == (name != "missing")
    assert all(str(path) in why for why in checkpoints.passed_over)


def test_a_run_with_checkpoints_of_an_older_mptrain_alone_is_refused(tmp_path):
    """Resuming must not begin anew in its folder."""
    checkpoints = Checkpoints(tmp_path, keep=9)
    for step in (20, 60):
        old(tmp_path / f"step-{step:08d}.safetensors")
    save_file({"weight": torch.zeros(3)}, tmp_path / "step-00000070.safetensors")  # the user's
    with pytest.raises(ValueError, match=r"step-00000060\.safetensors was written by an older mptrain"):
        checkpoints.newest()
    saved = save(checkpoints, 80)
    assert checkpoints.newest() == saved


def test_a_file_cut_anywhere_is_refused_and_passed_over(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=9)
    whole, torn = save(checkpoints, 3), save(checkpoints, 4)
    for name in (SHARD, HEAD):
        content = (torn / name).read_bytes()
        lengths = {0, 1, 7, 8, 9, 100, len(content) - 1, *random.Random(0).sample(range(len(content)), 40)}
        for length in sorted(lengths):
            (torn / name).write_bytes(content[:length])
            with pytest.raises(ValueError, match=f"{torn} is damaged: {name}"):
                load(torn, CPU)
            assert checkpoints.newest() == whole, f"{length} of {len(content)} bytes were taken for a checkpoint"
            assert checkpoints.passed_over[0].startswith(f"checkpoint {torn} is damaged: {name}")
        (torn / name).write_bytes(content)
        assert checkpoints.newest() == torn


def test_a_flipped_bit_anywhere_is_refused_and_passed_over(tmp_path):
    """In the file of tensors, whose values nothing else could tell from others, and in every byte of the JSON."""
    checkpoints = Checkpoints(tmp_path, keep=9)
    whole, torn = save(checkpoints, 3), save(checkpoints, 4, size=50)
    draw = random.Random(0)
    for name, places in ((SHARD, None), (HEAD, None)):
        content = (torn / name).read_bytes()
        for place in places or range(len(content)):
            flipped = bytearray(content)
            flipped[place] ^= 1 << draw.randrange(8)
            (torn / name).write_bytes(flipped)
            with pytest.raises(ValueError, match=str(torn)) as raised:
                load(torn, CPU)
            told = str(raised.value)
            assert name in told or "not a checkpoint of mptrain" in told or "is of version" in told
        assert checkpoints.newest() == whole
        (torn / name).write_bytes(content)
    assert checkpoints.newest() == torn


def test_tensors_of_a_damaged_checkpoint_are_not_given(tmp_path):
    path = save(Checkpoints(tmp_path, keep=1), 1)
    assert [(name, dtype, tensor.shape) for name, dtype, tensor in float_tensors(path)] == [
        ("part/x", "float32", (1000,))
    ]
    content = (path / SHARD).read_bytes()
    for damaged in (content[:-1], content[:-1] + bytes([content[-1] ^ 1])):
        (path / SHARD).write_bytes(damaged)
        with pytest.raises(ValueError, match=f"is damaged: .*{SHARD}"):
            list(float_tensors(path))
    (path / SHARD).unlink()
    with pytest.raises(ValueError, match=f"is damaged: {SHARD}"):
        list(float_tensors(path))


def test_a_checkpoint_removed_while_it_is_read_is_one_message(tmp_path):
    """By the run that it belongs to, as one too many."""
    state = {f"{n}": torch.zeros(3) for n in range(3)}
    path = Checkpoints(tmp_path, keep=1).save(1, {"part": Part(state)}, {})
    reading = float_tensors(path)
    next(reading)
    shutil.rmtree(path)
    with pytest.raises(ValueError, match=f"checkpoint {path} is damaged: {SHARD}"):
        list(reading)
    path = Checkpoints(tmp_path, keep=1).save(1, {"part": Part(state)}, {})

    def removed(name, shape):
        (path / SHARD).unlink(missing_ok=True)

    with pytest.raises(ValueError, match=f"^checkpoint {path} is damaged: {SHARD}.*$"):
        load(path, CPU, sharded=removed)


# ---- which folders stay ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_the_newest_stay(keep, tmp_path):
    checkpoints = Checkpoints(tmp_path, keep)
    (tmp_path / "step-notes").mkdir()  # the user's
    steps = (2, 9, 10, 100, 1000, 99_999_999, 100_000_000)
    for step in steps:
        save(checkpoints, step)
        kept = [s for s in steps if s <= step][-keep:]
        assert names(tmp_path) == sorted([*(checkpoints.path(s).name for s in kept), "step-notes"])
        assert checkpoints.newest() == checkpoints.path(step)


def test_a_run_gone_back_keeps_what_it_saves(tmp_path):
    """Continued from step 3 of a run that went to 50: its own checkpoint is not the oldest one to delete."""
    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, 50)
    for step in (4, 5):
        assert check(save(checkpoints, step), 1000) == step
    assert names(tmp_path) == [checkpoints.path(s).name for s in (5, 50)]


def test_the_same_step_again_replaces_it(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, 5, size=10)
    assert check(save(checkpoints, 5, size=20), 20) == 5
    assert len(names(tmp_path)) == 1


def test_what_is_newer_is_set_aside_and_stays(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    for again in (1, 2):
        for step in (4, 50):
            save(Checkpoints(tmp_path, keep=9), step, size=again)
        checkpoints.set_aside(4)
        assert checkpoints.newest() == checkpoints.path(4)
        assert check(tmp_path / f"aside-{again}-step-00000050", again) == 50
    (tmp_path / "aside-1-step-00000050").rename(tmp_path / "mine")
    save(checkpoints, 60)
    save(checkpoints, 50)
    checkpoints.set_aside(4)
    assert names(tmp_path) == [
        "aside-1-step-00000050",
        "aside-1-step-00000060",
        "aside-2-step-00000050",
        "mine",
    ]


@BOTH
def test_what_killed_processes_left_is_cleared_away_and_what_is_the_users_stays(background, tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2, background=background)
    for name in ("partial-step-00000002", "partial-step-00000007", "partial-4711", "old-step-00000001", "old-notes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rank-00003.safetensors").write_text("of eight ranks")
    save(checkpoints, 1)
    save(checkpoints, 2)
    checkpoints.wait()
    assert names(tmp_path) == ["old-notes", "step-00000001", "step-00000002"]
    assert names(checkpoints.path(2)) == [HEAD, SHARD], "a rank that is no more left its file in it"

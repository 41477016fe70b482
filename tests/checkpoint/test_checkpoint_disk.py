"""Checkpoints on disk: what is damaged, foreign or old is told, and no death or full disk takes what was saved."""

from __future__ import annotations

import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from saved import CPU, HEAD, SHARD, Part, check, save

import mptrain
from mptrain.checkpoint.checkpoints import Checkpoints, float_tensors, load, read_about

pytestmark = pytest.mark.usefixtures("one_thread")
BOTH = pytest.mark.parametrize("background", [False, True], ids=["at once", "in the background"])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


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


# ---- death ----------------------------------------------------------------------------------------------------------

SAVER = """
import os, sys, torch
from pathlib import Path
from mptrain.checkpoint.checkpoints import Checkpoints

class Part:
    def __init__(self, step):
        self.step = step
    def state_dict(self):
        return {"step": self.step, "x": torch.full((int(size),), float(self.step))}

def dying(left, real=os.replace):
    def replace(*where):
        nonlocal left
        left -= 1
        if left == 0:
            os._exit(9)
        real(*where)
    os.replace = replace

torch.set_num_threads(1)
print("ready", flush=True)
for line in sys.stdin:
    folder, size, *numbers = line.split()
    step, background, renames = map(int, numbers)
    child = os.fork()
    if child == 0:
        checkpoints = Checkpoints(Path(folder), keep=2, background=bool(background))
        if renames:
            dying(renames)
        while True:  # saves without end, or once
            checkpoints.save(step, {"part": Part(step)}, {"step": step})
            if renames:
                break
            step += 1
        break  # and ends as a process does
    print(child, flush=True)
    os.waitpid(child, 0)
    print("dead", flush=True)
"""


@pytest.fixture(scope="module")
def saver():
    """A process that forks one that saves, each time it is asked to: so that torch is imported once."""
    paths = [str(Path(mptrain.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.Popen(
        [sys.executable, "-c", SAVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONWARNINGS": "ignore"},
        start_new_session=True,
    )  # fmt: skip
    with process:
        assert process.stdout.readline() == "ready\n"
        try:
            yield process
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # its child too, which would save for ever


def started(process, folder: Path, size: int, step: int, background: bool, renames: int = 0) -> int:
    """The process that saves from ``step`` on; with ``renames`` one save, that dies before so many of its renames."""
    print(folder, size, step, int(background), renames, file=process.stdin, flush=True)
    return int(process.stdout.readline())


def dead(process) -> None:
    assert process.stdout.readline() == "dead\n"


def watch(folder: Path, least: int) -> None:
    """Whoever looks sees no folder of that name before it is whole."""
    for path in folder.glob("step-*"):
        try:
            length = (path / SHARD).stat().st_size
            (path / HEAD).stat()
        except FileNotFoundError:
            assert not path.exists(), f"{path.name} could be seen in part"  # renamed since, as one too many
            continue
        assert length > least, f"{path.name} could be seen with {length} bytes"


@BOTH
def test_kill_9_while_saving(background, saver, tmp_path):
    """At random moments, until four kills tore a folder and four saves went through: what can be seen is whole."""
    size, torn, kills, newest = 1_000_000, 0, 0, 0
    checkpoints, moment = Checkpoints(tmp_path, keep=2), random.Random(0)
    begun = time.perf_counter()
    save(checkpoints, 0, size)
    longest = 4.0 * (time.perf_counter() - begun)
    while (torn < 4 or newest < 4) and kills < 60:
        child = started(saver, tmp_path, size, newest + 1, background)
        deadline = time.perf_counter() + moment.uniform(0.0, longest)
        while time.perf_counter() < deadline:
            watch(tmp_path, 4 * size)
        os.kill(child, signal.SIGKILL)
        dead(saver)
        kills += 1
        torn += bool(list(tmp_path.glob("partial-*")))
        step = check(checkpoints.newest(), size)
        assert step >= newest
        assert checkpoints.passed_over == []
        longest *= 1.2 if step == newest else 0.9  # a busy machine needs longer for a save
        newest = step
    assert torn >= 4, f"{kills} kills, {torn} of them in the middle of a save: too little was shown"
    assert newest >= 4
    save(checkpoints, newest + 1, size)
    assert len(names(tmp_path)) == 2, "torn folders stay for ever"
    assert all(name.startswith("step-") for name in names(tmp_path))


def test_death_between_any_two_renames_loses_nothing(saver, tmp_path):
    """Of a save of the same step again, which moves the first one out of the way. Who only looks repairs nothing."""
    seen = []
    for renames in (1, 2, 3, 4):
        checkpoints = Checkpoints(tmp_path, keep=1)
        save(checkpoints, 5, size=10)
        started(saver, tmp_path, 20, 5, False, renames)
        dead(saver)
        before = names(tmp_path)
        found = checkpoints.newest()
        assert names(tmp_path) == before
        size = len(load(found, CPU)["part"]["x"])
        assert check(found, size) == 5
        seen.append((found.name, size))
        if renames % 2:
            checkpoints.set_aside(5)  # what a run does that goes on from there
        else:
            save(checkpoints, 4)
            save(Checkpoints(tmp_path, keep=9), 6)
        left = ["step-00000004", "step-00000005", "step-00000006"]
        assert names(tmp_path) == (left[1:2] if renames % 2 else left)
        assert check(checkpoints.path(5), size) == 5
        for name in names(tmp_path):
            shutil.rmtree(tmp_path / name)
    five = "step-00000005"
    assert seen == [(five, 10), (f"old-{five}", 10), (five, 20), (five, 20)]


def test_a_process_that_ends_finishes_what_it_was_saving(saver, tmp_path):
    size = 3_000_000
    started(saver, tmp_path, size, 7, True, renames=99)
    dead(saver)
    assert names(tmp_path) == ["step-00000007"]
    assert check(Checkpoints(tmp_path, keep=1).newest(), size) == 7


# ---- disk -----------------------------------------------------------------------------------------------------------


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """The system refuses to let a file grow past ``room`` bytes (EFBIG; Python ignores the signal)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def refused(checkpoints: Checkpoints, background: bool, again: bool, parts) -> None:
    """Saving ``parts`` as step 2 fails: at once, or as told by wait() or by the next save, and by that one alone."""
    told = pytest.raises(
        OSError, match=r"^checkpoint .*step-00000002 could not be written: .*; older ones are untouched$"
    )
    if not background:
        with told:
            checkpoints.save(2, parts, {})
        return
    checkpoints.save(2, parts, {})
    with told:
        checkpoints.save(3, parts, {}) if again else checkpoints.wait()
    checkpoints.wait()


@BOTH
@pytest.mark.parametrize("room", [0, 100, 20_000])
@pytest.mark.parametrize("what", ["tensors", "JSON"])
def test_a_disk_without_room_takes_nothing_away(what, room, background, tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1, background=background)
    before = save(checkpoints, 1)
    checkpoints.wait()
    state = {"x": torch.zeros(100_000 if what == "tensors" else 10), "log": list(range(20_000 * (what == "JSON")))}
    with full_disk(room):
        refused(checkpoints, background, room == 100, {"part": Part(state)})
    assert list(tmp_path.iterdir()) == [before], "the torn folder stays, or the whole one went"
    assert check(before, 1000) == 1
    path = save(checkpoints, 2, size=100_000)
    checkpoints.wait()
    assert check(path, 100_000) == 2


@BOTH
def test_a_small_file_system_that_is_full(background, tmp_path):
    """Not a limit of the process but a disk: writing fails in the middle, and what is removed makes room again."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        checkpoints = Checkpoints(disk / "checkpoints", keep=1, background=background)
        before = save(checkpoints, 1, size=200_000)
        checkpoints.wait()
        refused(checkpoints, background, False, {"part": Part({"x": torch.zeros(400_000)})})
        assert list(checkpoints.folder.iterdir()) == [before]
        assert check(before, 200_000) == 1
        assert check(save(Checkpoints(checkpoints.folder, keep=1), 2, size=200_000), 200_000) == 2
        assert names(checkpoints.folder) == ["step-00000002"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@BOTH
def test_a_folder_replaced_by_a_file(background, tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1, background=background)
    save(checkpoints, 1)
    checkpoints.wait()
    (tmp_path / "checkpoints").rename(tmp_path / "moved")
    (tmp_path / "checkpoints").write_text("in the way")
    refused(checkpoints, background, False, {"part": Part({"x": torch.zeros(3)})})
    assert (tmp_path / "checkpoints").read_text() == "in the way"
    assert check(tmp_path / "moved" / checkpoints.path(1).name, 1000) == 1


@BOTH
def test_a_folder_that_may_not_be_written(background):
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to others than their owner
        folder = Path(name)
        checkpoints = Checkpoints(folder, keep=1, background=background)
        before = save(checkpoints, 1)
        checkpoints.wait()
        folder.chmod(0o555)
        user = os.geteuid()
        try:
            if user == 0:
                os.seteuid(65534)  # root may write to any folder
            refused(checkpoints, background, False, {"part": Part({"x": torch.zeros(3)})})
        finally:
            os.seteuid(user)
            folder.chmod(0o700)
        assert check(before, 1000) == 1
        assert names(folder) == [before.name]


def test_looking_for_the_newest_waits_for_what_is_being_saved(tmp_path):
    """Else it could be told of one that the save in the background then removes."""
    checkpoints = Checkpoints(tmp_path, keep=1, background=True)
    for step in range(1, 6):
        save(checkpoints, step, size=300_000)
        assert check(checkpoints.newest(), 300_000) == step
        assert not [thread for thread in threading.enumerate() if thread.name == "checkpoint"]
    save(checkpoints, 6)
    checkpoints.set_aside(5)
    assert names(tmp_path) == ["aside-1-step-00000006"]


def test_a_forgotten_error_is_told_once(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1, background=True)
    with full_disk(0):
        save(checkpoints, 1)
        assert checkpoints.newest() is None, "looking is no time to fail"
    with pytest.raises(OSError, match="step-00000001 could not be written"):
        checkpoints.wait()
    checkpoints.wait()


def test_the_head_is_json_that_others_can_read(tmp_path):
    head = json.loads((save(Checkpoints(tmp_path, keep=1), 5) / HEAD).read_text())
    assert head["mptrain"] == 2
    assert head["about"] == {"step": 5}
    assert head["tensors"] == {
        "part/x": {"dtype": "float32", "shape": [1000], "chunks": [[[0], [1000], SHARD, "part/x"]]}
    }
    assert list(head["files"]) == [SHARD]

"""Processes killed while they save, and disks that are full, torn or forbidden."""

from __future__ import annotations

import json
import os
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
from saved import CPU, HEAD, SHARD, Part, check, save
from saved_parts import BOTH, names

import mptrain
from mptrain.checkpoint.checkpoints import Checkpoints, load

pytestmark = pytest.mark.usefixtures("one_thread")
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

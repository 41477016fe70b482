"""Checkpoints of several ranks: read by any number of them, and what befalls one rank's file is known to all."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest
import ranks
import torch
import torch.distributed as dist
from safetensors import safe_open
from saved import CPU, Part, assert_same, check

from mptrain.checkpoint.checkpoints import Checkpoints, load
from mptrain.distributed import World

pytestmark = pytest.mark.multi
CUTS = {"rows": 0, "few": 0, "line": 0, "columns": 1, "one": 0, "none": 0}  # dimension that is sharded


def whole_state():
    """Sharded evenly by no number of ranks; "one" leaves all but one rank without a row."""
    generator = torch.Generator().manual_seed(1)

    def drawn(*shape, dtype=torch.float32):
        return torch.randn(shape, generator=generator).to(dtype)

    return {
        "rows": drawn(7, 3), "few": drawn(3, 2, 2, dtype=torch.bfloat16), "line": drawn(5), "columns": drawn(4, 6),
        "one": drawn(1, 4), "none": drawn(0, 4), "everywhere": drawn(3, 3), "rows@0,0": drawn(2),
        "scalar": drawn(), "plain": drawn(6), "bytes": torch.arange(50, dtype=torch.uint8),
        "counts": torch.arange(3), "step": 12,
    }  # fmt: skip


def cut(name, tensor):
    """As the ranks of this process hold it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if name in CUTS:
        return distribute_tensor(tensor, mesh, [Shard(CUTS[name])])
    return distribute_tensor(tensor, mesh, [Replicate()]) if name in ("everywhere", "rows@0,0") else tensor


def state_of_rank():
    state = {
        name: cut(name, value) if isinstance(value, torch.Tensor) else value for name, value in whole_state().items()
    }
    return {**state, "tied": state["rows"], "also tied": state["one"], "tied too": state["plain"]}


def put_together(state):
    """As one process would hold it."""
    return {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in state.items()}


def loaded(path, ranks):
    models = {name: cut(name, torch.zeros_like(value)) for name, value in whole_state().items() if name in CUTS}
    state = load(path, CPU, ranks, lambda name, shape: models.get(name.removeprefix("part/")))
    assert all(hasattr(state["part"][name], "placements") for name in CUTS)
    return put_together(state["part"]), state.get("mine")


def saved_and_loaded(rank, folder):
    world = World()
    for step, background in enumerate((False, True), start=1):
        checkpoints = Checkpoints(Path(folder), keep=9, ranks=world, background=background)
        state = state_of_rank()
        own = {"mine": Part({"rank": rank, "x": torch.full((2 + rank,), float(rank))})}
        checkpoints.save(step, {"part": Part(state)}, {"step": step}, own)
        if background:
            for value in state.values():
                if isinstance(value, torch.Tensor):
                    value.zero_()
        checkpoints.wait()
    return [loaded(checkpoints.path(step), world) for step in (1, 2)]


def only_loaded(rank, folder):
    world = World()
    newest = Checkpoints(Path(folder), keep=9, ranks=world).newest()
    return newest, loaded(newest, world)


@pytest.mark.parametrize("size", [2, 4])
def test_any_number_of_ranks_goes_on_with_what_some_saved(size, tmp_path):
    """Values and ties; the parts of a rank only where there are as many ranks again."""
    whole = whole_state()
    whole |= {"tied": whole["rows"], "also tied": whole["one"], "tied too": whole["plain"]}
    for rank, found in enumerate(ranks.run(size, saved_and_loaded, str(tmp_path))):
        for state, mine in found:
            assert_same(state, whole)
            assert_same(mine, {"rank": rank, "x": torch.full((2 + rank,), float(rank))})
    for newest, (state, mine) in ranks.run(6 - size, only_loaded, str(tmp_path)):
        assert newest == tmp_path / "step-00000002"
        assert mine is None
        assert_same(state, whole)
    for step in (1, 2):
        state = load(tmp_path / f"step-0000000{step}", CPU)
        assert_same(state, {"part": whole})
    files = sorted(newest.glob("rank-*.safetensors"))
    assert len(files) == size
    stored = 0
    for file in files:
        with safe_open(file, framework="pt") as opened:
            held = [opened.get_tensor(name) for name in opened.keys() if not name.startswith("rank")]  # noqa: SIM118
        assert any(tensor.numel() for tensor in held), f"{file.name} holds nothing: one rank writes for all"
        stored += sum(tensor.nbytes for tensor in held)
    assert stored == sum(tensor.nbytes for tensor in whole_state().values() if isinstance(tensor, torch.Tensor))


def replicated(rank, folder):
    """Two replicas of two shards, as HSDP holds them, and twice the halves of a tensor, each pair on its own mesh."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "parts"))
    x = torch.arange(15.0).view(5, 3)
    both = distribute_tensor(x, mesh, [Replicate(), Shard(0)])
    parts = distribute_tensor(-x, mesh["parts"], [Shard(1)])
    checkpoints = Checkpoints(Path(folder), keep=1, ranks=World(), background=True)
    checkpoints.save(1, {"part": Part({"both": both, "parts": parts})}, {})
    checkpoints.wait()


def test_what_several_ranks_hold_is_written_once(tmp_path):
    ranks.run(4, replicated, str(tmp_path))
    x = torch.arange(15.0).view(5, 3)
    path = tmp_path / "step-00000001"
    assert_same(load(path, CPU), {"part": {"both": x, "parts": -x}})
    stored = 0
    for file in path.glob("rank-*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            stored += sum(opened.get_tensor(name).nbytes for name in opened.keys())  # noqa: SIM118 (not a dict)
    assert stored == 2 * x.nbytes


def part(rank, step, size=1000):
    """What each rank holds for itself is its own; ``x`` is rank 0's to write, being the first."""
    return {"part": Part({"step": step, "x": torch.full((1000,), float(step))})}, {
        "mine": Part({"x": torch.full((size,), float(rank))})
    }


def damaged_on_one(rank, folder):
    world = World()
    checkpoints = Checkpoints(Path(folder), keep=9, ranks=world)
    for step in (1, 2):
        shared, own = part(rank, step)
        checkpoints.save(step, shared, {"step": step}, own)
    if rank == 0:
        torn = checkpoints.path(2) / "rank-00001.safetensors"
        torn.write_bytes(torn.read_bytes()[:-1])
    world.barrier()
    newest, why = checkpoints.newest(), checkpoints.passed_over
    try:
        load(checkpoints.path(2), CPU, world)
    except ValueError as error:
        return newest, why, str(error)


def test_a_file_of_one_rank_that_is_damaged_is_found_by_all(tmp_path):
    for newest, why, told in ranks.run(2, damaged_on_one, str(tmp_path)):
        assert newest == tmp_path / "step-00000001"
        assert why == [told]
        assert f"checkpoint {tmp_path / 'step-00000002'} is damaged: rank-00001.safetensors has" in told


def full_on_one(rank, folder, background):
    world = World()
    checkpoints = Checkpoints(Path(folder), keep=1, ranks=world, background=background)

    def save(step, size=1000):
        shared, own = part(rank, step, size)
        checkpoints.save(step, shared, {"step": step}, own)
        checkpoints.wait()

    save(1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    told = ""
    try:
        save(2, size=1 << 20)
    except OSError as error:
        told = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    world.barrier()
    left = sorted(os.listdir(folder))
    newest = checkpoints.newest()
    world.barrier()
    save(3, size=1 << 20)
    return told, left, newest, sorted(os.listdir(folder)) if rank == 0 else None


@pytest.mark.parametrize("background", [False, True])
def test_one_rank_without_room_stops_the_save_of_all(background, tmp_path):
    found = ranks.run(2, full_on_one, str(tmp_path), background)
    for told, left, newest, _ in found:
        assert f"checkpoint {tmp_path / 'step-00000002'} could not be written" in told
        assert told.endswith("older ones are untouched (rank 1)")
        assert left == ["step-00000001"]
        assert newest == tmp_path / "step-00000001"
    assert found[0][-1] == ["step-00000003"]
    assert check(tmp_path / "step-00000003", 1000) == 3


def unwritable(rank, folder):
    """The folder of the checkpoints is a file: only the first rank makes it."""
    checkpoints = Checkpoints(Path(folder) / "file", keep=1, ranks=World())
    shared, own = part(rank, 1)
    try:
        checkpoints.save(1, shared, {"step": 1}, own)
    except OSError as error:
        return str(error)


def test_a_folder_that_cannot_be_made_is_an_error_of_all(tmp_path):
    (tmp_path / "file").write_text("in the way")
    first, second = ranks.run(2, unwritable, str(tmp_path))
    assert first == second
    assert first.endswith("older ones are untouched (rank 0)")

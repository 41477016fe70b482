"""The agreements of several ranks, against what plain Python makes of all their values."""

import pytest
import ranks
import torch

from mptrain.distributed import ALONE, World


def agreed(rank):
    world = World()
    values = torch.tensor([rank, 3 - rank, 1.5])
    return {
        "who": (world.rank, world.size, world.first),
        "max": world.max(values).tolist(),
        "sum": world.sum(values).tolist(),
        "any": world.max(torch.tensor(rank == 2)).tolist(),
        "kept": values.tolist(),
        "gathered": world.gather({"rank": rank}),
        "shared": world.share(f"from {rank}"),
        "poisoned": world.sum(
            torch.tensor([float("inf") if rank == 1 else 1.0, float("nan") if rank else 0.0])
        ).tolist(),
    }


@pytest.mark.multi
@pytest.mark.parametrize("size", [2, 4])
def test_every_rank_comes_to_the_same(size):
    found = ranks.run(size, agreed)
    for rank, one in enumerate(found):
        assert one["who"] == (rank, size, rank == 0)
        assert one["max"] == [size - 1, 3, 1.5]
        assert one["sum"] == [sum(range(size)), 3 * size - sum(range(size)), 1.5 * size]
        assert one["any"] is (size > 2)
        assert one["kept"] == [rank, 3 - rank, 1.5]
        assert one["gathered"] == [{"rank": other} for other in range(size)]
        assert one["shared"] == "from 0"
        assert one["poisoned"][0] == float("inf")
        assert one["poisoned"][1] != one["poisoned"][1]


def test_one_process_is_a_world_of_one():
    value = torch.tensor([1.0, 2.0])
    assert (ALONE.rank, ALONE.size, ALONE.first) == (0, 1, True)
    assert ALONE.max(value) is value
    assert ALONE.sum(value) is value
    assert ALONE.gather(7) == [7]
    assert ALONE.share(7) == 7

"""Small checkpoints for tests: parts that are only a state, and what must be in them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from mptrain.checkpoint.checkpoints import Checkpoints, load, read_about

CPU = torch.device("cpu")
HEAD, SHARD = "checkpoint.json", "rank-00000.safetensors"


class Part:
    def __init__(self, state):
        self.state = state

    def state_dict(self):
        return self.state


def save(checkpoints: Checkpoints, step: int, size: int = 1000) -> Path:
    return checkpoints.save(step, {"part": Part({"step": step, "x": torch.full((size,), float(step))})}, {"step": step})


def check(path: Path, size: int) -> int:
    """The step a checkpoint says it is of, after reading all of it."""
    part = load(path, CPU)["part"]
    assert part["x"].shape == (size,)
    assert bool((part["x"] == part["step"]).all())
    assert read_about(path)["step"] == part["step"]
    return part["step"]


def leaves(tree, where: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from leaves(value, f"{where}/{key!r}")
    elif isinstance(tree, list | tuple):
        for index, value in enumerate(tree):
            yield from leaves(value, f"{where}/{index}")
    else:
        yield where, tree


def bits(tensor: torch.Tensor) -> list[int]:
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8).tolist()


def assert_same(left, right) -> None:
    """Bit-equal trees of tensors and values; a list for a tuple will do."""
    ours, theirs = dict(leaves(left)), dict(leaves(right))
    assert ours.keys() == theirs.keys()
    for where, value in ours.items():
        other = theirs[where]
        if isinstance(value, torch.Tensor):
            assert (value.dtype, value.shape) == (other.dtype, other.shape), where
            assert bits(value) == bits(other), where
        else:
            assert type(value) is type(other), where
            assert value == other or (value != value and other != other), where  # NaN is NaN and nothing else

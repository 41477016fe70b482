"""Checkpoints from the run's side: saving, resuming, rolling back after a loss spike."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mptrain.checkpoint.checkpoints import Checkpoints, Like, Stateful, load, read_about
from mptrain.distributed import Ranks
from mptrain.telemetry.ledger import Event, Ledger

OPTIONAL = ("monitor", "average", "spikes")  # started where a checkpoint holds none
MOST_ROLLBACKS = 3  # between two checkpoints; skipping batches does not help where the model itself has diverged


class Diverged(ValueError):
    """Training cannot continue; what was saved is as it was."""

    @classmethod
    def skipping(cls, steps: int, reason: str) -> Diverged:
        """Say that so many steps in a row were skipped."""
        return cls(
            f"{steps} steps skipped in a row ({reason}), which is trainer.max_skips_in_a_row: lower optim.lr, or use "
            "precision=bf16; checkpoints are as they were"
        )


class Keeper:
    """The named parts of a run, but for those that are None. ``own``: those that differ by rank; ``sharded``: how
    tensors are laid out here."""

    def __init__(
        self,
        parts: Mapping[str, Stateful | None],
        own: Mapping[str, Stateful | None],
        ranks: Ranks,
        device: torch.device,
        sharded: Like,
    ) -> None:
        self.parts, self._own = ({k: v for k, v in some.items() if v is not None} for some in (parts, own))
        self._ranks, self._device, self._sharded = ranks, device, sharded

    def save(self, checkpoints: Checkpoints, step: int, about: dict[str, Any]) -> None:
        """Write the parts as they are after ``step``."""
        checkpoints.save(step, self.parts, {**about, "step": step}, self._own)

    def resume(self, path: Path) -> int:
        """Put the parts in the state of a checkpoint; returns its step. ValueError if it is of another model."""
        state = load(path, self._device, self._ranks, self._sharded)
        own = {name: part for name, part in self._own.items() if name in state}  # of as many ranks as there are now
        for name, part in {**self.parts, **own}.items():
            try:
                part.load_state_dict(state.get(name, {}) if name in OPTIONAL else state[name])
            except (RuntimeError, KeyError, ValueError) as error:
                first = str(error).splitlines()[0]
                raise ValueError(
                    f"the checkpoint's {name} does not fit this run ({first}): use the model and optim it was made with"
                ) from error
        return int(read_about(path)["step"])

    def roll_back(self, checkpoints: Checkpoints, ledger: Ledger, step: int) -> tuple[int, Event]:
        """Go back from ``step`` to the newest checkpoint: its step, and what the ledger says of it.

        Diverged if there is none, or going back to it has not helped so far.
        """
        checkpoints.wait()
        path = checkpoints.newest()
        if path is None:
            raise Diverged("the loss spiked, and there is no checkpoint yet to go back to: lower checkpoint.every")
        skipped, rollbacks = ledger.skipped_batches, ledger.rollbacks
        to = self.resume(path)
        checkpoints.set_aside(to)  # damaged ones: they would count towards those that are kept
        if rollbacks - ledger.rollbacks >= MOST_ROLLBACKS:  # the checkpoint knows of those before it
            raise Diverged(
                f"the loss spiked again after {MOST_ROLLBACKS} rollbacks to step {to}: lower optim.lr, or use "
                "precision=bf16; checkpoints are as they were"
            )
        return to, ledger.roll_back(step, to, skipped, rollbacks)

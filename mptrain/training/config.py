"""The sizes and limits of training."""

from __future__ import annotations

from dataclasses import dataclass

from mptrain.tools.settings import require


@dataclass(frozen=True)
class TrainerConfig:
    """``batch_size``: samples a micro-batch; ``accumulate``: micro-batches a step, of all ranks together; ``clip``:
    largest gradient norm, 0 for none; ``eval_every``: 0 = at the end only; ``checkpointing``: recompute activations in
    backward; ``compile``: torch.compile the model; ``max_skips_in_a_row`` ends a run that only skips; ``on_spike``:
    none, or rollback to the newest checkpoint, to go on behind the batches of the spike."""

    max_steps: int = 60
    batch_size: int = 4
    accumulate: int = 1
    clip: float = 1.0
    eval_every: int = 100
    eval_batches: int = 8
    checkpointing: bool = False
    compile: bool = False
    max_skips_in_a_row: int = 100
    on_spike: str = "none"

    def __post_init__(self) -> None:
        for name in ("max_steps", "batch_size", "accumulate", "eval_batches", "max_skips_in_a_row"):
            require(getattr(self, name) >= 1, f"trainer.{name}", getattr(self, name), "at least 1")
        require(self.clip >= 0, "trainer.clip", self.clip, "a norm such as 1.0, or 0 for no clipping")
        require(self.eval_every >= 0, "trainer.eval_every", self.eval_every, "0 (at the end only) or more")
        require(self.on_spike in ("none", "rollback"), "trainer.on_spike", self.on_spike, "none or rollback")

"""Evaluation of the model: means over the validation batches, the same on any number of ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mptrain.distributed import Ranks
from mptrain.distributed.layout import Share
from mptrain.precision import Precision
from mptrain.training.protocols import Averaged, Data


class Validation:
    """The ranks share the batches out, and each mean is that of all batches in their order.

    ``run_model`` is called for the loss; a model with ``measure(**batch)`` is asked for more.
    """

    def __init__(
        self, model: nn.Module, run_model: nn.Module, precision: Precision, data: Data, ranks: Ranks, share: Share
    ) -> None:
        self._model, self._run_model, self._precision = model, run_model, precision
        self._data, self._ranks, self._share = data, ranks, share

    def __call__(
        self, batch_size: int, batches: int, *, masters: bool = False, average: Averaged | None = None
    ) -> dict[str, float]:
        """``val/NAME`` (loss in nats, accuracy) with the policy on; ``masters``: also of the FP32 weights with it off,
        ``average``: of the running average."""
        self._model.eval()
        chosen = list(self._data.validation(batch_size, batches))
        row = self._means(chosen, "")
        if masters:
            row |= self._means(chosen, "_masters", policy_on=False)
        if average is not None:
            with average.in_place():
                row |= self._means(chosen, "_average")
        self._model.train()
        return row

    def _means(self, batches: list[dict[str, Tensor]], suffix: str, *, policy_on: bool = True) -> dict[str, float]:
        measure = getattr(self._model, "measure", lambda **batch: {"loss": self._run_model(**batch)})
        rank, size = self._share.rank, self._share.size
        table: Tensor | None = None
        names: list[str] = []
        for turn in range(
            0, len(batches), size
        ):  # all ranks go through as many forwards: sharded weights need them all
            index = turn + rank
            batch = batches[min(index, len(batches) - 1)]
            with self._precision.evaluating(policy_on=policy_on):
                measured = measure(**to_device(batch, self._precision.device))
            names = list(measured)
            if table is None:
                table = torch.zeros(len(batches), len(names), device=self._precision.device)
            if index < len(batches) and self._share.first_part:
                table[index] = torch.stack([value.float() for value in measured.values()])
        assert table is not None, "no validation batch"
        means = self._ranks.sum(table).mean(0)
        return {f"val/{name}{suffix}": float(mean) for name, mean in zip(names, means, strict=True)}


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Any]:
    """A batch where the model is."""
    if device.type == "cpu":
        return batch
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}

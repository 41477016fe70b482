"""Quantization-aware fine-tuning: some more steps in which the weights are rounded as they will be in deployment.

torchao's QAT swaps layers for ones that round in the forward and let gradients pass as if they had not (Jacob et al.
2018), and later for the real thing. Both swaps are checked: a name that matches nothing would leave a model that was
fine-tuned in full precision, and nobody would see it from the loss.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mptrain.optim import OptimConfig, Schedule, build_optimizer
from mptrain.precision import Precision

CLIP = 1.0  # as the trainer's


@dataclass(frozen=True)
class Tuned:
    """What the fine-tuning did: ``losses`` (nats) of its steps, with rounded weights; ``skipped`` ones among them."""

    layers: tuple[str, ...]
    losses: list[float]
    skipped: int


def fake_quantize(model: nn.Module, config: Any, names: Collection[str]) -> None:
    """Swap the layers ``names`` for ones that compute as torchao's ``config`` will have them, on FP32 parameters.

    ValueError if torchao has no such training for the config.
    """
    from torchao.quantization import quantize_
    from torchao.quantization.qat import FakeQuantizedLinear, QATConfig

    before = {name: model.get_submodule(name) for name in names}
    try:
        quantize_(model, QATConfig(config, step="prepare"), _only(names))
    except (ValueError, AssertionError) as error:
        raise ValueError(
            f"torchao cannot fine-tune for {type(config).__name__} ({error}): use --to int4, int4-dynamic or fp8"
        ) from error
    for name, old in before.items():
        new = model.get_submodule(name)
        assert isinstance(new, FakeQuantizedLinear), f"{name} does not round its weight: it is {type(new).__name__}"
        assert new.weight_fake_quantizer is not None, f"{name} does not round its weight"
        assert new.weight is old.weight, f"{name}: the weight was copied"
        new.train(old.training)


def convert(model: nn.Module, config: Any, names: Collection[str]) -> None:
    """Swap the layers of :func:`fake_quantize` for those that ``config`` makes of a trained model."""
    from torchao.quantization import quantize_
    from torchao.quantization.qat import FakeQuantizedLinear, QATConfig

    quantize_(model, QATConfig(config, step="convert"), _only(names))
    left = [name for name, layer in model.named_modules() if isinstance(layer, FakeQuantizedLinear)]
    assert not left, f"still in training: {left}"


def finetune(
    model: nn.Module,
    config: Any,
    names: Collection[str],
    batches: Iterable[dict[str, Tensor]],
    steps: int,
    *,
    lr: float = 3e-4,
    precision: str = "fp32",
) -> Tuned:
    """Train ``model``, trained already, for ``steps`` more on ``batches``, rounded as ``config`` will.

    Its layers ``names`` are left rounding: :func:`convert` makes the deployed model of it. AdamW with warm-up and a
    cosine to a tenth; no weight decay, which would pull on a model that has found its scale.
    """
    fake_quantize(model, config, names)
    return Tuned(tuple(names), *train(model, batches, steps, lr=lr, precision=precision))


def train(
    model: nn.Module, batches: Iterable[dict[str, Tensor]], steps: int, *, lr: float, precision: str = "fp32"
) -> tuple[list[float], int]:
    """The loop: losses and the number of skipped steps."""
    model.train()
    bound = Precision(precision).prepare(model)
    options = OptimConfig(lr=lr, weight_decay=0.0)
    optimizer, schedule = build_optimizer(options, model), Schedule.of(options, steps)
    losses: list[Tensor] = []
    applied = 0
    for _, batch in zip(range(steps), batches, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = schedule.at(applied)
        with bound.forward():
            loss = model(**{name: tensor.to(bound.device) for name, tensor in batch.items()})
        bound.backward(loss)
        applied += bound.step(optimizer, clip=CLIP).read().applied
        optimizer.zero_grad()
        losses.append(loss.detach())
    model.eval()
    return torch.stack(losses).tolist(), len(losses) - applied


def _only(names: Collection[str]) -> Any:
    return lambda layer, name: name in names

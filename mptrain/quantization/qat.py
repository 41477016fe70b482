"""Quantization-aware fine-tuning: further steps with the weights rounded as they will be deployed.

torchao's QAT swaps layers for ones that round in the forward and let gradients pass unchanged, except to clipped
weights (Jacob et al. 2018). The swap is checked: a name that matches nothing would fine-tune in full precision,
and the loss would not show it. Afterwards the layers become plain again and the model is quantized and verified
like any other.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mptrain.optim import OptimConfig, Schedule, build_optimizer
from mptrain.precision import Precision
from mptrain.quantization.apply import selected
from mptrain.quantization.methods import Method, named
from mptrain.tools.quiet import quiet_import
from mptrain.tools.settings import require

CLIP = 1.0  # the trainer's default
RATE = 3e-4


@dataclass(frozen=True)
class Tuned:
    """The course of fine-tuning: ``losses`` (nats) of its steps, with rounded weights; how many were ``skipped``."""

    layers: tuple[str, ...]
    losses: list[float]
    skipped: int


def finetune(
    model: nn.Module,
    method: str | Method,
    batches: Iterable[dict[str, Tensor]],
    steps: int,
    *,
    group_size: int | None = None,
    keep: str = "",
    lr: float = RATE,
    precision: str = "fp32",
) -> Tuned:
    """Train ``model``, trained already, for ``steps`` more on ``batches``, rounded as ``quantize_model`` will round it.

    The result is in FP32 with plain layers, in eval mode. ``group_size``, ``keep``: as for ``quantize_model``.
    ValueError if no layer would be quantized, or torchao does not support such training.
    """
    require(steps > 0, "--finetune", steps, "at least 1 step, e.g. 100")
    require(lr > 0, "--finetune-lr", lr, f"above 0, e.g. {RATE}")
    method = named(method) if isinstance(method, str) else method
    if method.cast or method.calibrated:
        raise ValueError(f"--finetune has nothing to round for {method.name}: use --to int4, int4-dynamic or int2")
    size = method.group(group_size)
    names = tuple(selected(model, method, size, keep)[0])
    if not names:
        raise ValueError(f"{method.name} would quantize no layer: try a smaller --group-size, or less in --keep")
    fake_quantize(model, method.config(size), names)
    losses, skipped = train(model, batches, steps, lr=lr, precision=precision)
    plain_again(model, names)
    return Tuned(names, losses, skipped)


def fake_quantize(model: nn.Module, config: Any, names: Collection[str]) -> None:
    """Swap the layers ``names`` for ones that compute as torchao's ``config`` will have them, on FP32 parameters.

    ValueError if torchao does not support such training for the config.
    """
    with quiet_import():
        from torchao.quantization import quantize_
        from torchao.quantization.qat import FakeQuantizedLinear, QATConfig

    before = {name: model.get_submodule(name) for name in names}
    try:
        with quiet_import():  # the first use imports more
            quantize_(model, QATConfig(config, step="prepare"), _only(names))
    except (ValueError, AssertionError) as error:
        raise ValueError(
            f"torchao cannot fine-tune for {type(config).__name__}: use --to int4, int4-dynamic or int2"
        ) from error
    for name, old in before.items():
        new = model.get_submodule(name)
        assert isinstance(new, FakeQuantizedLinear), f"{name} does not round its weight: it is {type(new).__name__}"
        assert new.weight_fake_quantizer is not None, f"{name} does not round its weight"
        assert new.weight is old.weight, f"{name}: the weight was copied"
        new.train(old.training)


def plain_again(model: nn.Module, names: Collection[str]) -> None:
    """Undo :func:`fake_quantize`; the parameters stay those that were trained."""
    with quiet_import():
        from torchao.quantization import quantize_
        from torchao.quantization.qat import QATConfig

    trained = {name: model.get_submodule(name).weight for name in names}
    quantize_(model, QATConfig(step="convert"), _only(names))
    for name, weight in trained.items():
        layer = model.get_submodule(name)
        assert type(layer) is nn.Linear, f"{name} is still {type(layer).__name__}"
        assert layer.weight is weight, f"{name}: the trained weight was lost"


def train(
    model: nn.Module, batches: Iterable[dict[str, Tensor]], steps: int, *, lr: float, precision: str = "fp32"
) -> tuple[list[float], int]:
    """Run the training loop; return losses and the number of skipped steps."""
    model.train()
    bound = Precision(precision).prepare(model)
    options = OptimConfig(lr=lr, weight_decay=0.0, min_lr_frac=0.0)  # late steps would hop between codes
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

"""A model of two layers and a loop by hand."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mptrain import Precision, PrecisionPolicy
from mptrain.distributed import ALONE, Ranks
from mptrain.precision.policy import conf_dir

NAMES = sorted(path.stem for path in (conf_dir() / "precision").glob("*.yaml"))
OPTIMIZERS = {
    "adamw": lambda parameters, fused: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1, fused=fused),
    "sgd": lambda parameters, fused: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, fused=fused),
}


def toy(seed: int = 0, width: int = 32, out: int = 16) -> nn.Sequential:
    """Three layers that FP8 GEMMs take; without biases, whose gradients are not quantized and would show an Inf."""
    torch.manual_seed(seed)
    first, second = (nn.Linear(width, width, bias=False) for _ in range(2))
    return nn.Sequential(first, nn.Tanh(), second, nn.Linear(width, out, bias=False))


class Loop:
    """A toy model in a precision with an optimizer. ``policy``: a name or a policy."""

    def __init__(
        self, policy: str | PrecisionPolicy, optimizer: str = "adamw", *, fused: bool = True, ranks: Ranks = ALONE
    ) -> None:
        self.precision = Precision(policy, ranks=ranks)
        multiple = self.precision.policy.quantization.multiple
        self.width, self.out = max(32, multiple), multiple
        self.model = toy(width=self.width, out=self.out)
        self.precision.prepare(self.model)
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters(), fused)

    def gradients(self, index: int, *, x: Tensor | None = None, hook: Callable[[Tensor], Tensor] | None = None) -> None:
        """Forward and backward of batch ``index`` (or of ``x``); ``hook`` changes the gradient of the output."""
        generator = torch.Generator().manual_seed(index)
        drawn = torch.randn(16, self.width, generator=generator)
        cotangent = torch.randn(16, self.out, generator=generator)
        with self.precision.forward():
            y = self.model(drawn if x is None else x)
            if hook is not None:
                y.register_hook(hook)
            loss = (y.float() * cotangent).mean()
        self.precision.backward(loss)

    def step(self, index: int, clip: float = 0.0):
        self.gradients(index)
        outcome = self.precision.step(self.optimizer, clip=clip)
        self.optimizer.zero_grad()
        return outcome.read()

    def everything(self) -> dict[str, Tensor]:
        """Weights and optimizer state, as they are now."""
        state = {name: value.clone() for name, value in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            moments = self.optimizer.state.get(parameter, {})
            state |= {f"{name}/{key}": value.clone() for key, value in moments.items()}
        return state


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name

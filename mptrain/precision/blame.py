"""Why a step was skipped: the first Inf or NaN among operands, losses and gradients, and where it stands.

What is needed is gathered at the step and explained when somebody reads the outcome; the gradients may be gone by then.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from mptrain.distributed import Ranks
from mptrain.precision.counters import Counters
from mptrain.precision.outcome import Blame
from mptrain.tools.modules import parameter_names

MOST_LOSSES = 1024  # of the micro-batches of one step, kept to tell a bad forward from a bad backward


class Names:
    """Names of parameters, as blame tells them: those of the model, and of what an optimizer holds besides."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.bind()

    def bind(self) -> None:
        """Know the parameters as they are now: sharding and adapters put others in their place."""
        self._of: dict[nn.Parameter, str] = parameter_names(self._model)
        self.parameters, self.known = list(self._of), list(self._of.values())
        linear = (name for name, module in self._model.named_modules() if isinstance(module, nn.Linear))
        self.multiplied = {f"{name}.weight" for name in linear}  # these stand in the order of their products

    def any_gradient(self) -> bool:
        """Tell whether a parameter of the model holds a gradient."""
        if any(p.grad is not None for p in self.parameters):
            return True
        self.bind()  # sharding may have put others in their place
        return any(p.grad is not None for p in self.parameters)

    def __call__(self, parameters: list[nn.Parameter]) -> list[str]:
        """The name of each, ``parameter of SHAPE outside the model`` for those that the model does not have."""
        if any(parameter not in self._of for parameter in parameters):
            self.bind()
        outside = "parameter {} outside the model"
        return [self._of.get(p) or outside.format(list(p.shape)) for p in parameters]

    def place(self, name: str) -> int:
        """Where a parameter, or the first one of ``group.*``, stands in the model; what is left over comes first."""
        group = name.removesuffix("*")
        return next((n for n, known in enumerate(self.known) if group and known.startswith(group)), -1)


Losses = deque[tuple[int, Tensor]]  # (micro-batch from 0, its loss) of a step, at most MOST_LOSSES


def all_bad(losses: Losses) -> Tensor | None:
    """Tell whether every loss is Inf or NaN: bool 0-dim, or None for no.

    A batch without a target has a NaN loss and gradients of zero.
    """
    if not losses:
        return None
    last = losses[-1][1]
    if not last.is_cpu:
        return torch.stack([loss.float().sum() for _, loss in losses]).isfinite().any().logical_not()
    if isinstance(last, FakeTensor) or math.isfinite(last.item()):
        return None
    return None if any(bool(loss.isfinite().all()) for _, loss in losses) else torch.tensor(True)


def first_bad(losses: Losses) -> tuple[int, str] | None:
    """Find the micro-batch (from 0) of the first non-finite loss, and which kind it is."""
    for micro, loss in losses:
        if not bool(loss.isfinite().all()):
            return micro, "NaN" if bool(loss.isnan().any()) else "Inf"
    return None


@dataclass
class Evidence:
    """Keep what one step saw.

    ``norms``: FP32 [parameters], of what this rank holds of their gradients; ``fault``: int32 [rows] of
    :class:`Counters`; ``unreduced``: norms of this rank's part, noted before ranks were summed.
    """

    parameters: list[nn.Parameter]
    norms: Tensor
    fault: Tensor
    losses: Losses
    unreduced: dict[str, Tensor]

    def separate(self, gradients: list[Tensor]) -> Evidence:
        """A norm can overflow FP32 where every element is finite: such are told from Inf in the gradient."""
        truly = torch.tensor([not bool(grad.isfinite().all()) for grad in gradients])
        finite = self.norms.nan_to_num(posinf=torch.finfo(self.norms.dtype).max)
        return replace(self, norms=torch.where(truly, self.norms, finite))


def nothing() -> Blame:
    """Explain a step that was applied."""
    return Blame("")


def explanation(evidence: Evidence, names: Names, counters: Counters, ranks: Ranks) -> Callable[[], Blame]:
    """Prepare what explains a skip when its outcome is read. On several ranks a collective: the earliest of all."""

    def explain() -> Blame:
        own = _of_rank(evidence, names, counters, ranks.rank)
        blames = [one for one in ranks.gather(own) if one.kind] or [own]
        return min(blames, key=lambda one: (one.micro_batch if one.micro_batch >= 0 else math.inf, one.rank))

    return explain


def _of_rank(evidence: Evidence, names: Names, counters: Counters, rank: int) -> Blame:
    """A row that was watched first, for it explains the loss; then the loss, for it explains the gradients."""
    first = counters.first_fault(evidence.fault)
    if first is not None:
        return Blame(f"{first}", first.layer, first.role, first.kind, first.phase, first.micro_batch, rank)
    bad_loss = first_bad(evidence.losses)
    if bad_loss is not None:
        micro, kind = bad_loss
        empty = kind == "NaN" and not bool(evidence.norms.any())
        why = ", and no gradient: is every target ignored (-100)?" if empty else ""
        return Blame(f"{kind} loss of micro-batch {micro}{why}", "", "loss", kind, "forward", micro, rank)
    if evidence.unreduced:
        told = sorted(evidence.unreduced, key=names.place)
        return _of_gradients(told, torch.stack([evidence.unreduced[name] for name in told]), names, rank)
    return _of_gradients(names(evidence.parameters), evidence.norms, names, rank)


def _of_gradients(told: list[str], norms: Tensor, names: Names, rank: int) -> Blame:
    bad = (~norms.isfinite()).nonzero().flatten().tolist()
    if not bad and torch.linalg.vector_norm(norms).isfinite():
        return Blame("another rank found Inf or NaN", rank=rank)
    if not bad:
        return Blame("the norm of all gradients overflows FP32, though each element is finite", rank=rank)
    place = ([index for index in bad if told[index] in names.multiplied] or bad)[-1]  # backward comes from the end
    layer, _, leaf = told[place].rpartition(".")
    kind = "NaN" if norms[place].isnan() else "Inf"
    more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
    what = "gradients" if leaf == "*" else f"gradient of {leaf}"  # FSDP reduces those of a block together
    return Blame(f"{kind} in the {what}{more}", layer, "grad_weight", kind, "backward", -1, rank)

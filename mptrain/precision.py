"""Precision: a policy bound to a live model. Six verbs, the same for every format.

    precision = Precision("fp8").prepare(model)           # swap layers, choose a backend, check the masters
    with precision.forward(): loss = model(x)             # casts and quantization, this micro-batch
    precision.backward(loss)                              # scaled loss, outside the casts
    outcome = precision.step(optimizer, clip=1.0)         # found_inf -> agree -> clip -> step or skip -> scale
    with precision.evaluating(): ...                      # nothing counted, nothing staged
    precision.recompute(block, x)                         # activation checkpointing inside the right casts

The order inside ``step`` is fixed: found_inf is read before clipping, because clipping an Inf gradient leaves
{nan, 0} and hides it (measured); it is checked in every precision, because BF16 and FP8 runs overflow too.
Found are Inf and NaN in any gradient (by its norm, so a finite gradient whose sum of squares leaves FP32 counts as
well) and non-finite operands of quantized GEMMs, which an E4M3 cast would hide by saturating Inf to 448.

On several ranks one sum decides for all: the squares of what each holds of the gradients (Inf and NaN survive addition,
whatever mesh a gradient is sharded over), the ranks that found something, the ranks that were asked to stop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from mptrain.backends.base import Backend, resolve
from mptrain.convert import ConversionReport, parameter_names
from mptrain.distributed import ALONE, Ranks, local
from mptrain.kernels.counters import Counters
from mptrain.outcome import Blame, StepOutcome
from mptrain.policy import PrecisionPolicy
from mptrain.scaling import LossScaler

State = dict[str, dict[str, Tensor]]
_PREPARED: WeakSet[nn.Module] = WeakSet()


class Precision:
    """``policy``: a :class:`PrecisionPolicy`, a name from conf/precision, or the path of a recipe YAML.

    ``ranks``: the processes that train this model together, :class:`mptrain.distributed.World`; one alone by default.
    ValueError if the policy is unknown or its backend is missing here.
    """

    backend: Backend
    report: ConversionReport

    def __init__(self, policy: PrecisionPolicy | str | Path = "fp32", *, ranks: Ranks = ALONE) -> None:
        self.policy = policy if isinstance(policy, PrecisionPolicy) else PrecisionPolicy.named(policy)
        self.counters = Counters()
        self.ranks = ranks
        self.unreduced: dict[str, Tensor] = {}  # name -> norm of this rank's part, noted before ranks were summed
        self._names: list[str] = []
        self._parameters: list[nn.Parameter] = []
        self._multiplied: set[str] = set()
        self._counted: Tensor | None = None
        self._losses: list[Tensor] = []  # of this step's micro-batches: a bad one tells forward from backward

    def prepare(self, model: nn.Module, device: torch.device | None = None) -> Precision:
        """Convert ``model`` in place and bind to it. Its parameters must be FP32: they are the master weights.

        ``device``: where it will run, if it is on meta as yet. Wrap it for several processes (DDP, ``fully_shard``)
        afterwards.
        """
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError("the model has no parameter that requires a gradient")
        if model in _PREPARED:
            raise ValueError("the model is prepared already, and its layers are swapped: build it anew for this policy")
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point() and parameter.dtype != torch.float32:
                raise ValueError(
                    f"{name} is {parameter.dtype}: parameters are the FP32 master weights, call model.float() first"
                )
        self.device = device or next(p.device for p in model.parameters() if p.requires_grad)
        self.backend = resolve(self.policy, self.device)(self.policy, self.device, self.ranks.max)
        self.report = self.backend.convert(model, self.counters)
        self._model = model
        self._bind()
        self.counters.decisive = len(self.counters.slots)
        self.counters.order = {name: place for place, (name, _) in enumerate(model.named_modules())}
        self.scaler = LossScaler(self.policy.loss_scale, self.device)
        _PREPARED.add(model)
        return self

    def _bind(self) -> None:
        """Know the parameters as they are now: sharding puts others in their place."""
        trained = parameter_names(self._model)
        self._names, self._parameters = list(trained.values()), list(trained)
        linear = (name for name, module in self._model.named_modules() if isinstance(module, nn.Linear))
        self._multiplied = {f"{name}.weight" for name in linear}  # these stand in the order of their products
        sharded = any(local(p) is not p for p in self._parameters)
        counted = [self.ranks.counts(p) for p in self._parameters]
        self._counted = torch.tensor(counted, device=self.device) if sharded else None

    def forward(self) -> AbstractContextManager[object]:
        """The context of one micro-batch's forward. Call backward outside it."""
        return self.backend.forward(policy_on=True)

    def backward(self, loss: Tensor) -> None:
        """Backward of the scaled loss; the gradients add up, scaled, in FP32."""
        self._losses.append(loss.detach())
        with self.backend.backward():
            self.scaler.scaled(loss).backward()  # type: ignore[no-untyped-call]
        self.counters.end_microbatch()

    def step(self, optimizer: Optimizer, clip: float = 0.0, *, stop: bool = False) -> StepOutcome:
        """One optimizer step on the accumulated gradients, or none if any rank found Inf or NaN.

        ``clip``: the largest global gradient norm, 0 for no clipping. A fused optimizer (``fused=True``) gets scale
        and clip factor as one divisor and found_inf as tensors: no pass of its own, no read by the host. Any other
        optimizer costs one read a step and one pass over the gradients. ``stop``: this rank was asked to; all of them
        read so in the outcome.
        """
        gradients = self._gradients()
        norms = torch.stack(torch._foreach_norm([grad for _, grad in gradients.values()], dtype=torch.float32))
        scale = self.scaler.scale
        fault = self.counters.end_step()
        own = fault[: self.counters.decisive].any() if self.counters.decisive else None
        norm, found_inf, stops = self._agreed(norms, list(gradients), own, stop)
        # A CPU reads for nothing, and a found_inf tensor costs AdamW one subtraction per parameter.
        skips = bool(found_inf.item()) if found_inf.device.type == "cpu" else None
        blame = self._witness(list(gradients.values()), norms, fault, skips)
        divisor = scale if self.scaler.active else None
        if self.scaler.active:
            norm = norm / scale
        if clip > 0:
            factor = (norm / clip).clamp_(min=1.0)
            divisor = factor if divisor is None else divisor * factor
        self._update(optimizer, divisor, found_inf, skips)
        event = self.scaler.update(found_inf)
        values = [found_inf.float(), norm, scale, event.float(), self.scaler.scale]
        return StepOutcome(torch.stack(values if stops is None else [*values, stops]), blame)

    def _gradients(self) -> dict[int, tuple[str, Tensor]]:
        """Index of the parameter -> (name, what this rank holds of its gradient)."""
        for _ in range(2):
            numbered = enumerate(zip(self._names, self._parameters, strict=True))
            found = {index: (name, local(p.grad)) for index, (name, p) in numbered if p.grad is not None}
            if found:
                return found
            self._bind()
        raise ValueError("no gradient to step on: call precision.backward(loss) first")

    def _agreed(
        self, norms: Tensor, indices: list[int], own: Tensor | None, stop: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The global gradient norm, found_inf, and how many ranks were asked to stop (None for one process)."""
        if self.ranks.size == 1:
            norm = torch.linalg.vector_norm(norms)
            found_inf = (norm - norm).ne(0)  # NaN for Inf and NaN: two kernels where isfinite takes four
            return norm, found_inf if own is None else found_inf | own, None
        asked = torch.tensor(float(stop), dtype=torch.float64).to(norms.device, non_blocking=True)
        squares = norms.double().square()  # in FP64 no square of a finite norm overflows
        if self._counted is not None:  # each element once, however many ranks hold it
            every = len(indices) == len(self._counted)  # the usual case, without a copy of indices to the device
            squares = squares.where(self._counted if every else self._counted[indices], 0.0)
        total = squares.sum()
        found = ~total.isfinite() if own is None else ~total.isfinite() | own
        told = self.ranks.sum(torch.stack([total, found.double(), asked]))
        norm = torch.linalg.vector_norm(norms) if self._counted is None else told[0].sqrt().float()
        return norm, (told[1] > 0) | (norm - norm).ne(0), told[2].float()

    def _update(self, optimizer: Optimizer, divisor: Tensor | None, found_inf: Tensor, skips: bool | None) -> None:
        """Step or skip. ``skips``: what ``found_inf`` says, None if nobody has read it yet."""
        fused = getattr(optimizer, "_step_supports_amp_scaling", False)  # set by torch on fused optimizers
        # Before the first step no kernel may be told to skip: fused SGD would leave momentum in memory nobody wrote.
        if skips is None and (not fused or not optimizer.state):
            skips = bool(found_inf.item())
        if skips:
            return
        if fused:
            optimizer.grad_scale = divisor  # type: ignore[attr-defined]
            optimizer.found_inf = found_inf.float() if skips is None else None  # type: ignore[attr-defined]
            optimizer.step()
            optimizer.grad_scale = optimizer.found_inf = None  # type: ignore[attr-defined]
        else:
            if divisor is not None:
                torch._foreach_div_([local(p.grad) for p in self._parameters if p.grad is not None], divisor)
            optimizer.step()

    def _witness(
        self, named: list[tuple[str, Tensor]], norms: Tensor, fault: Tensor, skips: bool | None
    ) -> Callable[[], Blame]:
        """What a skip will be explained with when the outcome is read; the gradients may be gone by then."""
        losses, self._losses = self._losses, []
        unreduced = dict(self.unreduced)
        self.unreduced.clear()
        if skips is False:
            return lambda: Blame("")
        if unreduced:
            return lambda: self._first(self._blame_unreduced(unreduced, fault, losses))
        if skips:  # a norm can overflow FP32 where every element is finite: those are no Inf in the gradient
            truly = torch.tensor([not bool(grad.isfinite().all()) for _, grad in named])
            norms = torch.where(truly, norms, norms.nan_to_num(posinf=torch.finfo(norms.dtype).max))
        names = [name for name, _ in named]
        return lambda: self._first(self._blame(names, norms, fault, losses))

    def _blame_unreduced(self, unreduced: dict[str, Tensor], fault: Tensor, losses: list[Tensor]) -> Blame:
        names = sorted(unreduced, key=self._place)
        return self._blame(names, torch.stack([unreduced[name] for name in names]), fault, losses)

    def _place(self, name: str) -> int:
        """Where a parameter, or the first one of ``group.*``, stands in the model; what is left over comes first."""
        group = name.removesuffix("*")
        return next((n for n, known in enumerate(self._names) if group and known.startswith(group)), -1)

    def _first(self, blame: Blame) -> Blame:
        """Of what each rank found, the earliest: by micro-batch, then by rank. A collective."""
        found = [one for one in self.ranks.gather(blame) if one.kind] or [blame]
        return min(found, key=lambda one: (one.micro_batch if one.micro_batch >= 0 else math.inf, one.rank))

    def _blame(self, names: list[str], norms: Tensor, fault: Tensor, losses: list[Tensor]) -> Blame:
        """A row that was watched first, for it explains the loss; then the loss, for it explains the gradients."""
        first = self.counters.first_fault(fault)
        if first is not None:
            where = first.layer, first.role, first.kind, first.phase, first.micro_batch
            return Blame(f"{first}", *where, self.ranks.rank)
        bad = (~norms.isfinite()).nonzero().flatten().tolist()
        for micro, loss in enumerate(losses):
            if not loss.isfinite():
                kind = "NaN" if loss.isnan() else "Inf"
                return Blame(f"{kind} loss of micro-batch {micro}", "", "loss", kind, "forward", micro, self.ranks.rank)
        if not bad and torch.linalg.vector_norm(norms).isfinite():
            return Blame("another rank found Inf or NaN", rank=self.ranks.rank)
        if not bad:
            return Blame(
                "the norm of all gradients overflows FP32, though each element is finite", rank=self.ranks.rank
            )
        place = ([index for index in bad if names[index] in self._multiplied] or bad)[-1]  # backward comes from the end
        layer, _, leaf = names[place].rpartition(".")
        kind = "NaN" if norms[place].isnan() else "Inf"
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        what = "gradients" if leaf == "*" else f"gradient of {leaf}"  # FSDP reduces those of a block together
        return Blame(f"{kind} in the {what}{more}", layer, "grad_weight", kind, "backward", -1, self.ranks.rank)

    @contextmanager
    def evaluating(self, *, policy_on: bool = True) -> Iterator[None]:
        """No gradients, no counting, no staged amaxes. ``policy_on=False`` evaluates the FP32 masters themselves."""
        was = self.counters.quiet
        self.counters.quiet = True
        try:
            with torch.no_grad(), self.backend.forward(policy_on=policy_on):
                yield
        finally:
            self.counters.quiet = was

    def recompute(self, fn: Callable[..., Any], *args: Any) -> Any:
        """``fn(*args)`` without keeping its activations: backward runs it again, with the same casts and scales."""

        def contexts() -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
            return nullcontext(), self.backend.replay()

        return checkpoint(fn, *args, use_reentrant=False, context_fn=contexts)

    def state_dict(self) -> State:
        """Loss scaler and FP8 scales, as plain tensors. Take it between steps."""
        return {"scaler": self.scaler.state_dict(), "fp8": self.backend.state_dict()}

    def load_state_dict(self, state: State) -> None:
        """Continue a run of this policy or another: what has no meaning here is ignored, what is missing starts."""
        self.scaler.load_state_dict(state.get("scaler", {}))
        self.backend.load_state_dict(state.get("fp8", {}))

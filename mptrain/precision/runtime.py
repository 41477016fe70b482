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
well), non-finite operands of quantized GEMMs, which an E4M3 cast would hide by saturating Inf to 448, and a step
without a finite loss (every target ignored: gradients are zeros, and decay would move the weights).

Steps between one backward and the next are a round: each optimizer steps, or skips, on the gradients of its own
parameters, operands that were not finite skip all of them, and the loss scale moves once.

On several ranks one sum decides for all: the squares of what each holds of the gradients (Inf and NaN survive addition,
whatever mesh a gradient is sharded over), the ranks that found something, the ranks that were asked to stop.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from mptrain.distributed import Ranks, may_join
from mptrain.precision import gradients
from mptrain.precision.agreement import Agreement
from mptrain.precision.backends import Backend, resolve
from mptrain.precision.blame import MOST_LOSSES, Evidence, Losses, Names, all_bad, explanation, nothing
from mptrain.precision.convert import ConversionReport
from mptrain.precision.counters import Counters
from mptrain.precision.outcome import Blame, StepOutcome
from mptrain.precision.policy import PrecisionPolicy
from mptrain.precision.regions import Fence, fence_of
from mptrain.precision.scaling import LossScaler
from mptrain.precision.verified import Unseen, is_converted, reported, require_masters

State = dict[str, dict[str, Tensor]]


class Precision:
    """``policy``: a :class:`PrecisionPolicy`, a name from conf/precision, or the path of a recipe YAML.

    ``ranks``: the processes that train this model together, :class:`mptrain.World`, or :data:`mptrain.ALONE`; left out,
    one process is alone, and the first forward tells whether the model is in DDP or sharded.
    ValueError if the policy is unknown or its backend is missing here.
    """

    backend: Backend
    report: ConversionReport
    scaler: LossScaler
    device: torch.device

    def __init__(self, policy: PrecisionPolicy | str | Path = "fp32", *, ranks: Ranks | None = None) -> None:
        self.policy = policy if isinstance(policy, PrecisionPolicy) else PrecisionPolicy.named(policy)
        self.counters = Counters()
        self._agreement = Agreement(ranks)
        self.unreduced: dict[str, Tensor] = {}  # name -> norm of this rank's part, noted before ranks were summed
        self._optimizers: dict[int, weakref.ref[Any]] = {}
        self._admitted: tuple[Any, ...] = ()
        self._sharded = False
        self._carried = gradients.Carried()
        self._losses: Losses = deque(maxlen=MOST_LOSSES)
        self._fault: Tensor | None = None  # of the round's operands, once its first step has ended it
        self._found: Tensor | None = None  # by the round's steps so far
        self._due = False  # a backward ran, and no step since
        self._running = False  # in a backward of ours
        self._foreign = False  # a gradient came from another backward

    def __getattr__(self, name: str) -> Any:
        """Only reached by what ``prepare`` sets."""
        if name in ("backend", "report", "scaler", "device", "_names"):
            raise RuntimeError("this Precision has no model yet: call precision.prepare(model) first")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def ranks(self) -> Ranks:
        """The processes that train this model together, as far as they are known."""
        return self._agreement.ranks

    def __deepcopy__(self, memo: Any) -> Precision:
        return self  # a copy of the model stays with it

    def __reduce__(self) -> Any:
        raise TypeError("a Precision is bound to a live model and cannot be pickled: save its state_dict()")

    def prepare(self, model: nn.Module, device: torch.device | None = None) -> Precision:
        """Convert ``model`` in place and bind to it. Its trained parameters must be FP32: they are the master weights.

        ``device``: where it will run, if it is on meta as yet. Wrap it for several processes (DDP, ``fully_shard``)
        afterwards. ValueError if the model or this Precision is prepared already, or has nothing to train.
        """
        if "backend" in self.__dict__:
            raise ValueError("this Precision is bound to a model already: make another one for another model")
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError("the model has no parameter that requires a gradient")
        require_masters(model, self.policy)
        for name, module in model.named_modules():
            fence = fence_of(module)
            if fence is not None and (is_converted(module) or not fence.leave(module)):
                what = f"{name} is" if name else "the model is"
                raise ValueError(
                    f"{what} prepared already, or a copy whose layers are converted: build a new one for it, or "
                    "copy it before it is prepared"
                )
        self.device = device or next(p.device for p in model.parameters() if p.requires_grad)
        self._device_type = self.device.type  # reading it takes 0.2 us
        self.backend = resolve(self.policy, self.device)(self.policy, self.device, self._agreement.max)
        self.report = reported(model, self.backend.convert(model, self.counters), quantized=self.policy.quantized)
        self._unseen = Unseen(model, self.report)
        self._names = Names(model)
        self.counters.decisive = len(self.counters.slots)
        self.counters.order = {name: place for place, (name, _) in enumerate(model.named_modules())}
        self.scaler = LossScaler(self.policy.loss_scale, self.device)
        on_call = None if self._agreement.known or not may_join() else self._agreement.find
        Fence(self.counters, self.backend.casts, on_call).around(model)
        self._watch_for_other_backwards(model)
        return self

    def forward(self) -> AbstractContextManager[object]:
        """The context of one micro-batch's forward. Call backward outside it."""
        if self._due and not self._names.any_gradient():  # thrown away, and what was seen of that batch with it
            self.counters.end_step()
            self._due = False
        return self.backend.forward(policy_on=True)

    def backward(
        self,
        loss: Tensor,
        *,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        inputs: Sequence[Tensor] | None = None,
    ) -> None:
        """Backward of the scaled loss; the gradients add up, scaled, in FP32. The options are ``Tensor.backward``'s."""
        scaler, fresh = self.scaler, not self._due
        if fresh:
            self._begin_round()
        if scaler.active and (fresh or self._carried.scale is not scaler.scale):
            self._carried.begin(scaler.scale, self._seen, sharded=self._sharded)
        self._losses.append((self.counters.micro, loss.detach()))
        self._running = True
        try:
            with self.backend.backward():
                scaler.scaled(loss).backward(  # type: ignore[no-untyped-call]
                    retain_graph=retain_graph, create_graph=create_graph, inputs=inputs
                )
        finally:
            self._running = False
        self.counters.end_microbatch()
        self._due = True

    def step(self, *optimizers: Optimizer, clip: float = 0.0, stop: bool = False) -> StepOutcome:
        """One step of each optimizer on its own gradients; none where any rank found Inf or NaN in them.

        ``clip``: the largest norm of all these gradients together, 0 for no clipping. A fused optimizer gets scale and
        clip factor as one divisor and found_inf as tensors: no pass of its own, no read by the host. Any other one
        costs one read a step and one pass over the gradients. ``stop``: this rank was asked to; all read so in the
        outcome, which is ``applied`` if every optimizer stepped.
        """
        scaler = self.scaler
        if optimizers != self._admitted or not optimizers:
            self._admit(optimizers)
        if type(clip) is not float or not clip >= 0:
            clip = gradients.valid_clip(clip)
        each = gradients.with_gradient(optimizers)
        parameters = each[0] if len(each) == 1 else [p for those in each for p in those]
        if not parameters or self._foreign or not self._due:
            self._require_gradients(parameters)
        if self._unseen.layers:
            self._unseen.check(self.policy)
        sharded = self._sharded
        scale = scaler.scale if self._carried.scale is None else self._carried.scale
        scaled = scaler.active and not self._carried.knows(parameters)
        if scaler.active and not scaled:
            self._carried.unscale(parameters, sharded=sharded)
        held, norms = gradients.measured(parameters, sharded=sharded)
        if self._fault is None:
            self._fault = self.counters.end_step()
        own = self._fault[: self.counters.decisive].any() if self.counters.decisive else None
        sizes = [len(those) for those in each]
        lost = all_bad(self._losses)
        (norm, healthy, found_inf), bad, stops = self._agreement.reached(norms, sizes, parameters, own, lost, stop)
        skips = [bool(one) if one.is_cpu else None for one in bad]  # a CPU reads for nothing
        blame = nothing if skips.count(False) == len(skips) else self._witness(parameters, held, norms, skips)
        self.unreduced.clear()
        divisor = scale if scaled else None
        if scaled:
            alike, norm = healthy is norm, norm / scale
            healthy = norm if alike else healthy / scale
        if clip > 0:
            excess = gradients.excess(healthy, clip)
            if excess is not None:
                divisor = excess if divisor is None else divisor * excess
        for optimizer, those, one, skip in zip(optimizers, each, bad, skips, strict=True):
            skipped = self._update(optimizer, those, divisor, one, skip)
            if scaled:
                self._carried.note(those, one, skipped)
        again = self._found is not None
        self._found = found_inf if self._found is None else self._found | found_inf
        event = scaler.update(self._found, again=again)
        self._due = False
        if torch.is_autocast_enabled(self._device_type):
            torch.clear_autocast_cache()  # a step inside forward(): the casts of the weights before it are stale
        values = [found_inf, norm, scale, event, scaler.scale]
        return StepOutcome(values if stops is None else [*values, stops], blame)

    def _begin_round(self) -> None:
        """Before the first backward after a step."""
        self._fault = self._found = None
        self._losses.clear()
        if self._foreign and all(p.grad is None or not p.grad.any() for p in self._seen()):
            self._foreign = False  # what the other backward left was thrown away

    def _seen(self) -> list[nn.Parameter]:
        """The parameters of the model and of every optimizer that stepped."""
        alive = [optimizer for ref in self._optimizers.values() if (optimizer := ref()) is not None]
        others = [p for optimizer in alive for p in gradients.parameters_of(optimizer)]
        return list(dict.fromkeys([*self._names.parameters, *others]))

    def _admit(self, optimizers: tuple[Any, ...]) -> None:
        """Look at optimizers that the step before did not have."""
        if not optimizers:
            raise TypeError("step takes an optimizer: precision.step(optimizer, clip=1.0)")
        for optimizer in optimizers:
            gradients.admit(optimizer)
        parameters = [p for optimizer in optimizers for p in gradients.parameters_of(optimizer)]
        if len(optimizers) > 1 and len(set(parameters)) < len(parameters):
            raise ValueError("a parameter is in two of these optimizers: call precision.step once for each")
        self._sharded = self._agreement.over(parameters)
        self._optimizers |= {id(optimizer): weakref.ref(optimizer) for optimizer in optimizers}
        self._admitted = optimizers

    def _watch_for_other_backwards(self, model: nn.Module) -> None:
        """Where a gradient must come from ``backward``, two parameters tell of one that does not."""
        self._must_be_ours = self.scaler.active or self.policy.quantized or self.backend.emulated
        this = weakref.ref(self)

        def tell(_: Tensor) -> None:
            precision = this()
            if precision is not None and not precision._running:
                precision._foreign = True

        trained = [p for p in model.parameters() if p.requires_grad]
        for parameter in {trained[0], trained[-1]} if self._must_be_ours else ():
            parameter.register_post_accumulate_grad_hook(tell)  # type: ignore[no-untyped-call]

    def _require_gradients(self, parameters: list[nn.Parameter]) -> None:
        if not parameters:
            raise ValueError("no gradient to step on: call precision.backward(loss) first")
        if self._must_be_ours and (self._foreign or (not self._due and self._fault is None)):
            self._foreign = self._due = False
            raise ValueError(
                f"gradients come from loss.backward(): precision={self.policy.name} needs precision.backward(loss), "
                "which scales the loss and closes the books of the micro-batch; call zero_grad() before going on"
            )

    def _update(
        self,
        optimizer: Any,
        parameters: list[nn.Parameter],
        divisor: Tensor | None,
        found_inf: Tensor,
        skips: bool | None,
    ) -> bool | None:
        """Step or skip. ``skips``: what ``found_inf`` says, None if nobody has read it yet; returned if read."""
        fused = getattr(optimizer, "_step_supports_amp_scaling", False)  # set by torch on fused optimizers
        # Before the first step no kernel may be told to skip: fused SGD would leave momentum in memory nobody wrote.
        if skips is None and (not fused or not optimizer.state):
            skips = bool(found_inf.item())
        if skips:
            return True
        if fused:
            optimizer.grad_scale = divisor
            optimizer.found_inf = found_inf.float() if skips is None else None
            optimizer.step()
            optimizer.grad_scale = optimizer.found_inf = None
        else:
            if divisor is not None:
                gradients.divide(gradients.held(parameters, sharded=self._sharded), divisor)
            optimizer.step()
        return skips

    def _witness(
        self, parameters: list[nn.Parameter], held: list[Tensor], norms: Tensor, skips: list[bool | None]
    ) -> Callable[[], Blame]:
        """Gather what will explain a skip when the outcome is read."""
        assert self._fault is not None
        evidence = Evidence(parameters, norms, self._fault, self._losses.copy(), dict(self.unreduced))
        if any(skips):
            evidence = evidence.separate(held)
        return explanation(evidence, self._names, self.counters, self.ranks)

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

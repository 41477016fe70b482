"""A look at a sampled step: every tensor of every layer, through hooks that live no longer than the step.

Rows, by layer and role. Forward and backward: ``input``, ``weight``, ``output``, ``grad_output`` of every linear layer,
before the casts of its GEMMs; where a backend quantizes an operand itself, its own pass counts it. At the end of the
step, of every parameter: ``grad_weight`` (with the loss scale still in it), the moments ``exp_avg`` and ``exp_avg_sq``
and the ``update``, which is what AdamW asks for: it is computed from the moments, because an update that rounding lost
leaves no trace in the weights. Vectors of a module without a matrix (norms) share rows; a bias beside one has its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from mptrain import kernels
from mptrain.distributed import ALONE, Ranks, local
from mptrain.formats import Format
from mptrain.kernels.adamw import updates
from mptrain.precision.counters import OPERANDS, Counters
from mptrain.precision.policy import PrecisionPolicy
from mptrain.telemetry.stats import STATISTICS, Cast
from mptrain.tools.modules import parameter_names

PARAMETER_ROLES = ("weight", "grad_weight", "exp_avg", "exp_avg_sq", "update")
LOST = ("asked", "bf16", "fp32", "bf16_stochastic", "bf16_remainder")  # columns of Observer.lost


class Observer:
    """Adds its rows to ``counters`` (behind those of the backend) and fills them while attached.

    ``formats``: for each row the format its cast asks for, None where nothing is cast. ``lost``: float64 [rows, 5], see
    :data:`LOST`: coordinates that were asked to move and those that would not under each way to store weights.
    """

    def __init__(self, model: nn.Module, counters: Counters, policy: PrecisionPolicy, ranks: Ranks = ALONE) -> None:
        self._model, self._counters, self._ranks = model, counters, ranks
        self._sharded = any(hasattr(parameter, "placements") for parameter in model.parameters())
        self._handles: list[RemovableHandle] = []
        self._extra = [statistic for statistic in STATISTICS.values() if not statistic.fused]
        self.extra: dict[str, dict[int, Tensor]] = {}
        self.lost = torch.zeros(0, len(LOST), dtype=torch.float64)
        quantized = {layer for layer, _ in counters.slots}
        self.formats: list[Format | None] = [policy.quantization.format_of(role) for _, role in counters.slots]
        self._compute = None if policy.compute is Format.fp32 else policy.compute
        self._booked = len(counters.slots)
        self._one = torch.ones((), device=counters.device)
        self._layers: dict[str, dict[str, int]] = {}
        index = {slot: number for number, slot in enumerate(counters.slots)}
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) or name in quantized:
                booked = {role: index[name, role] for role in OPERANDS} if name in quantized else {}
                self._layers[name] = (booked or self._add(name, OPERANDS)) | self._add(name, ("output",))
        self._parameters = self._parameter_rows()
        counters.allocate(counters.device)

    def _add(self, layer: str, roles: tuple[str, ...]) -> dict[str, int]:
        self.formats += [self._compute if role in OPERANDS else None for role in roles]
        return self._counters.add(layer, roles)

    def _parameter_rows(self) -> list[tuple[nn.Parameter, dict[str, int]]]:
        """Each trained parameter with its rows; the parameters of one row share it."""
        slots: dict[str, dict[str, int]] = {}
        found = []
        for parameter, name in parameter_names(self._model).items():
            owner, _, _ = name.rpartition(".")
            beside = self._model.get_submodule(owner).parameters(recurse=False)
            row = name if parameter.ndim < 2 and any(p.ndim >= 2 for p in beside) else owner
            if row not in slots:
                layer = self._layers.get(row, {})
                slots[row] = {"weight": layer["weight"]} if layer else self._add(row, ("weight",))
                slots[row] |= self._add(row, PARAMETER_ROLES[1:])
            found.append((parameter, slots[row]))
        return found

    def attach(self) -> None:
        """Begin a sampled step."""
        self._counters.sample()
        self.extra = {statistic.name: {} for statistic in self._extra}
        self.lost = torch.zeros(len(self._counters.slots), len(LOST), dtype=torch.float64, device=self._counters.device)
        for name, rows in self._layers.items():
            layer = self._model.get_submodule(name)
            self._handles.append(layer.register_forward_hook(partial(self._look, rows=rows)))

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _look(self, layer: nn.Module, args: tuple[Any, ...], out: Tensor, *, rows: Mapping[str, int]) -> None:
        books = self._counters
        if books.quiet or books.replaying or books.bypassed:
            return
        self._see(args[0], rows["input"])
        if not books.micro and not self._sharded:  # those are seen in FP32, each rank its part
            self._see(layer.weight, rows["weight"])  # type: ignore[arg-type]
        self._see(out, rows["output"])
        if out.requires_grad:
            out.register_hook(partial(self._see, slot=rows["grad_output"]))  # type: ignore[no-untyped-call]

    def _see(self, x: Tensor, slot: int) -> None:
        """Add one tensor to its row. A hook of autograd too: it returns nothing, so gradients stay as they are."""
        if slot not in self._counters.muted:
            self._add_to(local(x.detach()), slot)

    def _add_to(self, x: Tensor, slot: int) -> None:
        if self._extra:
            self._measure(x, slot)
        if slot < self._booked:
            return
        books, fmt = self._counters, self.formats[slot]
        casts = fmt is not None and x.dtype is not fmt.value.dtype  # else it was rounded by the operation that made it
        wanted, partly = {"histogram": books.sums["histogram"][slot]}, {}
        if casts:
            wanted["counts"], partly["errors"] = books.sums["counts"][slot], books.sums["errors"][slot]
        if books.slots[slot][1] in OPERANDS:
            partly["blocks"] = books.sums["blocks"][slot]
        amax, part = torch.empty((), dtype=torch.float32, device=x.device), books.part_of(x)
        if part is x:
            wanted |= partly
        elif partly:
            kernels.observe(part, kernels.Statistics(**partly), fmt=fmt, scale=self._one)
        kernels.observe(x, kernels.Statistics(amax=amax, **wanted), fmt=fmt, scale=self._one)
        books.note(slot, amax)

    def _measure(self, x: Tensor, slot: int) -> None:
        """The statistics that the kernels do not know."""
        fmt = self.formats[slot]
        cast: Cast = None if fmt is None else (fmt, self._counters.scale[slot])
        for statistic in self._extra:
            states = self.extra[statistic.name]
            state = statistic.measure(x, cast)
            states[slot] = states[slot] + state if slot in states else state

    def see_gradients(self) -> None:
        """After the last micro-batch, before anything is unscaled or clipped."""
        for parameter, rows in self._parameters:
            if not self._ranks.counts(parameter):
                continue
            if self._sharded or not self._is_multiplied(rows["weight"]):
                self._add_to(local(parameter.detach()), rows["weight"])
            if parameter.grad is not None:
                self._add_to(local(parameter.grad), rows["grad_weight"])

    @torch.no_grad()
    def see_updates(self, optimizer: Optimizer) -> None:
        """After an applied step. Optimizers that keep no Adam moments leave these rows empty."""
        groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
        moments_of = getattr(optimizer, "moments", None)  # those that keep them in other ways than torch say so
        shards = getattr(optimizer, "shards", {})
        mine = [(shards.get(p, p), rows) for p, rows in self._parameters if self._ranks.counts(p)]
        states = [(parameter, rows, optimizer.state.get(parameter, {})) for parameter, rows in mine]
        states = [known for known in states if "step" in known[2] and (moments_of or "exp_avg" in known[2])]
        counted = torch.stack([torch.as_tensor(state["step"]) for *_, state in states]).tolist() if states else []
        for (parameter, rows, state), step in zip(states, counted, strict=True):
            first, second = moments_of(parameter) if moments_of else (state["exp_avg"], state["exp_avg_sq"])
            tables = [self._counters.sums["histogram"][rows[role]] for role in PARAMETER_ROLES[2:]]
            group = groups[parameter]
            lr, (beta1, beta2) = float(group["lr"]), group["betas"]
            updates(
                parameter.detach(),
                first,
                second,
                step_size=lr / (1 - beta1**step),
                correction=(1 - beta2**step) ** -0.5,
                eps=group["eps"],
                decay=lr * group["weight_decay"],
                lost=self.lost[rows["update"]],
                histograms=(tables[0], tables[1], tables[2]),
            )

    def _is_multiplied(self, slot: int) -> bool:
        """Weights of linear layers were seen in the forward; those of norms and embeddings are not yet."""
        return self._counters.slots[slot][0] in self._layers

"""The executed-precision audit: the policy is a claim, the record of what ran is the proof.

    with StepAudit(model, precision) as step:
        forward and backward of every micro-batch, as in training
    print(step.result.coverage, step.result.problems())

A dispatch mode sees every matrix product of forward, recomputation and backward. Each is attributed to its module: in a
forward by hooks that are gone afterwards, in backward by a tag on the autograd node under way. Nothing of it flows into
the training, whose bits stay the same; it costs one pass over every operand that an emulation carries in a wider type.

Not visible: products inside the operators of a foreign library (Transformer Engine). A converted layer without a
visible product is entered as *claimed*. Of fused attention the operands are seen, not what is between its two products.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from mptrain import kernels
from mptrain.formats import Format
from mptrain.precision.backends.emulated.gemm import BIAS_COLUMNS
from mptrain.precision.backends.emulated.products import is_attention, operands_of, unknown
from mptrain.precision.convert import ConversionReport
from mptrain.precision.policy import PrecisionPolicy
from mptrain.telemetry.coverage import ROLES, UNKNOWN, Audit, Row
from mptrain.telemetry.products import NAMES, Seen, flops_of, joined, look, look_inside

Key = tuple[str, str, str, tuple[str, ...], tuple[str, ...], tuple[str, ...], str]
TAG = "mptrain.layer"
See = Callable[[Any, tuple[Any, ...], dict[str, Any], Any, tuple[Any, ...] | None], None]


class Kernels(Protocol):
    """The part of a backend that the audit reads."""

    name: str
    emulated: bool


class Prepared(Protocol):
    """The part of a prepared Precision that the audit reads."""

    @property
    def policy(self) -> PrecisionPolicy: ...
    @property
    def report(self) -> ConversionReport: ...
    @property
    def backend(self) -> Kernels: ...


class Places:
    """Where a product belongs: which module's forward is under way, or whose backward.

    On leaving a module its autograd nodes, those between its output and whatever is older than its beginning, get its
    name into their ``metadata``, where the product's backward finds it. The tag goes with the graph.
    """

    def __init__(self) -> None:
        self._running: list[tuple[str, int]] = []  # module, sequence number of the next autograd node on entering

    def enter(self, name: str) -> None:
        self._running.append((name, torch._C._autograd._get_sequence_nr()))

    def leave(self, name: str, out: Any) -> None:
        """Also after an exception, without an ``out``: a recomputation is cut short by one."""
        while self._running:
            left, start = self._running.pop()
            if left == name:
                _tag([x.grad_fn for x in tree_leaves(out) if isinstance(x, Tensor)], name, start)
                return

    def here(self) -> tuple[str, str]:
        """(module, stage) of the product under way."""
        if self._running:
            return self._running[-1][0], "recompute" if _in_backward() else "forward"
        if not _in_backward():
            return "", "forward"
        node: Any = torch._C._current_autograd_node()
        return ("" if node is None else node.metadata.get(TAG, "")), "backward"


def _tag(nodes: list[Any], name: str, start: int) -> None:
    """Name the untagged nodes made since ``start`` from which ``nodes`` come. Those of inner modules have names."""
    seen: set[Any] = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen or not node.next_functions or node._sequence_nr() < start:
            continue  # (a parameter's node has no next one and outlives the graph)
        seen.add(node)
        node.metadata.setdefault(TAG, name)
        nodes += [before for before, _ in node.next_functions]


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Shows every matrix product to ``see(func, args, kwargs, out, outer)``.

    ``outer``: the arguments of the product of tensor subclasses that became this one, else None. A subclass is let
    through untouched, so that what it runs in its turn is seen.
    """

    def __init__(self, see: See) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._see = see
        self._outer: tuple[Any, ...] | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operands = operands_of(func)
        if not operands:
            out = func(*args, **kwargs)
            if unknown(func, args):
                self._see(func, args, kwargs, out, None)
            return out
        if any(hasattr(args[i], "__tensor_flatten__") for i in operands):
            self._outer = tuple(args[i] for i in operands)
            return NotImplemented
        out = func(*args, **kwargs)
        self._see(func, args, kwargs, out, self._outer)
        self._outer = None
        return out


class StepAudit:
    """A context around the forward and backward of one step; afterwards ``result`` is its :class:`Audit`.

    ``precision``: a :class:`mptrain.Precision` prepared with ``model``; its policy and its conversion's report are what
    is asked. ``min_coverage`` (0 to 1): ValueError on leaving if a smaller share of the FLOPs ran in that.
    """

    def __init__(self, model: nn.Module, precision: Prepared, *, min_coverage: float = 0.0) -> None:
        self.result: Audit | None = None
        self._model, self._policy, self._report = model, precision.policy, precision.report
        self._backend, self._emulated = precision.backend.name, precision.backend.emulated
        self._min_coverage = min_coverage
        self._places = Places()
        self._watch = _Watch(self._see)
        self._handles: list[RemovableHandle] = []
        self._rows: dict[Key, list[int]] = defaultdict(lambda: [0, 0])  # FLOPs, count
        self._seen: dict[tuple[str, str], int] = defaultdict(int)  # (layer, stage) -> visible products
        self._claims: list[tuple[str, str, int]] = []  # (layer, GEMM, FLOPs) of backwards to come
        self._weights: dict[str, dict[str, Tensor]] = defaultdict(dict)  # layer -> stage -> first row of its weight
        self._sizes: dict[str, tuple[int, int]] = {
            name: (module.weight.shape[0], module.weight.shape[1])
            for name, module in model.named_modules()
            if (isinstance(module, nn.Linear) or name in self._report.converted) and isinstance(module.weight, Tensor)
        }

    def __enter__(self) -> Self:
        for name, module in self._model.named_modules():
            self._handles.append(module.register_forward_pre_hook(partial(self._before, name=name)))
            self._handles.append(module.register_forward_hook(partial(self._after, name=name), always_call=True))
        self._onlooker = kernels.onlooker()
        self._onlooker.__enter__()
        self._watch.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._watch.__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        self._onlooker.__exit__(None, None, None)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._weights.clear()
        if kind is not None:
            return
        for layer, gemm, flops in self._claims:
            if not self._seen[layer, "backward"]:
                self._claim(layer, gemm, "backward", flops)
        rows = [Row(*key, *totals) for key, totals in self._rows.items()]
        self.result = Audit(tuple(rows), self._policy, self._report)
        self.result.require(self._min_coverage)

    def _before(self, module: nn.Module, args: Any, *, name: str) -> None:
        self._places.enter(name)
        if name in self._sizes:
            self._seen[name, "now"] = 0

    def _after(self, module: nn.Module, args: Any, out: Any, *, name: str) -> None:
        if name in self._report.converted and not self._seen[name, "now"] and args:
            self._claim_layer(module, args[0], out, name)
        self._places.leave(name, out)

    def _claim_layer(self, module: nn.Module, x: Tensor, out: Tensor | None, name: str) -> None:
        """No product of this converted layer was visible: by its shapes there is one, and two more in backward.

        Without an ``out`` a recomputation was cut short, which the layer does after its product, when it saves for
        backward.
        """
        _, stage = self._places.here()
        flops = 2 * x.numel() * self._sizes[name][0]
        self._claim(name, "output", stage, flops)
        weight = module.weight
        assert isinstance(weight, Tensor)
        if stage == "forward" and out is not None and out.requires_grad:
            self._claims += [(name, "grad_input", flops)] if x.requires_grad else []
            self._claims += [(name, "grad_weight", flops)] if weight.requires_grad else []

    def _claim(self, layer: str, gemm: str, stage: str, flops: int) -> None:
        asked = tuple(fmt.name for fmt in self._asked(layer, gemm, 2))
        self._add((layer, gemm, stage, asked, asked, asked, f"claimed by {self._backend}"), flops)

    def _add(self, key: Key, flops: int) -> None:
        self._rows[key][0] += flops
        self._rows[key][1] += 1

    def _see(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, outer: tuple[Any, ...] | None
    ) -> None:
        layer, stage = self._places.here()
        if not operands_of(func):
            self._see_unknown(func, args, layer, stage)
            return
        args = self._without_bias(args, layer, stage) if func is torch.ops.aten.addmm.default else args
        operands = [args[i] for i in operands_of(func)]
        shown = operands if outer is None else list(outer)  # kernels may copy operands to lay them out differently
        gemm, turned = self._gemm(func, layer, stage, shown, wrapped=outer is not None)
        outers: list[Any] = list(outer) if outer is not None else [None] * len(operands)
        pairs = list(zip(operands, outers, (1, 0, 0, 0), strict=False))  # summed over: left's columns, right's rows
        if turned:
            pairs.reverse()
        asked = self._asked(layer, gemm, len(pairs))
        roles = ROLES.get((gemm, len(pairs)), ("",) * len(pairs))
        tiles = [self._policy.quantization.tile_of(role, dim) for role, (_, _, dim) in zip(roles, pairs, strict=True)]
        seen = [self._look(*pair[:2], fmt, tile) for pair, fmt, tile in zip(pairs, asked, tiles, strict=True)]
        self._seen[layer, stage] += 1
        self._seen[layer, "now"] += 1
        names = tuple(fmt.name for fmt in asked)
        evidence = joined(dict.fromkeys(sorted(s.evidence for s in seen)))
        key = (layer, gemm, stage, names, tuple(s.ran for s in seen), tuple(s.carrier for s in seen), evidence)
        self._add(key, flops_of(func, args, kwargs, out))

    def _without_bias(self, args: tuple[Any, ...], layer: str, stage: str) -> tuple[Any, ...]:
        """The product alone, where the emulation has put a layer's bias into it as further columns."""
        left, right = args[1:3]
        k = left.shape[1] - BIAS_COLUMNS
        if not self._emulated or stage == "backward" or layer not in self._sizes or self._sizes[layer][1] != k:
            return args
        return args[0], left[:, :k], right[:k], *args[3:]

    def _see_unknown(self, func: Any, args: tuple[Any, ...], layer: str, stage: str) -> None:
        """Only the types of what it was given are known; an emulation has not rounded inside it."""
        dtypes = {x.dtype for x in tree_leaves(args) if isinstance(x, Tensor) and x.is_floating_point()}
        names = tuple(sorted(NAMES.get(dtype, str(dtype)) for dtype in dtypes))
        asked = (self._policy.compute.name,) * len(names)
        self._add((layer, str(func.overloadpacket).replace("aten.", ""), stage, asked, names, names, UNKNOWN), 0)

    def _look(self, x: Tensor, outer: Any, asked: Format, tile: tuple[int, int]) -> Seen:
        if outer is None:
            return look(x, asked, emulated=self._emulated, tile=tile)
        return look_inside(x, outer, asked, emulated=self._emulated)

    def _gemm(self, func: Any, layer: str, stage: str, operands: list[Tensor], *, wrapped: bool) -> tuple[str, bool]:
        """(name of the product, are its operands the other way round than in the formula?)"""
        if is_attention(func):
            return "attention", False
        if layer not in self._sizes or len(operands) != 2 or min(x.ndim for x in operands) < 2:
            return "other", False
        left, right = map(_matrix, operands)
        n, k = self._sizes[layer]
        if stage == "backward":
            return backward_gemm(left, right, n, k, tuple(self._weights[layer].values()))
        if not wrapped and left.shape[0] == n == right.shape[1]:
            self._weights[layer][stage] = right[:, 0].clone()
        return "output", False

    def _asked(self, layer: str, gemm: str, operands: int) -> tuple[Format, ...]:
        """Return the formats that the policy asks of each operand.

        A layer that the conversion kept is asked for ``compute``.
        """
        config = self._policy.quantization
        kept = layer not in self._sizes or (layer or "(root)") in self._report.kept
        if not self._policy.quantized or kept or gemm in ("attention", "other"):
            return (self._policy.compute,) * operands
        first = config.forward if gemm == "output" else config.backward
        return first, config.forward


def backward_gemm(left: Tensor, right: Tensor, n: int, k: int, weights: tuple[Tensor, ...] = ()) -> tuple[str, bool]:
    """Which backward product of a linear layer with weight [``n``, ``k``] is left [p, q] @ right [q, r]?

    grad_input is grad_output [M, n] @ weight [n, k], grad_weight is grad_output^T [n, M] @ input [M, k]; each may run
    as its transpose (then the operands are the other way round: True). Where M = n the shapes agree; then ``weights``,
    first rows [k] of the weight in forwards, tell, and without them that grad_weight's left matrix is a transpose.
    """
    (p, q), r = left.shape, right.shape[1]
    turned = (p, r) == (k, n) and n != k
    transpose = left.stride(0) < left.stride(1)
    if q != n:
        return "grad_weight", turned
    if (p, r) not in ((n, k), (k, n)):
        return "grad_input", r != k or (p == k and transpose)
    if not weights:
        return ("grad_weight" if transpose else "grad_input"), turned
    if r == k and any(torch.equal(right[0], row) for row in weights):
        return "grad_input", False
    if p == k and any(torch.equal(left[:, 0], row) for row in weights):
        return "grad_input", True
    return "grad_weight", turned


def _matrix(x: Tensor) -> Tensor:
    """The first of a batch of matrices."""
    while x.ndim > 2:
        x = x[0]
    return x


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1

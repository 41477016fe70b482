"""FP8 GEMMs of NVIDIA Transformer Engine (2.x): current, delayed and block scaling on Ada, Hopper and newer.

TE owns the kernels; the state of delayed scaling is ours. TE's quantizer multiplies by a scale and raises an amax that
it holds by reference, and here both are views of the same table that the emulated backend has. What TE would do
itself is switched off (its layers count as registered, so its own update finds nothing), for four reasons: it renews
the forward's scales when the forward ends, so recomputation under torch's checkpoint would see other scales; it lets
an evaluation raise the amaxes; it starts from a scale of 1 (see ``warm_start``); and its state is a pickle that it
refuses to load. With the table, a checkpoint of the emulated backend continues here and back, and recomputation is
exact: scales hold until the next forward begins, and a maximum may be taken twice.

Non-finite operands: delayed scaling shows an Inf through its amaxes on every step (a NaN passes the cast and is
loud). Current and block scaling keep their amaxes inside TE, so there an Inf is looked for on sampled steps only.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mptrain.distributed import Agree
from mptrain.formats import Format
from mptrain.kernels import amax as amax_of
from mptrain.precision.backends._delayed_scaling import DelayedScaling
from mptrain.precision.backends._observed import Booking, require_rows
from mptrain.precision.backends.autocast import set_tf32
from mptrain.precision.convert import ConversionReport, select, swap
from mptrain.precision.counters import Counters
from mptrain.precision.policy import PrecisionPolicy, Quantization, Scaling
from mptrain.precision.regions import Plain, Region

FORMATS = {(Format.fp8_e4m3, Format.fp8_e4m3): "E4M3", (Format.fp8_e4m3, Format.fp8_e5m2): "HYBRID"}
# TE's quantizers: role -> (list, index). Those of output and grad_input are for FP8 results, which are not asked for.
QUANTIZERS = {"input": ("scaling_fwd", 0), "weight": ("scaling_fwd", 1), "grad_output": ("scaling_bwd", 0)}
ROWS = 8  # tokens of a micro-batch must be a multiple (TE: assert_dim_for_fp8_exec)


class Backend:
    """See :class:`mptrain.precision.backends.Backend`."""

    name = "te"
    auto_place = 1
    emulated = False

    def __init__(self, policy: PrecisionPolicy, device: torch.device, agree: Agree) -> None:
        self._policy, self._device, self._agree = policy, device, agree
        self._te, _ = _transformer_engine()
        self._recipe = _recipe(policy.quantization)
        self._counters = Counters()
        self._table: FixedTable | None = None
        self.carrier = f"FP8 tensor cores (Transformer Engine {_version()})"

    @staticmethod
    def missing(policy: PrecisionPolicy, device: torch.device, *, auto: bool) -> str | None:
        if not policy.quantized:
            return f"Transformer Engine only adds FP8 GEMMs and {policy.name} has none; use precision.backend=autocast"
        if device.type != "cuda" or not torch.cuda.is_available():
            return f"Transformer Engine needs a CUDA GPU, not {device.type}; use precision.backend=emulated"
        te, reason = _transformer_engine()
        if te is None:
            return f"{reason}; use precision.backend=native or emulated"
        available, reason = te.is_fp8_available(return_reason=True)
        if not available:
            return f"{reason} Use precision.backend=emulated"
        return _unsupported(te, policy.quantization)

    def convert(self, model: nn.Module, counters: Counters) -> ConversionReport:
        self._counters = counters
        config = self._policy.quantization
        chosen, kept = select(
            model, self._policy.keep, keep_default=self._policy.keep_default, multiple=config.multiple, replaced=True
        )
        slots = {name: counters.add(name) for name in chosen}
        counters.allocate(self._device)
        if config.scaling is Scaling.delayed:
            self._table = FixedTable(config, counters, self._device, self._agree)
        linear_class = _linear_class()

        def make(name: str, layer: nn.Linear) -> nn.Module:
            new: nn.Module = linear_class.sharing(layer, Operands(config, slots[name], counters, self._table))
            return new

        swap(model, chosen, make)
        return ConversionReport(tuple(chosen), kept)

    def forward(self, *, policy_on: bool) -> AbstractContextManager[object]:
        set_tf32(False)
        rotate = self._table.rotate if self._table is not None and policy_on else None
        casts = self._casting() if policy_on else self.casts(False)
        return Region(self._counters, casts, quantized=policy_on, opening=rotate)

    def casts(self, policy_on: bool) -> AbstractContextManager[object]:
        return self._engine() if policy_on else Plain("cuda")

    def backward(self) -> AbstractContextManager[object]:
        casts = self._te.autocast(enabled=True, recipe=self._recipe)  # for a forward that is recomputed
        return Region(self._counters, casts, quantized=True, replaying=True)

    def replay(self) -> AbstractContextManager[object]:
        return Region(self._counters, self._engine(), quantized=True, replaying=True)

    @contextmanager
    def _casting(self) -> Iterator[None]:
        looked_at = self._table.staged.clone() if self._table is not None and self._counters.quiet else None
        try:
            with self._engine():
                yield
        finally:
            if self._table is not None and looked_at is not None:  # TE's cast raises amaxes in evaluation as well
                self._table.staged.copy_(looked_at)

    @contextmanager
    def _engine(self) -> Iterator[None]:
        """TE's layers take the dtype of their output from torch's autocast, and all others their casts."""
        narrow = self._policy.compute is Format.bf16
        casts = torch.autocast("cuda", dtype=torch.bfloat16) if narrow else Plain("cuda")
        with casts, self._te.autocast(enabled=True, recipe=self._recipe):
            yield

    def state_dict(self) -> dict[str, Tensor]:
        return {} if self._table is None else self._table.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if self._table is not None:
            self._table.load_state_dict(state)


class FixedTable(DelayedScaling):
    """The emulated backend's table at addresses that stay: TE's quantizers hold views of ``scale`` and ``staged``."""

    def __init__(self, config: Quantization, counters: Counters, device: torch.device, agree: Agree) -> None:
        super().__init__(config, counters, device, agree)
        self._counters = counters
        self._publishing = False

    def rotate(self) -> None:
        scale, staged = self.scale, self.staged
        super().rotate()
        if self.scale is not scale:
            scale.copy_(self.scale)
            staged.zero_()
            self.scale, self.staged = scale, staged

    def publish_later(self) -> None:
        """When the backward under way ends, show the amaxes that TE wrote to whoever checks for non-finite operands."""
        if not self._publishing:
            self._publishing = True
            torch.autograd.Variable._execution_engine.queue_callback(self._publish)

    def _publish(self) -> None:
        self._publishing = False
        mine = self._counters.amax[: len(self.staged)]
        torch.maximum(mine, self.staged, out=mine)


class Operands(Booking):
    """Booking of one TE layer, with delayed scaling also what the table must know before each cast."""

    def __init__(
        self, config: Quantization, slots: dict[str, int], counters: Counters, table: FixedTable | None
    ) -> None:
        super().__init__(config, slots, counters, None if table is None else lambda slot: table.scale[slot])
        self._table = table

    def bind(self, quantizers: dict[str, list[Any]], key: str) -> None:
        """Point TE's quantizers of ``key`` (scaling_fwd or scaling_bwd) at the table."""
        for role, (where, index) in QUANTIZERS.items():
            if self._table is not None and where == key:
                slot = self._slots[role]
                quantizers[key][index].scale = self._table.scale[slot]
                quantizers[key][index].amax = self._table.staged[slot : slot + 1]

    def operands(self, x: Tensor, weight: Tensor) -> None:
        if self._table is not None:
            books = self._counters
            if books.closed and not books.quiet and not books.replaying:
                self._table.rotate()  # another micro-batch in the same forward context
            self._before_cast(self._table, x, "input")
            self._before_cast(self._table, weight, "weight")
        super().operands(x, weight)

    def watch(self, out: Tensor) -> None:
        table = self._table
        if table is None:
            super().watch(out)
        elif out.requires_grad and not self._counters.replaying:
            counting = self.counting

            def look(grad: Tensor) -> None:
                self._before_cast(table, grad, "grad_output")
                if counting:
                    self.book(grad, "grad_output")
                table.publish_later()

            out.register_hook(look)  # type: ignore[no-untyped-call]

    def _before_cast(self, table: FixedTable, x: Tensor, role: str) -> None:
        slot, books = self._slots[role], self._counters
        if table.cold[slot] and not table.ran[slot]:
            with torch.no_grad():
                table.warm(slot, amax_of(x.detach()))
        if not self.copied and not books.quiet and not (books.replaying and role != "grad_output"):
            table.stage(slot)


@functools.cache
def _transformer_engine() -> tuple[Any, str]:
    """``transformer_engine.pytorch``, or None and why: its import can fail in many ways (driver, ABI, libraries)."""
    if not torch.cuda.is_available():
        return None, "Transformer Engine needs a CUDA GPU"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a deprecation inside TE is not a reason to call it broken
            import transformer_engine.pytorch as te
    except Exception as error:
        if importlib.util.find_spec("transformer_engine") is None:
            return None, 'Transformer Engine is not installed: pip install "mptrain[te]"'
        return None, f"Transformer Engine does not import: {type(error).__name__}: {error}"
    return te, ""


def _version() -> str:
    import transformer_engine

    return str(transformer_engine.__version__)


def _unsupported(te: Any, config: Quantization) -> str | None:
    if (config.forward, config.backward) not in FORMATS:
        return (
            f"Transformer Engine has no {config.forward} forward with {config.backward} backward; "
            "use precision.quantization.forward=fp8_e4m3"
        )
    if config.scaling is Scaling.rowwise:
        return "Transformer Engine has no rowwise scaling; use precision.quantization.scaling=current, delayed or block"
    if config.margin and config.scaling is not Scaling.delayed:
        return f"its {config.scaling.value} scaling has no margin; use precision.quantization.margin=0"
    if config.scaling is Scaling.block:
        available, reason = te.is_fp8_block_scaling_available(return_reason=True)
        return None if available else f"{reason} Use precision.quantization.scaling=current"
    return None


def _recipe(config: Quantization) -> Any:
    """TE's recipe. Of the delayed one only the formats matter: margin, history and scales are the table's."""
    from transformer_engine.common import recipe

    fp8_format = recipe.Format[FORMATS[config.forward, config.backward]]
    if config.scaling is Scaling.delayed:
        return recipe.DelayedScaling(fp8_format=fp8_format, amax_history_len=1, reduce_amax=False)
    if config.scaling is Scaling.block:
        return recipe.Float8BlockScaling(fp8_format=fp8_format)
    return recipe.Float8CurrentScaling(fp8_format=fp8_format)


@functools.cache
def _linear_class() -> Any:
    """TE's layer with our parameters and books. Made on first use: TE may only be imported where there is a GPU."""
    import transformer_engine.pytorch as te
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

    class EngineLinear(te.Linear):  # type: ignore[misc]
        booking: Operands
        # torch's own, so that state_dict has no `_extra_state`: checkpoints of a model are the same in every precision.
        get_extra_state = nn.Module.get_extra_state
        set_extra_state = nn.Module.set_extra_state

        @classmethod
        def sharing(cls, layer: nn.Linear, booking: Operands) -> Any:
            has_bias = layer.bias is not None
            linear = cls(
                layer.in_features, layer.out_features, bias=has_bias, params_dtype=torch.float32, device="meta"
            )
            linear.weight = layer.weight
            if has_bias:
                linear.bias = layer.bias
            # Registered already, says this entry: TE keeps the layer out of its own scale updates.
            linear.fp8_meta[FP8GlobalStateManager.get_buffer_info()] = []
            linear.booking = booking
            return linear

        def set_meta_tensor(self, fwd: bool, recipe: Any) -> None:
            super().set_meta_tensor(fwd, recipe)
            self.booking.bind(self.quantizers, "scaling_fwd" if fwd else "scaling_bwd")

        def forward(self, input: Tensor) -> Tensor:
            if self.booking.bypassed:
                return nn.functional.linear(input, self.weight, self.bias if self.use_bias else None)
            require_rows(input, ROWS, "Transformer Engine")
            self.booking.operands(input, self.weight)
            out: Tensor = super().forward(input)
            self.booking.watch(out)
            return out

    return EngineLinear

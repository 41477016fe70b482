"""The verbs as custom operators of torch, for calls that it traces, fakes or transforms."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from mptrain.formats import Format
from mptrain.kernels.choice import kernels_on
from mptrain.kernels.statistics import Statistics

STATISTICS = Statistics._fields
TABLES = ", ".join(f"Tensor({name}!)? {name}" for name in STATISTICS)  # optional, and written to


@torch.library.custom_op("mptrain::amax", mutates_args=("out",))
def amax(x: Tensor, out: Tensor) -> None:
    kernels_on(x.device).amax(x, out)


@torch.library.custom_op(
    "mptrain::observe", mutates_args=STATISTICS, schema=f"(Tensor x, Tensor? scale, str? fmt, {TABLES}) -> ()"
)
def observe(x: Tensor, scale: Tensor | None, fmt: str | None, *statistics: Tensor | None) -> None:
    kernels_on(x.device).observe(x, scale, None if fmt is None else Format[fmt], Statistics(*statistics))


@torch.library.custom_op(
    "mptrain::quantize",
    mutates_args=("q", "carried", *STATISTICS),
    schema=f"(Tensor x, Tensor scale, str fmt, Tensor(q!) q, Tensor(carried!)? carried, {TABLES}) -> ()",
)
def quantize(x: Tensor, scale: Tensor, fmt: str, q: Tensor, carried: Tensor | None, *statistics: Tensor | None) -> None:
    kernels_on(x.device).quantize(x, scale, Format[fmt], q, carried, Statistics(*statistics))


@torch.library.custom_op(
    "mptrain::fake_quantize",
    mutates_args=("out", *STATISTICS),
    schema=f"(Tensor x, Tensor scale, str fmt, Tensor(out!) out, {TABLES}) -> ()",
)
def fake_quantize(x: Tensor, scale: Tensor, fmt: str, out: Tensor, *statistics: Tensor | None) -> None:
    kernels_on(x.device).fake_quantize(x, scale, Format[fmt], out, Statistics(*statistics))


@torch.library.custom_op("mptrain::decode", mutates_args=("out",))
def decode(q: Tensor, out: Tensor) -> None:
    kernels_on(q.device).decode(q, out)


@torch.library.custom_op("mptrain::column_sums", mutates_args=("out",))
def column_sums(x: Tensor, out: Tensor) -> None:
    kernels_on(x.device).column_sums(x, out)


@torch.library.custom_op("mptrain::current_scale", mutates_args=("out",))
def current_scale(amax: Tensor, maximum: float, divisor: float, out: Tensor) -> None:
    kernels_on(amax.device).current_scale(amax, maximum, divisor, out)


for _operator in (amax, observe, quantize, fake_quantize, decode, column_sums, current_scale):
    _operator.register_fake(lambda *_: None)  # every output is allocated by the caller, so nothing is left to infer


_onlookers = 0


@contextmanager
def onlooker() -> Iterator[None]:
    """While a dispatch mode is active that only looks (an audit, a meter): kernels are called as if it were not there.

    It would change the run otherwise: by way of the custom operators some products add up in another order.
    """
    global _onlookers
    _onlookers += 1
    try:
        yield
    finally:
        _onlookers -= 1


def direct(x: Tensor) -> bool:
    """Tell whether the implementation may be called at once.

    Saves a custom operator's 40 to 90 us if nothing watches or traces.
    """
    return (
        not torch.compiler.is_compiling()
        and (type(x) is Tensor or type(x) is torch.nn.Parameter)
        and not (x.requires_grad and torch.is_grad_enabled())
        and not x.is_meta
        and torch._C._len_torch_dispatch_stack() <= _onlookers
        and not torch._C._are_functorch_transforms_active()
    )

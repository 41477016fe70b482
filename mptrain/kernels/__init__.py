"""Emulated FP8, FP16 and TF32 in one pass over memory: the same bits from C, Triton, ``torch.compile`` or plain torch.

Arithmetic, in every implementation: ``y = float32(x) * scale`` (one rounding), clamped to the maximum for the FP8
formats, rounded to nearest-even in the format. Inf therefore saturates in FP8 and NaN stays NaN (the canonical
positive one), which is why Inf and NaN are counted on ``x``, before the cast. Values scaled back are
``float32(q) * float32(1 / scale)``.

Eager calls go straight to the implementation (10 to 25 us in all); calls that torch traces, fakes or transforms go
through the custom operators ``mptrain::*``. Results are detached: call these from an autograd.Function.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from mptrain.formats import Format

COUNTS = ("elements", "saturated", "flushed", "inf", "nan")
IMPLEMENTATIONS = ("c", "compiled", "eager", "triton")
INPUTS = (torch.float32, torch.bfloat16, torch.float16)
FP8 = {Format.fp8_e4m3, Format.fp8_e5m2}
CODES = {*FP8, Format.fp16}
CODE_TYPES = {fmt.value.dtype for fmt in CODES}


class Kernels(Protocol):
    """What a module of this folder offers. Outputs are preallocated, contiguous, and of the input's shape."""

    def missing(self, device: torch.device) -> str: ...
    def amax(self, x: Tensor, out: Tensor) -> None: ...
    def quantize(
        self,
        x: Tensor,
        scale: Tensor,
        fmt: Format,
        q: Tensor,
        carried: Tensor | None,
        counts: Tensor | None,
        amax: Tensor | None,
    ) -> None: ...
    def fake_quantize(
        self, x: Tensor, scale: Tensor, fmt: Format, out: Tensor, counts: Tensor | None, amax: Tensor | None
    ) -> None: ...
    def decode(self, q: Tensor, out: Tensor) -> None: ...
    def column_sums(self, x: Tensor, out: Tensor) -> None: ...
    def current_scale(self, amax: Tensor, maximum: float, divisor: float, out: Tensor) -> None: ...


onlookers = 0
"""How many of the dispatch modes that are active only look (an audit): the kernels are called as if they were not."""

_forced: str | None = None
_chosen: dict[str, tuple[str, Kernels]] = {}


def implementation(device: torch.device) -> str:
    """Name of the implementation in use for tensors on ``device``: c, compiled, eager or triton."""
    return _choose(torch.device(device))[0]


def why_not() -> dict[str, str]:
    """Implementation -> why it is not available on this machine; empty if it is."""
    cuda = torch.device("cuda")
    devices = {name: torch.device("cpu") for name in IMPLEMENTATIONS} | {"triton": cuda}
    return {name: _missing(name, device) for name, device in devices.items()}


@contextmanager
def use(name: str) -> Iterator[None]:
    """Run the kernels with the implementation ``name``, for tests and benchmarks. Holds for the whole process."""
    global _forced
    before, kept = _forced, dict(_chosen)
    _forced = _known(name, "use()")
    _chosen.clear()
    try:
        yield
    finally:
        _forced = before
        _chosen.clear()
        _chosen.update(kept)


def amax(x: Tensor) -> Tensor:
    """``max |x|`` as FP32, 0-dim, on ``x``'s device. NaN if any element is NaN, else Inf if any is Inf; 0 if empty."""
    _check_input(x)
    out = torch.empty((), dtype=torch.float32, device=x.device)
    x = x.contiguous()
    if _direct(x):
        _kernels(x.device).amax(x, out)
    else:
        _amax(x, out)
    return out


def quantize(
    x: Tensor,
    scale: Tensor,
    fmt: Format,
    *,
    carrier: torch.dtype | None = None,
    counts: Tensor | None = None,
    amax: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``x`` (FP32, BF16 or FP16, any shape) times ``scale`` (FP32, one element), rounded in ``fmt`` (FP8 or FP16).

    Returns the codes, in ``fmt``'s own dtype, and the same values (still times ``scale``) in ``carrier`` for a GEMM,
    or None. ``counts`` (int64[5], see ``COUNTS``) is added to. ``amax`` (FP32, one element) is overwritten with
    ``max |x|``. Both cost no pass of their own. FP16 values need an FP32 carrier: BF16 has 7 mantissa bits of the 10.
    """
    if fmt not in CODES:
        raise ValueError(f"quantize has no codes for {fmt}; choose one of {_names(CODES)}, or use fake_quantize")
    if carrier not in (None, torch.float32, torch.bfloat16) or (carrier is torch.bfloat16 and fmt is Format.fp16):
        raise ValueError(f"{carrier} cannot carry {fmt} values exactly; use carrier=torch.float32")
    _check(x, scale, counts, amax)
    x = x.contiguous()
    q = torch.empty_like(x, dtype=fmt.value.dtype)  # half the time of torch.empty
    carried = None if carrier is None else torch.empty_like(x, dtype=carrier)
    if _direct(x):
        _kernels(x.device).quantize(x, scale, fmt, q, carried, counts, amax)
    else:
        _quantize(x, scale, fmt.name, q, carried, counts, amax)
    return q, carried


def operands(
    x: Tensor,
    scale: Tensor,
    fmt: Format,
    *,
    carrier: torch.dtype,
    counts: Tensor | None = None,
    amax: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A matrix and its transpose as operands of two GEMMs: the values of :func:`quantize`, whose codes nobody keeps.

    The transpose is a view, but for the C kernels in BF16: oneDNN transposes a left operand itself, slowly (2048 x 1536
    by 384: 13.0 ms against 7.0 for one that is contiguous), where this pass has it in the cache. oneDNN may then add up
    in another order (1024 rows: last bits differ), and the training step of a GPT gains 2 %.
    """
    if _direct(x) and implementation(x.device) == "c" and carrier is torch.bfloat16 and fmt in FP8:
        _check(x, scale, counts, amax)
        x = x.contiguous()
        out = torch.empty_like(x, dtype=carrier)
        turned = torch.empty(x.shape[1], x.shape[0], dtype=carrier)
        cast(Any, _module("c")).operands(x, scale, fmt, out, turned, counts, amax)
        return out, turned
    carried = quantize(x, scale, fmt, carrier=carrier, counts=counts, amax=amax)[1]
    assert carried is not None
    return carried, carried.t()


def decode(q: Tensor, carrier: torch.dtype) -> Tensor:
    """The values of ``q`` (FP8 or FP16 codes) in ``carrier`` (BF16 or FP32). Exact, but for FP16 in BF16."""
    if q.dtype not in CODE_TYPES or carrier not in (torch.float32, torch.bfloat16):
        raise ValueError(f"decode turns FP8 and FP16 into bfloat16 or float32, not {q.dtype} into {carrier}")
    q = q.contiguous()
    out = torch.empty_like(q, dtype=carrier)
    if _direct(q):
        _kernels(q.device).decode(q, out)
    else:
        _decode(q, out)
    return out


def column_sums(x: Tensor) -> Tensor:
    """``x.sum(0)`` of a matrix (FP32, BF16 or FP16), added up in FP32: the gradient of a bias."""
    _check_input(x)
    x = x.contiguous()
    out = torch.empty(x.shape[1], dtype=torch.float32, device=x.device)
    if _direct(x):
        _kernels(x.device).column_sums(x, out)
    else:
        _column_sums(x, out)
    return out


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    fmt: Format,
    *,
    out: Tensor | None = None,
    counts: Tensor | None = None,
    amax: Tensor | None = None,
) -> Tensor:
    """``x`` rounded in ``fmt`` at ``scale`` and scaled back: ``round(x * scale) * float32(1 / scale)``, in x's dtype.

    ``fmt`` may also be TF32 (10 mantissa bits, FP32's range; scale normally 1). ``out`` (contiguous, x's shape and
    dtype) may be ``x`` itself. ``counts`` and ``amax`` as for :func:`quantize`.
    """
    if fmt not in CODES and fmt is not Format.tf32:
        raise ValueError(f"fake_quantize does not round to {fmt}; choose one of {_names(CODES | {Format.tf32})}")
    _check(x, scale, counts, amax)
    source = x.contiguous()
    if out is None:
        out = torch.empty_like(source)
    elif out.shape != x.shape or out.dtype is not x.dtype or out.device != x.device or not out.is_contiguous():
        raise ValueError(f"out must be contiguous {x.dtype} of shape {tuple(x.shape)} on {x.device}")
    if _direct(x):
        _kernels(x.device).fake_quantize(source, scale, fmt, out, counts, amax)
    else:
        _fake_quantize(source, scale, fmt.name, out, counts, amax)
    return out


def current_scale(amax: Tensor, fmt: Format, margin: int = 0) -> Tensor:
    """``(fmt.max / amax) / 2^margin`` in FP32 on amax's device, without a host read (Transformer Engine's rule).

    1 where amax (FP32, one element) is 0, Inf or NaN; FLT_MAX where FP32 overflows.
    """
    if not -126 <= margin <= 126:
        raise ValueError(f"margin is a power of two in FP32's range, -126 to 126, not {margin}")
    _check_scalar(amax, "amax", amax.device)
    out = torch.empty((), dtype=torch.float32, device=amax.device)
    if _direct(amax):
        _kernels(amax.device).current_scale(amax, fmt.value.max, 2.0**margin, out)
    else:
        _current_scale(amax, fmt.value.max, 2.0**margin, out)
    return out


@torch.library.custom_op("mptrain::amax", mutates_args=("out",))
def _amax(x: Tensor, out: Tensor) -> None:
    _kernels(x.device).amax(x, out)


@torch.library.custom_op("mptrain::quantize", mutates_args=("q", "carried", "counts", "amax"))
def _quantize(
    x: Tensor,
    scale: Tensor,
    fmt: str,
    q: Tensor,
    carried: Tensor | None,
    counts: Tensor | None,
    amax: Tensor | None,
) -> None:
    _kernels(x.device).quantize(x, scale, Format[fmt], q, carried, counts, amax)


@torch.library.custom_op("mptrain::fake_quantize", mutates_args=("out", "counts", "amax"))
def _fake_quantize(x: Tensor, scale: Tensor, fmt: str, out: Tensor, counts: Tensor | None, amax: Tensor | None) -> None:
    _kernels(x.device).fake_quantize(x, scale, Format[fmt], out, counts, amax)


@torch.library.custom_op("mptrain::decode", mutates_args=("out",))
def _decode(q: Tensor, out: Tensor) -> None:
    _kernels(q.device).decode(q, out)


@torch.library.custom_op("mptrain::column_sums", mutates_args=("out",))
def _column_sums(x: Tensor, out: Tensor) -> None:
    _kernels(x.device).column_sums(x, out)


@torch.library.custom_op("mptrain::current_scale", mutates_args=("out",))
def _current_scale(amax: Tensor, maximum: float, divisor: float, out: Tensor) -> None:
    _kernels(amax.device).current_scale(amax, maximum, divisor, out)


for _operator in (_amax, _quantize, _fake_quantize, _decode, _column_sums, _current_scale):
    _operator.register_fake(lambda *_: None)  # every output is allocated by the caller, so nothing is left to infer


def _direct(x: Tensor) -> bool:
    """May the implementation be called at once? Saves a custom operator's 40 to 90 us if nothing watches or traces."""
    return (
        not torch.compiler.is_compiling()
        and (type(x) is Tensor or type(x) is torch.nn.Parameter)
        and not (x.requires_grad and torch.is_grad_enabled())
        and not x.is_meta
        and torch._C._len_torch_dispatch_stack() <= onlookers
        and not torch._C._are_functorch_transforms_active()
    )


def _kernels(device: torch.device) -> Kernels:
    chosen = _chosen.get(device.type)
    return (chosen or _choose(device))[1]


def _choose(device: torch.device) -> tuple[str, Kernels]:
    """Decide once for a device type: the one forced by ``use`` or MPTRAIN_KERNELS, else the fastest available."""
    if device.type in _chosen:
        return _chosen[device.type]
    asked = _forced or _known(os.environ.get("MPTRAIN_KERNELS"), "MPTRAIN_KERNELS")
    fastest = {"cpu": "c", "cuda": "triton"}.get(device.type, "eager")
    name = asked or fastest
    reason = _missing(name, device)
    if reason and asked:
        raise ValueError(f"the {asked} kernels were asked for but cannot serve {device.type}: {reason}")
    name = "eager" if reason else name
    _chosen[device.type] = name, _module(name)
    return _chosen[device.type]


def _known(name: str | None, where: str) -> str | None:
    if name and name not in IMPLEMENTATIONS:
        raise ValueError(f"{where}: unknown kernels {name!r}; choose one of {', '.join(IMPLEMENTATIONS)}")
    return name or None


def _module(name: str) -> Kernels:
    return cast(Kernels, importlib.import_module(f"{__name__}.{name}"))


def _missing(name: str, device: torch.device) -> str:
    try:
        return _module(name).missing(device)
    except ImportError as error:
        return f"import failed: {error}"


def _names(formats: set[Format]) -> str:
    return ", ".join(sorted(fmt.name for fmt in formats))


def _check(x: Tensor, scale: Tensor, counts: Tensor | None, amax: Tensor | None) -> None:
    """The C kernel reads bare pointers: what is behind them must be right."""
    _check_input(x)
    _check_scalar(scale, "scale", x.device)
    if amax is not None:
        _check_scalar(amax, "amax", x.device)
    if counts is not None and (
        counts.dtype is not torch.int64
        or counts.shape != (len(COUNTS),)
        or counts.device != x.device
        or not counts.is_contiguous()
    ):
        raise ValueError(f"counts must be contiguous int64[{len(COUNTS)}] on {x.device}")


def _check_input(x: Tensor) -> None:
    if x.dtype not in INPUTS:
        raise ValueError(f"the kernels read float32, bfloat16 and float16, not {x.dtype}")


def _check_scalar(value: Tensor, name: str, device: torch.device) -> None:
    if value.dtype is not torch.float32 or value.numel() != 1 or value.device != device:
        raise ValueError(f"{name} must be one float32 element on {device}")

"""CUDA autocast's lists for a CPU: which operators it casts to FP16, runs in FP32, or promotes.

The lists are those of aten/src/ATen/autocast_mode.h. CPU autocast has others: 80 operators have a kernel in CUDA's and
none in the CPU's, 88 the reverse (torch 2.13). So kernels in Python stand on a dispatch key of their own, AutocastIPU,
that no tensor of ours has and that a context includes for its thread: another thread, and an autocast of the user's
own, pay nothing for them. Where both lists agree, the CPU's own kernels in C++ do it.

The kernels act while autocast is on for the CPU, in FP16, and the thread emulates FP16: in an inner
``autocast(enabled=False)``, an inner BF16 autocast, or below another autocast kernel they step aside.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet

from mptrain.formats import Format
from mptrain.precision.suspension import current

HALF = (
    "_convolution.deprecated", "_convolution", "conv1d", "conv2d", "conv3d", "conv_tbc", "conv_transpose1d",
    "conv_transpose2d.input", "conv_transpose3d.input", "convolution", "prelu", "addmm", "addmv", "addr", "matmul",
    "einsum", "mm", "mv", "linalg_vecdot", "linear", "addbmm", "baddbmm", "bmm", "chain_matmul", "linalg_multi_dot",
    "_thnn_fused_lstm_cell", "_thnn_fused_gru_cell", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell",
    "_scaled_dot_product_flash_attention", "scaled_dot_product_attention",
)  # fmt: skip
RECURRENT = tuple(f"{kind}.{which}" for kind in ("lstm", "gru", "rnn_tanh", "rnn_relu") for which in ("input", "data"))
"""FP16 as well: CUDA's kernel is that of ``_cudnn_rnn``, which these become there."""

FLOAT = (
    "acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal", "rsqrt", "sinh",
    "tan", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar", "softplus", "layer_norm", "native_layer_norm",
    "rms_norm", "group_norm", "frobenius_norm.dim", "nuclear_norm", "nuclear_norm.dim", "cosine_similarity",
    "poisson_nll_loss", "cosine_embedding_loss", "nll_loss", "nll_loss2d", "hinge_embedding_loss", "kl_div", "l1_loss",
    "smooth_l1_loss", "huber_loss", "mse_loss", "margin_ranking_loss", "multilabel_margin_loss", "soft_margin_loss",
    "triplet_margin_loss", "multi_margin_loss", "binary_cross_entropy_with_logits", "dist", "pdist", "cdist", "renorm",
    "logsumexp", "upsample_nearest1d", "_upsample_nearest_exact1d", "upsample_nearest2d", "_upsample_nearest_exact2d",
    "upsample_nearest3d", "_upsample_nearest_exact3d", "upsample_linear1d", "upsample_bilinear2d",
    "_upsample_bilinear2d_aa", "upsample_trilinear3d", "upsample_bicubic2d", "_upsample_bicubic2d_aa",
)  # fmt: skip
FLOAT_RESULT = (
    "prod", "prod.dim_int", "softmax.int", "log_softmax.int", "cumprod", "cumsum", "linalg_vector_norm",
    "linalg_matrix_norm", "linalg_matrix_norm.str_ord", "sum", "sum.dim_IntList",
)  # fmt: skip
"""FP32 by their ``dtype`` argument, unless the caller gave one."""

NORMS = {"norm.Scalar": "norm.ScalarOpt_dtype", "norm.ScalarOpt_dim": "norm.ScalarOpt_dim_dtype"}
"""FP32 by the overload that takes a ``dtype``."""

PROMOTE = (
    "addcdiv", "addcmul", "atan2", "bilinear", "cross", "dot", "vdot", "grid_sampler", "index_put", "tensordot",
    "scatter_add",
)  # fmt: skip
BANNED = ("binary_cross_entropy",)

_KEY: DispatchKey = getattr(DispatchKey, "AutocastIPU")  # noqa: B009 - missing in torch's stubs
_AUTOCAST = DispatchKeySet(_KEY) | DispatchKeySet(DispatchKey.AutocastCPU)
_BELOW_OURS = torch._C._dispatch_keyset_full_after(_KEY)
_BELOW_AUTOCAST = torch._C._dispatch_keyset_full_after(DispatchKey.AutocastCPU)
Policy = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]


class CudaLists:
    """A context in which this thread's FP16 autocast of the CPU goes by CUDA's lists."""

    def __init__(self) -> None:
        _register()
        self._included = torch._C._IncludeDispatchKeyGuard(_KEY)

    def __enter__(self) -> None:
        self._included.__enter__()  # type: ignore[no-untyped-call]
        torch.set_autocast_enabled("ipu", True)  # the switch of the key

    def __exit__(self, *raised: Any) -> None:
        torch.set_autocast_enabled("ipu", False)
        self._included.__exit__(*raised)


def _casting() -> bool:
    if not torch.is_autocast_enabled("cpu") or torch.get_autocast_dtype("cpu") is not torch.float16:
        return False
    mode = current()
    return mode is not None and mode.fmt is Format.fp16


def _eligible(x: Tensor) -> bool:
    return x.is_floating_point() and x.dtype is not torch.float64 and x.device.type == "cpu"


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.dtype is not dtype and _eligible(value) else value
    if isinstance(value, list | tuple):
        return [_cast(x, dtype) for x in value]
    return value


def _to(dtype: torch.dtype) -> Policy:
    def run(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return op(*[_cast(x, dtype) for x in args], **{name: _cast(x, dtype) for name, x in kwargs.items()})

    return run


def _float_result(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if len(args) <= _place_of_dtype(op) and kwargs.get("dtype") is None and _eligible(args[0]):
        kwargs = kwargs | {"dtype": torch.float32}
    return op(*args, **kwargs)


@functools.cache
def _place_of_dtype(op: Any) -> int:
    return [argument.name for argument in op._schema.arguments].index("dtype")


def _norm(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    other = _overload(NORMS[op.name().removeprefix("aten::")])
    defaults = [a.default_value for a in op._schema.arguments]
    return other(*args, *defaults[len(args) :], dtype=torch.float32 if _eligible(args[0]) else args[0].dtype)


def _promoted(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    dtypes = {x.dtype for x in _tensors((args, kwargs)) if _eligible(x)}
    if dtypes - {torch.float16, torch.float32}:
        raise RuntimeError("Unexpected floating ScalarType in at::autocast::prioritize")
    return _to(torch.float32 if torch.float32 in dtypes else torch.float16)(op, args, kwargs)


def _tensors(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, dict):
        values = list(values.values())
    return [x for value in values for x in _tensors(value)] if isinstance(values, list | tuple) else []


def _refused(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    raise RuntimeError(
        "torch.nn.functional.binary_cross_entropy and torch.nn.BCELoss are unsafe to autocast, and CUDA's autocast "
        "refuses them: leave the sigmoid away and use binary_cross_entropy_with_logits or BCEWithLogitsLoss, or call "
        "it under torch.autocast(device_type, enabled=False) on FP32 tensors"
    )


def _overload(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


class _Unfused:
    """oneDNN's LSTM is one operator, out of the mode's sight; without it an LSTM is products and cells."""

    def __init__(self) -> None:
        self._lock, self._open, self._was = threading.Lock(), 0, True

    def __enter__(self) -> None:
        with self._lock:
            if not self._open:
                self._was = torch._C._get_mkldnn_enabled()
                torch._C._set_mkldnn_enabled(False)
            self._open += 1

    def __exit__(self, *_: Any) -> None:
        with self._lock:
            self._open -= 1
            if not self._open:
                torch._C._set_mkldnn_enabled(self._was)


_UNFUSED = _Unfused()


def _kernel(op: Any, policy: Policy) -> Callable[..., Any]:
    def run(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        if not _casting():
            return op.redispatch(keyset & _BELOW_OURS, *args, **kwargs)
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            return policy(op, args, kwargs)

    return run


def _recurrent(op: Any) -> Callable[..., Any]:
    half = _to(torch.float16)

    def run(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        mode = current()
        if mode is None or mode.fmt is None:
            return op.redispatch(keyset & _BELOW_OURS, *args, **kwargs)
        with _UNFUSED:
            if not _casting():
                return op.redispatch(keyset & _BELOW_OURS, *args, **kwargs)
            with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
                return half(op, args, kwargs)

    return run


def _uncast(op: Any) -> Callable[..., Any]:
    """Make the kernel of an operator of the CPU's lists that CUDA's leave alone."""

    def run(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        return op.redispatch(keyset & (_BELOW_AUTOCAST if _casting() else _BELOW_OURS), *args, **kwargs)

    return run


def _kernels() -> dict[str, Callable[..., Any]]:
    own = {name.removeprefix("aten::") for name in registered("AutocastCPU")}
    kernels = {name: _recurrent(_overload(name)) for name in RECURRENT}
    for name in (*HALF, *FLOAT):
        if name not in own:  # what is in both lists the CPU's kernel does, in C++
            kernels[name] = _kernel(_overload(name), _to(torch.float16 if name in HALF else torch.float32))
    others = dict.fromkeys(FLOAT_RESULT, _float_result) | dict.fromkeys(NORMS, _norm)
    others |= dict.fromkeys(PROMOTE, _promoted) | dict.fromkeys(BANNED, _refused)
    kernels |= {name: _kernel(_overload(name), policy) for name, policy in others.items()}
    known = {*kernels, *HALF, *FLOAT}
    left = {name for name in own if name.startswith(("fft_", "stft"))}  # a GPU's Half ones are complex32: no CPU's are
    return kernels | {name: _uncast(_overload(name)) for name in own - known - left}


def registered(key: str) -> list[str]:
    """The operators (``aten::name.overload``) with a kernel of their own for a dispatch key."""
    return list(torch._C._dispatch_get_registrations_for_dispatch_key(key))


_LIBRARIES: list[torch.library.Library] = []  # as long as they live, the kernels do
_LOCK = threading.Lock()


def _register() -> None:
    if _LIBRARIES:
        return
    with _LOCK:
        if _LIBRARIES:
            return
        others = torch.library.Library("_", "IMPL", _KEY.name)  # type: ignore[no-untyped-call]
        others.fallback(torch.library.fallthrough_kernel)  # type: ignore[no-untyped-call]
        library = torch.library.Library("aten", "IMPL", _KEY.name)  # type: ignore[no-untyped-call]
        for name, kernel in _kernels().items():
            library.impl(name, kernel, with_keyset=True)  # type: ignore[no-untyped-call]
        _LIBRARIES.extend((others, library))

"""CUDA's autocast lists on a CPU, while FP16 is emulated: torch's own autocast does the casting, by these rules.

torch keeps a list for each device. 80 overloads have a rule for CUDA and none for the CPU, 15 more run in FP32 on the
CPU alone (pools and pads); a run that is to tell what a GPU would do needs CUDA's. The kernels below take the CPU's
places in the dispatcher as long as an emulation lives, and cost 4 us a call; outside an emulated FP16 forward they do
what the CPU's own rule says.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from mptrain.formats import Format
from mptrain.regions import rounding_to

# aten/src/ATen/autocast_mode.h of torch 2.13. Overloads that have the same rule on the CPU are left to it.
LOWER = (
    "addmv", "addr", "chain_matmul", "einsum", "gru_cell", "linalg_multi_dot", "lstm_cell", "mv", "rnn_relu_cell",
    "rnn_tanh_cell", "_convolution", "convolution",
)  # fmt: skip
RECURRENT = ("lstm.input", "lstm.data", "gru.input", "gru.data", "rnn_tanh.input", "rnn_tanh.data", "rnn_relu.input",
    "rnn_relu.data")  # fmt: skip  # on CUDA one cuDNN operator, all of whose operands are cast
FP32 = (
    "acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal", "rsqrt", "sinh",
    "tan", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar", "softplus", "layer_norm", "native_layer_norm",
    "rms_norm", "group_norm", "frobenius_norm.dim", "nuclear_norm", "nuclear_norm.dim", "cosine_similarity", "dist",
    "pdist", "renorm", "logsumexp", "cumprod", "cumsum", "linalg_vector_norm", "linalg_matrix_norm",
    "linalg_matrix_norm.str_ord", "softmax.int", "log_softmax.int", "sum", "sum.dim_IntList", "norm.Scalar",
    "norm.ScalarOpt_dim", "upsample_nearest1d", "_upsample_nearest_exact1d", "upsample_nearest2d",
    "_upsample_nearest_exact2d", "upsample_nearest3d", "_upsample_nearest_exact3d", "upsample_linear1d",
    "upsample_bilinear2d", "_upsample_bilinear2d_aa", "upsample_trilinear3d", "upsample_bicubic2d",
    "_upsample_bicubic2d_aa",
)  # fmt: skip
PROMOTE = (
    "addcdiv", "addcmul", "atan2", "bilinear", "cross", "dot", "vdot", "grid_sampler", "index_put", "tensordot",
    "scatter_add",
)  # fmt: skip
NATIVE = (  # FP32 on the CPU alone: on CUDA they run in the dtype they are given
    "adaptive_avg_pool3d", "adaptive_max_pool3d", "avg_pool3d", "fractional_max_pool2d", "fractional_max_pool3d",
    "max_pool3d", "max_unpool2d", "max_unpool3d", "reflection_pad1d", "reflection_pad2d", "replication_pad1d",
    "replication_pad2d", "replication_pad3d",
)  # fmt: skip

Rule = Callable[[Any, Any], Any]
_LIVING: weakref.WeakSet[Any] = weakref.WeakSet()
_library: torch.library.Library | None = None
_KEY = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)


def need(emulation: object) -> None:
    """Have CUDA's rules at hand as long as ``emulation`` lives."""
    global _library
    _LIVING.add(emulation)
    weakref.finalize(emulation, _tidy)
    if _library is None:
        _library = _registered()


def _tidy() -> None:
    global _library
    if not _LIVING and _library is not None:
        _library._destroy()  # type: ignore[no-untyped-call]
        _library = None


def _registered() -> torch.library.Library:
    library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    rules: list[tuple[tuple[str, ...], Rule, Rule]] = [
        (LOWER, _lowered, _as_given),
        (RECURRENT, _lowered, _as_given),
        (FP32, _widened, _as_given),
        (PROMOTE, _promoted, _as_given),
        (NATIVE, _as_given, _widened),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that kernels are overridden is what is wanted
        for names, on_cuda, on_cpu in rules:
            for name in names:
                packet, _, overload = name.partition(".")
                op = getattr(getattr(torch.ops.aten, packet), overload or "default")
                cpu = _promoted if name == "grid_sampler" else on_cpu
                kernel = _unfused(_kernel(op, on_cuda, cpu)) if names is RECURRENT else _kernel(op, on_cuda, cpu)
                library.impl(name, kernel, "AutocastCPU", allow_override=True)  # type: ignore[no-untyped-call]
    return library


def _kernel(op: Any, on_cuda: Rule, on_cpu: Rule) -> Callable[..., Any]:
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def kernel(*args: Any, **kwargs: Any) -> Any:
        rule = on_cuda if rounding_to() is Format.fp16 else on_cpu
        with torch._C._ExcludeDispatchKeyGuard(_KEY):
            args, kwargs = rule(args, kwargs)
            return op(*args, **kwargs)

    made: Callable[..., Any] = kernel
    return made


def _unfused(kernel: Callable[..., Any]) -> Callable[..., Any]:
    def stepwise(*args: Any, **kwargs: Any) -> Any:
        with unfused():
            return kernel(*args, **kwargs)

    return stepwise


@contextmanager
def unfused() -> Iterator[None]:
    """Recurrent layers as the products they are made of: oneDNN's one operator for all steps would hide them."""
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)


def _eligible(value: Any) -> bool:
    """Autocast's rule: floating, of 32 bits or fewer (so not complex either), on the device."""
    return (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and value.dtype is not torch.float64
        and value.device.type == "cpu"
    )


def _cast(args: Any, kwargs: Any, dtype: torch.dtype) -> Any:
    return tree_map(lambda value: value.to(dtype) if _eligible(value) else value, (args, kwargs))


def _as_given(args: Any, kwargs: Any) -> Any:
    return args, kwargs


def _lowered(args: Any, kwargs: Any) -> Any:
    return _cast(args, kwargs, torch.get_autocast_dtype("cpu"))


def _widened(args: Any, kwargs: Any) -> Any:
    if any(isinstance(value, torch.dtype) for value in (*args, *kwargs.values())):
        return args, kwargs  # the caller says in what it is to be computed
    return _cast(args, kwargs, torch.float32)


def _promoted(args: Any, kwargs: Any) -> Any:
    found = [value.dtype for value in torch.utils._pytree.tree_leaves((args, kwargs)) if _eligible(value)]
    return _cast(args, kwargs, torch.float32) if torch.float32 in found else (args, kwargs)

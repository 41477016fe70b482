"""Which operators are products of matrices, and where their operands stand among the arguments.

What a matrix unit rounds are these operands; addends, biases and attention masks are not among them. An operator that
multiplies inside and is not in the table runs unrounded, and :func:`unknown` names it to the audit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

OPERANDS: dict[str, tuple[int, ...]] = {
    "mm": (0, 1), "addmm": (1, 2), "_addmm_activation": (1, 2), "bmm": (0, 1), "baddbmm": (1, 2), "addbmm": (1, 2),
    "_scaled_mm": (0, 1), "_scaled_mm_v2": (0, 1), "_grouped_mm": (0, 1), "_scaled_grouped_mm": (0, 1),
    "_scaled_grouped_mm_v2": (0, 1), "convolution": (0, 1), "_convolution": (0, 1), "cudnn_convolution": (0, 1),
    "_slow_conv2d_forward": (0, 1), "convolution_overrideable": (0, 1), "convolution_backward": (0, 1, 2),
    "conv_tbc": (0, 1), "conv_tbc_backward": (0, 1, 2), "addmm_": (1, 2), "baddbmm_": (1, 2), "addbmm_": (1, 2),
}  # fmt: skip
VECTORS: dict[str, tuple[int, ...]] = {
    "mv": (0, 1), "addmv": (1, 2), "addmv_": (1, 2), "dot": (0, 1), "vdot": (0, 1), "addr": (1, 2), "addr_": (1, 2),
}  # fmt: skip
"""Products with a vector: FP16 units take them, TF32 ones do not (cuBLAS has its own kernels for them, in FP32)."""

ATTENTION = ("_scaled_dot_product_", "_flash_attention_", "_efficient_attention_")
INSIDE = (
    "_native_multi_head_attention", "_transformer_encoder_layer_fwd", "mkldnn_rnn_layer", "mkldnn_rnn_layer_backward",
    "_cudnn_rnn", "_cudnn_rnn_backward", "miopen_rnn", "mkldnn_convolution", "mkldnn_linear",
    "cudnn_convolution_transpose", "cudnn_convolution_relu", "cudnn_convolution_add_relu", "conv_depthwise3d",
    "_conv_depthwise2d", "slow_conv_transpose2d", "slow_conv_transpose3d", "slow_conv3d_forward", "slow_conv_dilated2d",
    "slow_conv_dilated3d", "sparse_sampled_addmm", "_weight_int4pack_mm", "_weight_int8pack_mm",
)  # fmt: skip
"""Operators of torch that multiply matrices and of whose operands nothing is said here."""

COMPOSED = ("_euclidean_dist", "linalg_pinv", "linalg_matrix_exp")
"""Operators of torch that call products themselves, below autograd: those are seen if a mode stays on meanwhile."""

_OWN = ("aten", "prim", "prims", "mptrain", "profiler", "_c10d_functional", "c10d", "fsdp", "inductor")


def operands_of(func: Any) -> tuple[int, ...]:
    """Where the operands of a product stand among its arguments; empty for any other operator."""
    if getattr(func, "namespace", "") != "aten":
        return ()
    name = func.overloadpacket.__name__
    if is_attention(func):
        return (0, 1, 2, 3) if name.endswith("_backward") else (0, 1, 2)
    return OPERANDS.get(name) or VECTORS.get(name, ())


def is_attention(func: Any) -> bool:
    """A fused scaled-dot-product attention, forward or backward, of any device."""
    return bool(func.overloadpacket.__name__.startswith(ATTENTION))


def unknown(func: Any, args: tuple[Any, ...]) -> bool:
    """Tell whether this operator, which is not in the table, may multiply matrices inside.

    Torch's own are known by name; a foreign one is taken for a product if it has two floating matrices or more.
    """
    if func.namespace == "aten":
        return func.overloadpacket.__name__ in INSIDE
    if func.namespace in _OWN:
        return False
    matrices = [x for x in args if isinstance(x, Tensor) and x.is_floating_point() and x.ndim > 1]
    return len(matrices) > 1 and torch.Tag.pointwise not in func.tags

"""What a policy's GEMMs should give: straight from the definitions, in FP64 with ``ml_dtypes`` casts.

Of mptrain it reads the policy, which is data; it shares none of its arithmetic.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from mptrain.precision.policy import PrecisionPolicy, Scaling

FP8 = {"fp8_e4m3": (ml_dtypes.float8_e4m3fn, 448.0), "fp8_e5m2": (ml_dtypes.float8_e5m2, 57344.0)}


def sqnr(reference: Tensor | np.ndarray, got: Tensor | np.ndarray) -> float:
    """Signal to quantization noise ratio in dB."""
    wide, close = (np.asarray(torch.as_tensor(v).detach().cpu().double()) for v in (reference, got))
    noise = ((wide - close) ** 2).sum()
    return float("inf") if noise == 0 else float(10 * np.log10((wide**2).sum() / noise))


def oracle_cast(x: np.ndarray, policy: PrecisionPolicy, role: str) -> np.ndarray:
    """The operand as its GEMM sees it (FP64 values), cast along the last dimension where scales are local."""
    if not policy.quantized:
        return _oracle_compute(x, str(policy.compute))
    config = policy.quantization
    dtype, largest = FP8[str(config.backward if role == "grad_output" else config.forward)]
    if config.scaling is Scaling.rowwise:  # torchao: per row, rounded down to a power of two
        scale = _power(largest, np.abs(x).max(axis=-1, keepdims=True))
    elif config.scaling is Scaling.block:
        scale = _oracle_block_scale(x, largest, role)
    else:  # a fresh delayed table starts from the current amax
        scale = np.float32(largest) / np.float32(np.abs(x).max())
    scaled = np.clip((x.astype(np.float32) * np.float32(scale)), -largest, largest)
    return scaled.astype(dtype).astype(np.float64) / np.asarray(scale, np.float64)


def _oracle_block_scale(x: np.ndarray, largest: float, role: str) -> np.ndarray:
    scale = np.empty(x.shape, np.float64)
    height = 128 if role == "weight" else 1
    for i in range(0, x.shape[0], height):
        for j in range(0, x.shape[1], 128):
            amax = np.abs(x[i : i + height, j : j + 128]).max()
            scale[i : i + height, j : j + 128] = _power(largest, amax)
    return scale


def _power(largest: float, amax: np.ndarray) -> np.ndarray:
    """The largest power of two that takes ``amax`` to at most ``largest``; 1 for tiles of zeros."""
    with np.errstate(divide="ignore"):
        return np.where(amax > 0, 2.0 ** np.floor(np.log2(largest / np.float64(amax))), 1.0)


def _oracle_compute(x: np.ndarray, compute: str) -> np.ndarray:
    if compute == "tf32":  # nearest even in 10 mantissa bits, on the bits of FP32
        bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
        bits = (bits + 0xFFF + ((bits >> 13) & 1)) & 0xFFFFE000
        return bits.astype(np.uint32).view(np.float32).astype(np.float64)
    dtype = {"fp32": np.float32, "bf16": ml_dtypes.bfloat16, "fp16": np.float16}[compute]
    return x.astype(dtype).astype(np.float64)


def oracle(x: Tensor, weight: Tensor, cotangent: Tensor, policy: PrecisionPolicy) -> dict[str, np.ndarray]:
    """The three GEMMs of a linear layer in FP64 on the operands that the policy allows."""
    a, w, g = (t.detach().cpu().numpy() for t in (x, weight, cotangent))

    def along(values: np.ndarray, role: str, axis: int) -> np.ndarray:
        """Cast with the scales that a GEMM summing over ``axis`` needs."""
        turned = values if axis == 1 else np.ascontiguousarray(values.T)
        cast = oracle_cast(turned, policy, role)
        return cast if axis == 1 else cast.T

    return {
        "output": along(a, "input", 1) @ along(w, "weight", 1).T,
        "grad_input": along(g, "grad_output", 1) @ along(w, "weight", 0),
        "grad_weight": along(g, "grad_output", 0).T @ along(a, "input", 0),
    }

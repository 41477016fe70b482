"""The machine a run is on: its device, its name, and how its FP32 GEMMs run."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROWS = 512  # tokens in the error probe: enough for every kernel's blocking, 0.3 s for a 12 x 768 model
REFERENCE_ROWS = 32  # rows of each product that are checked against FP64
EXACT, OTHER = "ieee", "tf32"  # settings of oneDNN's fp32_precision
EQUAL = 1.5  # times the error of the default kernel that still counts as rounding in another order


def pick_device(asked: str) -> torch.device:
    """``auto`` is the GPU if there is one, of several processes on a node each its own. ValueError if a GPU is asked
    for and missing."""
    if asked == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda: torch sees no GPU here; use device=auto or device=cpu")
    if asked == "auto":
        asked = "cuda" if torch.cuda.is_available() else "cpu"
    if asked == "cpu" or "LOCAL_RANK" not in os.environ:
        return torch.device(asked)
    number = int(os.environ["LOCAL_RANK"])
    if number >= torch.cuda.device_count():
        raise ValueError(
            f"process {number} of this node finds {torch.cuda.device_count()} GPUs: start as many, or device=cpu"
        )
    return torch.device("cuda", number)


def set_deterministic(on: bool) -> None:
    """torch's deterministic algorithms alone, or whatever is fastest. cuBLAS reads its setting when it starts, so this
    comes before anything is on the device."""
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else its split sums may come in any order
    torch.use_deterministic_algorithms(on)
    torch.backends.cudnn.benchmark = False


def describe(device: torch.device) -> str:
    """Describe what speed and rounding depend on: the GPU's name, or the CPU's with its vector instructions and
    threads.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def cpu_name() -> str:
    """The processor's model, as precisely as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def gemm_shapes(model: nn.Module, tokens: int) -> list[tuple[int, int, int]]:
    """(M, K, N) of the three GEMMs of each linear layer of ``model`` (it may be on meta) for ``tokens`` rows."""
    shapes: dict[tuple[int, int, int], None] = {}
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            n, k = layer.weight.shape
            shapes |= {(tokens, k, n): None, (tokens, n, k): None, (n, tokens, k): None}
    return list(shapes)


def choose_fp32_gemm(model: nn.Module, device: torch.device) -> str:
    """Take the CPU's second FP32 GEMM library if it is as exact as the first; returns "blas" or "onednn", now in force.

    oneDNN's fp32_precision "tf32" (what ``torch.set_float32_matmul_precision("high")`` sets on a CPU) lets oneDNN
    multiply FP32 matrices in place of the BLAS. Depending on the CPU, oneDNN then computes in FP32 (faster on some), or
    rounds to TF32, or torch stays with the BLAS. So it is taken only where the products differ from the BLAS's and
    their error against FP64, over the shapes of this model, is not larger. A GPU has switches of its own.
    """
    if device.type != "cpu":
        return "cublas"
    switch = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    generator = torch.Generator().manual_seed(0)
    default, other, changed = 0.0, 0.0, False
    try:
        for m, k, n in gemm_shapes(model, ROWS):
            x = torch.randn(m, k, generator=generator)
            weight = torch.randn(n, k, generator=generator)
            exact = F.linear(x[:REFERENCE_ROWS].double(), weight.double())
            products = []
            for setting in (EXACT, OTHER):
                switch.fp32_precision = setting
                products.append(F.linear(x, weight))
            default = max(default, _error(products[0], exact))
            other = max(other, _error(products[1], exact))
            changed = changed or not torch.equal(*products)
    finally:
        taken = changed and other <= EQUAL * default
        switch.fp32_precision = OTHER if taken else EXACT
    return "onednn" if taken else "blas"


def _error(product: Tensor, exact: Tensor) -> float:
    """Largest error over largest magnitude, in the rows that ``exact`` has."""
    return float((product[: len(exact)].double() - exact).abs().max() / exact.abs().max())


def gemm_flops_per_s(dtype: torch.dtype) -> float:
    """The CPU's rate (FLOP/s) in a GEMM too large for a cache of a few MiB, as a model's are. Takes 50 to 150 ms."""
    a, b = torch.ones(1024, 768, dtype=dtype), torch.ones(768, 3072, dtype=dtype)
    a @ b
    begin = time.perf_counter()
    for _ in range(4):
        a @ b
    return 4 * 2 * 1024 * 768 * 3072 / (time.perf_counter() - begin)

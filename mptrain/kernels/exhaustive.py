"""Proof by exhaustion: ``python -m mptrain.kernels.exhaustive`` casts all 2^32 FP32 bit patterns and compares codes.

The oracle is ``ml_dtypes`` (NumPy for FP16), clamped to the maximum first for the FP8 formats. NaNs must be the
canonical code. Runs the implementation that MPTRAIN_KERNELS names, else the fastest: a minute a format for FP8 and 12
for FP16 (NumPy is slow there) with the C kernels on two cores. Needs the ``test`` extra.
"""

from __future__ import annotations

import argparse
import sys
import time

import ml_dtypes
import numpy as np
import torch

from mptrain import kernels
from mptrain.formats import Format
from mptrain.kernels.bits import BITS

ORACLE = {Format.fp8_e4m3: ml_dtypes.float8_e4m3fn, Format.fp8_e5m2: ml_dtypes.float8_e5m2, Format.fp16: np.float16}


def mismatches(start: int, count: int, fmt: Format) -> int:
    """How many of the FP32 bit patterns ``start .. start + count`` get another code than the oracle's."""
    bits = np.arange(start, start + count, dtype=np.int64).astype(np.uint32)
    x = bits.view(np.float32)
    code_type, torch_type = (np.uint8, torch.uint8) if fmt.value.bits == 8 else (np.uint16, torch.uint16)
    clamped = np.clip(x, -fmt.value.max, fmt.value.max) if fmt.value.bits == 8 else x
    with np.errstate(over="ignore", invalid="ignore"):
        expected = clamped.astype(ORACLE[fmt]).view(code_type)
    expected = np.where(np.isnan(x), code_type(BITS[fmt].nan), expected)
    codes, _ = kernels.quantize(torch.from_numpy(x), torch.ones((), dtype=torch.float32), fmt)
    return int((codes.view(torch_type).numpy() != expected).sum())


def main() -> int:
    """Check every chunk of every format asked for, with progress on one line; 1 if any code differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("formats", nargs="*", default=[fmt.name for fmt in ORACLE], help="default: all three")
    parser.add_argument("--chunk", type=int, default=1 << 24, help="bit patterns at a time (default 2^24)")
    options = parser.parse_args()
    name, total = kernels.implementation(torch.device("cpu")), 0
    for fmt in (Format[format_name] for format_name in options.formats):
        began, wrong = time.monotonic(), 0
        for start in range(0, 1 << 32, options.chunk):
            wrong += mismatches(start, min(options.chunk, (1 << 32) - start), fmt)
            done = (start + options.chunk) / (1 << 32)
            print(f"\r{name} {fmt}: {min(done, 1):6.1%}, {wrong} differ", end="", flush=True)
        print(f"\r{name} {fmt}: all 2^32 inputs, {wrong} differ, {time.monotonic() - began:.0f} s")
        total += wrong
    return 1 if total else 0


if __name__ == "__main__":
    sys.exit(main())

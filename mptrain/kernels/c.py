"""The kernels in C: built by the machine's own compiler at first use, cached, called through ctypes.

Threads. torch already runs an OpenMP runtime; a second one in the process would fight it with spinning threads. So the
library is compiled for OpenMP but linked without a runtime: its GOMP_* symbols resolve to the runtime that torch loaded
globally. Where that fails (another runtime, another compiler) it is linked in the ordinary way, and failing that built
single-threaded. The first call builds (4 s with GCC 12 on one core); later processes load the cached file.

``$CC`` names the compiler (else cc, gcc, clang); ``$MPTRAIN_CACHE`` the cache (else ``$XDG_CACHE_HOME`` or ~/.cache).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from mptrain.formats import Format
from mptrain.kernels import eager
from mptrain.kernels.bins import N_BINS
from mptrain.kernels.statistics import Statistics

SOURCES = Path(__file__).parent  # every .c file of this folder is compiled, and may include every .h
# -O2 with the vectoriser is as fast as -O3 and builds in two thirds of the time (measured: 3.2 against 5.1 s).
FLAGS = ("-std=gnu11", "-O2", "-ftree-vectorize", "-fvect-cost-model=dynamic", "-fPIC")
# No contraction: x * scale + magic as one FMA would skip a rounding. No -ffast-math: NaN and Inf are data.
ARITHMETIC = ("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
TIMEOUT_S = 120
# Below this a second thread costs more than it saves: waking it takes some 5 us, 64 Ki elements take 15.
THREADED_FROM = 65536
INPUT = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
FORMAT = {Format.fp8_e4m3: 0, Format.fp8_e5m2: 1, Format.fp16: 2, Format.tf32: 3, Format.bf16: 4}
CODES = {fmt.value.dtype: FORMAT[fmt] for fmt in (Format.fp8_e4m3, Format.fp8_e5m2, Format.fp16)}
OUTPUT = {None: 0, torch.bfloat16: 1, torch.float32: 2}
SCALED_BACK, VALUES_BF16, NOTHING = 3, 4, 5


def missing(device: torch.device) -> str:
    """Why this implementation cannot serve ``device``; empty if it can. Builds the library if need be."""
    if device.type != "cpu":
        return f"the C kernels run on cpu, not on {device.type}"
    return _library()[1]


def amax(x: Tensor, out: Tensor) -> None:
    """``max |x|`` (contiguous, any shape) into ``out`` (FP32, one element)."""
    n = x.numel()
    _loaded().mp_amax(x.data_ptr(), n, INPUT[x.dtype], _threads(n), out.data_ptr())


def observe(x: Tensor, scale: Tensor | None, fmt: Format | None, statistics: Statistics) -> None:
    """The statistics of ``x`` (contiguous), those of a cast for ``fmt`` at ``scale``."""
    _run(x, scale, fmt or Format.fp8_e4m3, NOTHING, None, None, statistics)


def quantize(x: Tensor, scale: Tensor, fmt: Format, q: Tensor, carried: Tensor | None, statistics: Statistics) -> None:
    """``x * scale`` rounded in ``fmt`` into ``q`` and, widened again, into ``carried``; all contiguous, x's shape."""
    output = OUTPUT[None if carried is None else carried.dtype]
    _run(x, scale, fmt, output, q.data_ptr(), _pointer(carried), statistics)


def operands(x: Tensor, scale: Tensor, fmt: Format, out: Tensor, turned: Tensor, statistics: Statistics) -> None:
    """The values of :func:`quantize` in BF16, without codes: a matrix into ``out``, its transpose into ``turned``."""
    _run(x, scale, fmt, VALUES_BF16, None, out.data_ptr(), statistics, turned.data_ptr())


def fake_quantize(x: Tensor, scale: Tensor, fmt: Format, out: Tensor, statistics: Statistics) -> None:
    """``x`` rounded in ``fmt`` and multiplied by FP32 ``1 / scale``, into ``out`` (``x``'s shape and dtype)."""
    _run(x, scale, fmt, SCALED_BACK, None, out.data_ptr(), statistics)


def decode(q: Tensor, out: Tensor) -> None:
    """The values of ``q`` (FP8 or FP16) into ``out`` (BF16 or FP32), same shape, both contiguous."""
    n, wide = q.numel(), out.dtype is torch.float32
    _loaded().mp_decode(q.data_ptr(), n, CODES[q.dtype], wide, out.data_ptr(), _threads(n))


def current_scale(amax: Tensor, maximum: float, divisor: float, out: Tensor) -> None:
    """``(maximum / amax) / divisor`` into ``out`` (FP32, one element); see :func:`eager.current_scale`."""
    _loaded().mp_scale(amax.data_ptr(), maximum, divisor, out.data_ptr())


def column_sums(x: Tensor, out: Tensor) -> None:
    """``x.sum(0, dtype=float32)`` of a contiguous matrix into ``out`` (FP32)."""
    rows, cols = x.shape
    _loaded().mp_column_sums(x.data_ptr(), rows, cols, INPUT[x.dtype], out.data_ptr(), _threads(x.numel()))


def updates(
    weight: Tensor,
    first: Tensor,
    second: Tensor,
    numbers: tuple[float, float, float, float],
    histograms: tuple[Tensor, Tensor, Tensor],
    lost: Tensor,
) -> None:
    """See :func:`mptrain.kernels.adamw.updates`; all contiguous."""
    n, tables = weight.numel(), [table.data_ptr() for table in histograms]
    pointers = weight.data_ptr(), first.data_ptr(), second.data_ptr()
    _loaded().mp_updates(*pointers, n, INPUT[weight.dtype], *numbers, *tables, lost.data_ptr(), _threads(n))


def _run(
    x: Tensor,
    scale: Tensor | None,
    fmt: Format,
    output: int,
    codes: int | None,
    values: int | None,
    statistics: Statistics,
    turned: int | None = None,
) -> None:
    n, cols = x.numel(), x.shape[-1] if x.dim() else 1
    keys = n // cols if n else 0, cols, INPUT[x.dtype], FORMAT[fmt], output
    tables = map(_pointer, statistics)
    _loaded().mp_quantize(x.data_ptr(), *keys, _pointer(scale), codes, values, turned, *tables, _threads(n))


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _threads(elements: int) -> int:
    return torch.get_num_threads() if elements >= THREADED_FROM else 1


@functools.cache
def _loaded() -> ctypes.CDLL:
    library, reason = _library()
    assert library is not None, reason
    return library


@functools.cache
def _library() -> tuple[ctypes.CDLL | None, str]:
    """The loaded and checked library, or the reason why there is none. Asked once per process."""
    compilers = [os.environ["CC"]] if os.environ.get("CC") else ["cc", "gcc", "clang"]
    command = next((words for words in map(shlex.split, compilers) if words and shutil.which(words[0])), None)
    if command is None:
        return None, f"no C compiler found (tried {', '.join(compilers)}); install gcc or clang, or set CC"
    reason = ""
    try:
        for flags, linked in _variants():
            library, reason = _obtain(command, flags, linked)
            if library is not None:
                return library, ""
    except (OSError, subprocess.SubprocessError) as error:
        reason = f"{error}"
    return None, f"{shlex.join(command)} could not build the kernels: {reason}"


def _variants() -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
    """(compile flags, link flags), best first: torch's OpenMP runtime, one of our own, none; then a plain machine."""
    wide = ("-mprefer-vector-width=512",) if platform.machine() in ("x86_64", "AMD64") else ()
    native: tuple[str, ...] = ("-march=native", *wide)
    for openmp, linked in ((("-fopenmp",), ()), (("-fopenmp",), ("-fopenmp",)), (("-fopenmp-simd",), ())):
        yield FLAGS + ARITHMETIC + native + openmp, linked
    yield ("-O2", "-fPIC", *ARITHMETIC), ()


def _obtain(command: list[str], flags: tuple[str, ...], linked: tuple[str, ...]) -> tuple[ctypes.CDLL | None, str]:
    """Load this variant from the cache or build it there; (None, reason) if it cannot be built, loaded or trusted."""
    for folder in _folders():
        path = folder / f"quantize-{_fingerprint(tuple(command), flags, linked)}.so"
        with contextlib.suppress(OSError):
            if path.is_file() and (library := _load(path)) is not None:
                return library, ""
        try:
            failure = _build(command, flags, linked, path)
        except OSError as error:
            failure = f"cannot write to {folder}: {error}"
            continue  # an unwritable or full cache: try the next folder
        if failure:
            return None, failure
        try:
            library = _load(path)
        except OSError as error:
            return None, str(error)
        return library, "" if library is not None else "its results differ from torch's casts"
    return None, failure


def _folders() -> Iterator[Path]:
    """Yield the user's cache, then a private folder in the temporary directory."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    with contextlib.suppress(RuntimeError):  # no home directory
        root = Path(os.environ.get("MPTRAIN_CACHE") or Path(home).expanduser() / "mptrain")
        yield root.expanduser() / "kernels"
    user = os.getuid() if hasattr(os, "getuid") else 0
    shared = Path(tempfile.gettempdir()) / f"mptrain-{user}"
    with contextlib.suppress(OSError):
        shared.mkdir(mode=0o700, exist_ok=True)
        status = shared.lstat()
        # Another user could have planted code to load: only a real folder of our own, closed to others, will do.
        if stat.S_ISDIR(status.st_mode) and status.st_uid == user and not status.st_mode & 0o022:
            yield shared
    yield Path(tempfile.mkdtemp(prefix="mptrain-"))


@functools.cache
def _fingerprint(command: tuple[str, ...], flags: tuple[str, ...], linked: tuple[str, ...]) -> str:
    """Names the cached file: source, compiler, flags and this processor's features (homes are shared by machines)."""
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=TIMEOUT_S).stdout
    features = platform.machine() + platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features += next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    sources = [path.read_text() for path in sorted(SOURCES.glob("*.[ch]"))]
    text = "\0".join([*sources, *command, version, *flags, "link", *linked, features])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _build(command: list[str], flags: tuple[str, ...], linked: tuple[str, ...], path: Path) -> str:
    """Compile into a private folder beside ``path`` and move the result there in one step; "" or the error.

    Interrupted or raced by another process, ``path`` is absent or complete, never half a file.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as private:
        sources, result = sorted(SOURCES.glob("*.c")), os.path.join(private, "quantize.so")
        objects = [f"{source.stem}.o" for source in sources]
        for step in ([*flags, "-c", *map(str, sources)], ["-shared", *objects, *linked, "-lm", "-o", result]):
            done = subprocess.run([*command, *step], cwd=private, capture_output=True, text=True, timeout=TIMEOUT_S)
            if done.returncode != 0:
                lines = done.stderr.strip().splitlines()
                return next((line for line in lines if "error" in line), "") or f"exit status {done.returncode}"
        os.replace(result, path)
    return ""


def _load(path: Path) -> ctypes.CDLL | None:
    """The library at ``path`` with its signatures declared, if it passes its check; OSError if it cannot be loaded."""
    library = ctypes.CDLL(str(path))
    pointer, size, number, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
    signatures = {
        "mp_amax": [pointer, size, number, number, pointer],
        "mp_quantize": [pointer, size, size, number, number, number, *[pointer] * 9, number],
        "mp_updates": [*[pointer] * 3, size, number, *[real] * 4, *[pointer] * 4, number],
        "mp_decode": [pointer, size, number, number, pointer, number],
        "mp_column_sums": [pointer, size, size, number, pointer, number],
        "mp_scale": [pointer, real, real, pointer],
    }
    for name, arguments in signatures.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    return library if _agrees(library) else None


def _agrees(library: ctypes.CDLL) -> bool:
    """Compare with torch on every 16th BF16 value: a miscompiled kernel must not train anyone's model."""
    with _disable_current_modes():  # the first call may come from inside a FakeTensorMode or a default device
        x = torch.arange(0, 65536, 16, dtype=torch.int32, device="cpu").to(torch.int16).view(torch.bfloat16)
        scale = torch.ones((), dtype=torch.float32, device="cpu")
        bins = [torch.zeros(N_BINS, dtype=torch.int64, device="cpu") for _ in range(2)]
        for fmt in (Format.fp8_e4m3, Format.fp8_e5m2, Format.fp16):
            expected, got = (torch.empty_like(x, dtype=fmt.value.dtype) for _ in range(2))
            eager.quantize(x, scale, fmt, expected, None, Statistics(histogram=bins[0]))
            keys = 1, x.numel(), INPUT[x.dtype], FORMAT[fmt], 0
            statistics = None, None, bins[1].data_ptr(), None, None
            library.mp_quantize(x.data_ptr(), *keys, scale.data_ptr(), got.data_ptr(), None, None, *statistics, 1)
            bits = torch.int16 if fmt is Format.fp16 else torch.uint8
            if not torch.equal(expected.view(bits), got.view(bits)):
                return False
        # Normal numbers too: most of them in the window of octaves that is counted by bits.
        x = torch.linspace(-1, 1, 5000, dtype=torch.float32, device="cpu")
        eager.observe(x, None, None, Statistics(histogram=bins[0]))
        keys = 1, x.numel(), INPUT[x.dtype], 0, NOTHING
        library.mp_quantize(x.data_ptr(), *keys, *[None] * 6, bins[1].data_ptr(), None, None, 1)
        return torch.equal(*bins)

"""Recognition of token files: by their header, or by whether a file without one can hold tokens at all.

A file with a header (llm.c's or numpy's, of either byte order) is read as the header says. A file without one is
read as 2-byte tokens only if it looks like them; otherwise it is rejected, because a wrong guess would silently
train on noise. ``data.dtype=uint16`` or ``uint32`` sets the type of files without a header, and nothing is
guessed.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import numpy.typing as npt

HEADER_BYTES = 256 * 4
NARROW, WIDE = "<u2", "<u4"
KINDS = {20240520: (1, NARROW), 20240801: (7, WIDE)}
"""llm.c's magic numbers: version, token type. Read as tokens they begin with 55432 and 55713, past GPT-2's 50256."""
DTYPES = {"auto": "", "uint16": NARROW, "uint32": WIDE}
NUMPY = b"\x93NUMPY"
MAGIC = (  # first bytes of files that hold no tokens
    (b"\x1f\x8b\x08", "gzip data"), (b"PK\x03\x04", "a zip archive (.zip, .npz, .pt)"), (b"BZh", "bzip2 data"),
    (b"\xfd7zXZ\x00", "xz data"), (b"\x28\xb5\x2f\xfd", "zstd data"), (b"\x04\x22\x4d\x18", "lz4 data"),
    (b"PAR1", "a Parquet file"), (b"ARROW1", "an Arrow file"), (b"FEA1", "a Feather file"),
    (b"\x89HDF\r\n", "an HDF5 file"), (b"SQLite format 3", "an SQLite database"), (b"MMIDIDX\x00", "a Megatron index"),
    (b"\x80\x02", "a pickle"), (b"\x80\x03", "a pickle"), (b"\x80\x04\x95", "a pickle"), (b"\x80\x05\x95", "a pickle"),
    (b"%PDF", "a PDF"), (b"\x7fELF", "a program"), (b"\x89PNG", "a PNG image"), (b"\xff\xd8\xff", "a JPEG image"),
    (b"\xff\xfe", "UTF-16 text"), (b"\xfe\xff", "UTF-16 text"), (b"GGUF", "a GGUF model"),
)  # fmt: skip
SAMPLE = 1 << 16  # 2-byte values checked at the beginning and in the middle of a file
HIGH_HALF = 16  # the upper 2 bytes of a 4-byte token are below this: vocabularies have less than 2^20 entries


def open_shard(path: str, dtype: str = "auto") -> npt.NDArray[Any]:
    """Map one shard into memory, int [tokens]. ``dtype``: auto, uint16 or uint32, of a file without a header.

    ValueError when it was cut short, is not a shard, or does not look like one.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(4096)
    for order in "<>":
        if len(head) >= 12 and int(np.frombuffer(head, f"{order}i4", 1)[0]) in KINDS:
            return _llm_c(path, size, np.frombuffer(head, f"{order}i4", 3), order)
    if head.startswith(NUMPY):
        return _numpy(path)
    width = DTYPES[dtype] or NARROW
    each = np.dtype(width).itemsize
    if dtype == "auto":
        foreign = _foreign(head, size)
        if foreign:
            raise ValueError(
                f"{path}: this is {foreign}, not tokens; tokenize or unpack it first (or set data.dtype=uint16 or "
                "uint32 if it is tokens after all)"
            )
    if size == 0 or size % each:
        raise ValueError(f"{path}: {size} bytes are not a whole number of {each}-byte tokens; copy or write it again")
    tokens: npt.NDArray[Any] = np.memmap(path, width, "r")
    if dtype == "auto":
        _require_plausible(path, tokens)
    return tokens


def _llm_c(path: str, size: int, header: npt.NDArray[Any], order: str) -> npt.NDArray[Any]:
    version, width = KINDS[int(header[0])]
    width = width.replace("<", order)
    if header[1] != version:
        raise ValueError(f"{path}: header version {header[1]} is not {version}, the one known; write the shard again")
    count, expected = int(header[2]), HEADER_BYTES + int(header[2]) * np.dtype(width).itemsize
    if size != expected:
        raise ValueError(
            f"{path}: the header promises {count} tokens, {expected} bytes, and the file has {size}: "
            "it was cut short or is still being written; copy or write it again"
        )
    return np.memmap(path, width, "r", offset=HEADER_BYTES) if count else np.empty(0, width)


def _numpy(path: str) -> npt.NDArray[Any]:
    try:
        tokens: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path}: numpy cannot read this .npy file ({error}); copy or write it again") from error
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise ValueError(
            f"{path}: this .npy file holds {tokens.dtype} of shape {list(tokens.shape)}, and tokens are a list of "
            "integers; save it again as uint16 or uint32, one-dimensional"
        )
    return tokens


def _foreign(head: bytes, size: int) -> str:
    """Name the kind of file that begins with ``head``; empty if it may hold tokens."""
    for magic, name in MAGIC:
        if head.startswith(magic):
            return name
    if head[257:262] == b"ustar":
        return "a tar archive"
    if head[8:10] == b'{"' and int.from_bytes(head[:8], "little") < size:
        return "a safetensors file"
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3 or len(head) < 4096:  # else the window cuts a character
            return ""
        text = head[: error.start].decode()
    return "text" if text and all(one.isprintable() or one in "\t\n\r\f" for one in text) else ""


def _require_plausible(path: str, tokens: npt.NDArray[Any]) -> None:
    """Raise ValueError if 2-byte values look like tokens of another width or byte order, or like noise."""
    middle = len(tokens) // 2 & ~3  # at a boundary of 8 bytes
    sample = np.concatenate([tokens[:SAMPLE], tokens[middle : middle + SAMPLE]])
    sample = sample[: len(sample) & ~3]
    if len(sample) < 32:
        return
    for values, order in ((sample, ""), (sample.byteswap(), "big-endian ")):
        first, second = (values[0::2], values[1::2]) if not order else (values[1::2], values[0::2])
        if second.max() < HIGH_HALF <= first.max():
            wide = not values.reshape(-1, 4)[:, 2:].any() or not values.reshape(-1, 4)[:, :2].any()
            width = 8 if wide else 4
            way = "set data.dtype=uint32" if width == 4 and not order else "write it again as little-endian uint32"
            raise ValueError(
                f"{path}: this looks like {order}{width}-byte tokens, every second 2-byte value is below {HIGH_HALF}: "
                f"{way} (or set data.dtype=uint16 if its tokens are 2 bytes after all)"
            )
    low, high = (_spread(part) for part in (sample & 0xFF, sample >> 8))
    many = len(sample) >= 8192
    if high[0] - low[0] > 1.0 or (many and low[1] < 0.95 * high[1]):
        raise ValueError(
            f"{path}: this looks like big-endian 2-byte tokens, the low bytes vary less than the high ones: write it "
            "again as little-endian uint16 (or set data.dtype=uint16 if it is)"
        )
    if many and min(low[0], high[0]) > 7.9:
        raise ValueError(
            f"{path}: this looks like noise (compressed or encrypted?), not tokens: unpack it first (or set "
            "data.dtype=uint16 or uint32 if it is tokens after all)"
        )


def _spread(values: npt.NDArray[Any]) -> tuple[float, int]:
    """Return the entropy in bits of bytes, and the number of different values."""
    counts = np.bincount(values, minlength=256)
    share = counts[counts > 0] / len(values)
    return float(-(share * np.log2(share)).sum()), len(share)

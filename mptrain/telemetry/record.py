"""The file of sampled steps, RUN/histograms.bin: one record a step, appended whole, readable after any crash.

A record is a 40-byte head (little-endian) and a payload::

    magic 8 | version u16 | 0 u16 | CRC32 u32 of all that follows | step i64 | payload bytes u64 | unpacked bytes u64
    payload: zlib level 1 of [JSON length u32, JSON {about, rows, tables: [name, dtype, shape, stored]}, arrays]

Wide int64 tables (256 columns or more: the histograms, the block amaxes) hold mostly zeros and are stored as their
non-zero entries: entries per row, differences of their columns, counts. An array is stored byte by significance, all
first bytes, then all second ones. A record that is torn or fails its CRC is passed over: the reader looks for the next
magic. Nothing in the file is executed: JSON and plain arrays of named dtypes.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FILE = "histograms.bin"
MAGIC = b"\x93MPTHIST"  # no text begins with 0x93
VERSION = 1
HEAD = struct.Struct("<8sHHIqQQ")
CRC_FROM = 16  # magic, version and CRC itself are not under the CRC
MOST_BYTES = 2**31  # unpacked; a record of 208 rows has 0.3 MB
WIDE = 256
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.float64)
    + (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
}


@dataclass(frozen=True, eq=False)
class Record:
    """One sampled step. ``rows``: (layer, role, name of the format cast to or ""); ``tables``: CPU tensors [rows, ...];
    ``about``: small JSON (the loss scale, say)."""

    step: int
    about: dict[str, Any]
    rows: list[tuple[str, str, str]]
    tables: dict[str, Tensor]

    def __post_init__(self) -> None:
        for name, table in self.tables.items():
            if len(table) != len(self.rows):
                raise ValueError(f"table {name} has {len(table)} rows, the record {len(self.rows)}")


def append(path: Path, record: Record) -> None:
    """Write ``record`` at the end of ``path`` in one write. OSError with the path if that fails (disk full)."""
    blob = pack(record)
    with path.open("ab", buffering=0) as file:
        written = file.write(blob)
    if written != len(blob):
        raise OSError(28, "disk full: a record was cut short, the ones before are whole", str(path))


def read(path: Path) -> list[Record]:
    """Every whole record, by step; of a step recorded twice (a run resumed from before it), the last.

    ValueError if the file is missing or holds no whole record.
    """
    kept = _places(path)
    records = [_unpack(head, payload) for head, payload in kept.values()]
    return [record for record in records if record]


def read_step(path: Path, step: int | None = None) -> Record:
    """The record of one step; None: of the highest. ValueError with the recorded steps if it is not there."""
    kept = _places(path)
    wanted = max(kept) if step is None else step
    if wanted not in kept:
        raise ValueError(f"step {wanted} is not recorded in {path}; recorded: {_listed(list(kept))}")
    record = _unpack(*kept[wanted])
    if record is None:
        raise ValueError(f"the record of step {wanted} in {path} cannot be read; recorded: {_listed(list(kept))}")
    return record


def steps(path: Path) -> list[int]:
    """The steps with a whole record, ascending. ValueError as :func:`read`."""
    return list(_places(path))


def pack(record: Record) -> bytes:
    """The bytes of one record."""
    arrays: list[bytes] = []
    tables = []
    for name, table in record.tables.items():
        table = table.detach().cpu().contiguous()
        sparse = table.dtype == torch.int64 and table.dim() > 1 and WIDE <= table.shape[-1] < 2**15
        stored = _sparse(table) if sparse else [table]
        arrays += [_bytes(part) for part in stored]
        described = [[_name(part.dtype), len(part.reshape(-1))] for part in stored] if sparse else None
        tables.append([name, _name(table.dtype), list(table.shape), described])
    head = json.dumps({"about": record.about, "rows": record.rows, "tables": tables}).encode()
    raw = b"".join([struct.pack("<I", len(head)), head, *arrays])
    deflate = zlib.compressobj(1, strategy=zlib.Z_RLE)  # bytes are grouped by significance: runs are all there is
    payload = deflate.compress(raw) + deflate.flush()
    rest = HEAD.pack(MAGIC, VERSION, 0, 0, record.step, len(payload), len(raw))[CRC_FROM:]
    crc = zlib.crc32(payload, zlib.crc32(rest))
    return HEAD.pack(MAGIC, VERSION, 0, crc, record.step, len(payload), len(raw)) + payload


def _places(path: Path) -> dict[int, tuple[tuple[Any, ...], memoryview]]:
    """Step -> (head, payload) of the last whole record of each step, ascending."""
    if not path.is_file():
        raise ValueError(f"no {path.name} in {path.parent}: it is written on the sampled steps of a run")
    data = path.read_bytes()
    kept = {head[4]: (head, payload) for head, payload in _scan(data)}
    if not kept:
        newer = any(version > VERSION for version in _versions(data))
        what = "only records of a newer mptrain: update this one" if newer else "no whole record"
        raise ValueError(f"{path} ({len(data)} bytes) holds {what}")
    return dict(sorted(kept.items()))


def _scan(data: bytes) -> Iterator[tuple[tuple[Any, ...], memoryview]]:
    """(head, payload) of every whole record; after anything else, on to the next magic."""
    view, at = memoryview(data), data.find(MAGIC)
    while at >= 0:
        start = at + HEAD.size
        head = HEAD.unpack_from(data, at) if start <= len(data) else None
        payload = view[start : start + head[5]] if head and head[5] <= len(data) - start else None
        whole = head is not None and payload is not None and head[1] == VERSION and head[6] <= MOST_BYTES
        if whole and head and payload is not None and _crc(view, at, payload) == head[3]:
            yield head, payload
            at = data.find(MAGIC, start + head[5])
        else:
            at = data.find(MAGIC, at + 1)


def _crc(view: memoryview, at: int, payload: memoryview) -> int:
    return zlib.crc32(payload, zlib.crc32(view[at + CRC_FROM : at + HEAD.size]))


def _versions(data: bytes) -> Iterator[int]:
    at = data.find(MAGIC)
    while 0 <= at <= len(data) - HEAD.size:
        yield HEAD.unpack_from(data, at)[1]
        at = data.find(MAGIC, at + 1)


def _unpack(head: tuple[Any, ...], payload: memoryview) -> Record | None:
    """The record behind a whole payload; None if what it says of itself does not fit (no mptrain wrote it)."""
    try:
        raw = zlib.decompressobj().decompress(payload, head[6] + 1)
        (length,) = struct.unpack_from("<I", raw)
        said = json.loads(raw[4 : 4 + length])
        reader = _Reader(bytearray(raw[4 + length :]))
        tables = {name: reader.table(DTYPES[dtype], shape, stored) for name, dtype, shape, stored in said["tables"]}
        rows = [(str(layer), str(role), str(fmt)) for layer, role, fmt in said["rows"]]
        return Record(head[4], dict(said["about"]), rows, tables)
    except (zlib.error, struct.error, ValueError, KeyError, TypeError, RuntimeError, IndexError):
        return None


class _Reader:
    """Takes arrays off a buffer, front to back."""

    def __init__(self, raw: bytearray) -> None:
        self.raw, self.at = raw, 0

    def take(self, dtype: torch.dtype, n: int) -> Tensor:
        if n == 0:
            return torch.empty(0, dtype=dtype)
        values = torch.frombuffer(self.raw, dtype=torch.uint8, count=n * dtype.itemsize, offset=self.at)
        self.at += n * dtype.itemsize
        return values.reshape(dtype.itemsize, n).t().clone(memory_format=torch.contiguous_format).view(dtype).reshape(n)

    def table(self, dtype: torch.dtype, shape: list[int], stored: list[tuple[str, int]] | None) -> Tensor:
        if stored is None:
            return self.take(dtype, math.prod(shape)).reshape(shape)
        per_row, strides, counts = (self.take(DTYPES[name], n).long() for name, n in stored)
        rows = torch.arange(len(per_row)).repeat_interleave(per_row)
        dense = torch.zeros(len(per_row), shape[-1], dtype=dtype)
        dense[rows, strides.cumsum(0)] = counts
        return dense.reshape(shape)


def _sparse(table: Tensor) -> list[Tensor]:
    """Entries per row, their columns, their counts: in the narrowest of the dtypes that hold them."""
    flat = table.reshape(-1, table.shape[-1])
    used = flat.sum(0).nonzero().flatten()  # tensors of a run share a tenth of the bins
    first = int(used[0]) if len(used) else 0
    part = flat[:, first : int(used[-1]) + 1 if len(used) else 0]
    rows, columns = part.nonzero(as_tuple=True)
    counts, columns = part[rows, columns], columns + first
    largest = int(counts.abs().max()) if len(counts) else 0
    narrow = torch.int16 if largest < 2**15 else torch.int32 if largest < 2**31 else torch.int64
    strides = torch.diff(columns.short(), prepend=torch.zeros(1, dtype=torch.int16))  # mostly 1: runs
    return [torch.bincount(rows, minlength=len(flat)).int(), strides, counts.to(narrow)]


def _bytes(table: Tensor) -> bytes:
    """Bytes of equal significance together, where they compress; numpy transposes them 10 times faster than torch."""
    flat: bytes = table.reshape(-1, 1).view(torch.uint8).numpy().T.tobytes() if table.numel() else b""
    return flat


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _listed(numbers: list[int], most: int = 12) -> str:
    if len(numbers) <= most:
        return ", ".join(map(str, numbers))
    half = most // 2
    return f"{', '.join(map(str, numbers[:half]))}, ... {', '.join(map(str, numbers[-half:]))} ({len(numbers)} steps)"

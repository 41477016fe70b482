"""The file of sampled steps: what goes in comes out, and whatever happens to the file, every whole record does."""

import os
import pickle
import struct
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mptrain.kernels.bins import N_BINS
from mptrain.telemetry import record
from mptrain.telemetry.record import Record

ROWS = [("blocks.0.mlp", "input", "fp8_e4m3"), ("blocks.0.mlp", "weight", ""), ("head ☃", "update", "bf16")]


def sample(step, rows=ROWS, seed=0):
    generator = torch.Generator().manual_seed(1000 * step + seed)
    n = len(rows)
    histogram = torch.zeros(n, N_BINS, dtype=torch.int64)
    for row in histogram:
        row[torch.randint(0, N_BINS, (20,), generator=generator)] = torch.randint(1, 2**20, (20,), generator=generator)
    tables = {
        "histogram": histogram,
        "counts": torch.randint(0, 99, (n, 5), generator=generator),
        "amax": torch.rand(n, generator=generator),
        "errors": torch.rand(n, 2, generator=generator, dtype=torch.float64),
    }
    return Record(step, {"loss_scale": 2.0**step}, list(rows), tables)


def same(a, b):
    assert (a.step, a.about, a.rows) == (b.step, b.about, b.rows)
    assert list(a.tables) == list(b.tables)
    for name, table in a.tables.items():
        assert table.dtype == b.tables[name].dtype
        assert table.shape == b.tables[name].shape
        assert torch.equal(bits(table), bits(b.tables[name])), name
    return True


def bits(table):
    return table.reshape(-1).contiguous().view(torch.uint8)


def file_of(tmp_path, *steps):
    path = tmp_path / record.FILE
    for step in steps:
        record.append(path, sample(step))
    return path


def test_what_is_appended_is_read_back_to_the_bit(tmp_path):
    path = file_of(tmp_path, 1, 10, 20)
    assert [same(found, sample(step)) for found, step in zip(record.read(path), (1, 10, 20), strict=True)]
    assert record.steps(path) == [1, 10, 20]
    same(record.read_step(path, 10), sample(10))
    same(record.read_step(path), sample(20))


@pytest.mark.parametrize("dtype", record.DTYPES.values(), ids=str)
@pytest.mark.parametrize("shape", [(2,), (2, 0), (2, 3, 4), (2, 1), (1,), (1, 1)])
def test_tables_of_any_dtype_and_shape(tmp_path, dtype, shape):
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (*shape[:-1], shape[-1] * dtype.itemsize)).byte()
    table = raw.view(dtype).reshape(shape) if raw.numel() else torch.empty(shape, dtype=dtype)  # NaN payloads too
    made = Record(3, {"odd": "x" * shape[-1]}, ROWS[: shape[0]], {"any": table, "again": table})
    record.append(tmp_path / "f", made)
    same(record.read_step(tmp_path / "f"), made)


@pytest.mark.parametrize("largest", [1, 2**15 - 1, 2**15, 2**31 - 1, 2**31, 2**62, -(2**40)])
def test_wide_counts_of_any_size_survive_their_sparse_form(tmp_path, largest):
    table = torch.zeros(3, 2, 256, dtype=torch.int64)
    table[0, 0, 0], table[0, 1, 255], table[2, 1, 7] = largest, 1, 5
    made = Record(1, {}, ROWS, {"blocks": table, "histogram": torch.zeros(3, N_BINS, dtype=torch.int64)})
    record.append(tmp_path / "f", made)
    same(record.read_step(tmp_path / "f"), made)
    assert (tmp_path / "f").stat().st_size < 1000


def test_a_record_without_rows_or_tables(tmp_path):
    for made in (Record(1, {}, [], {"histogram": torch.zeros(0, N_BINS, dtype=torch.int64)}), Record(2, {}, ROWS, {})):
        record.append(tmp_path / "f", made)
        same(record.read_step(tmp_path / "f", made.step), made)


def test_a_table_must_have_the_records_rows():
    with pytest.raises(ValueError, match="table counts has 2 rows, the record 3"):
        Record(1, {}, ROWS, {"counts": torch.zeros(2, 5)})


def test_a_file_cut_at_any_byte_of_its_last_record_keeps_the_ones_before(tmp_path):
    path = file_of(tmp_path, 1, 2)
    whole = path.stat().st_size
    record.append(path, sample(3))
    data = path.read_bytes()
    for end in range(whole, len(data)):
        path.write_bytes(data[:end])
        assert record.steps(path) == [1, 2], end
    path.write_bytes(data[: whole + 60])
    record.append(path, sample(4))  # the run goes on after the crash: its records follow the torn one
    assert [found.step for found in record.read(path)] == [1, 2, 4]
    same(record.read_step(path), sample(4))


def test_a_flipped_byte_costs_the_record_it_is_in_and_no_other(tmp_path):
    path = file_of(tmp_path, 1, 2, 3)
    data = bytearray(path.read_bytes())
    starts = [at for at in range(len(data)) if data[at:].startswith(record.MAGIC)]
    assert len(starts) == 3
    for at in range(starts[1], starts[2]):
        if starts[1] + 10 <= at < starts[1] + 12:
            continue  # two bytes of zeros that nothing reads
        data[at] ^= 0x41
        path.write_bytes(data)
        assert record.steps(path) == [1, 3], at - starts[1]
        data[at] ^= 0x41


@settings(max_examples=40, deadline=None)
@given(st.lists(st.one_of(st.binary(max_size=60), st.just(record.MAGIC), st.just(record.MAGIC[:5])), max_size=4))
def test_garbage_before_between_and_after_is_passed_over(tmp_path_factory, pieces):
    path = tmp_path_factory.mktemp("garbage") / "f"
    blobs = [record.pack(sample(step)) for step in (1, 2, 3)]
    parts = [*pieces, b"", b"", b"", b""][:4]
    path.write_bytes(b"".join(piece + blob for piece, blob in zip(parts, [*blobs, b""], strict=True)))
    assert record.steps(path) == [1, 2, 3]


def test_of_a_step_recorded_twice_the_last_counts(tmp_path):
    """A run stopped after step 30 and resumed from step 10 records 20 and 30 again."""
    path = file_of(tmp_path, 10, 20, 30)
    for step in (20, 30, 40):
        record.append(path, sample(step, seed=1))
    found = record.read(path)
    assert [one.step for one in found] == [10, 20, 30, 40]
    assert [same(one, sample(one.step, seed=int(one.step > 10))) for one in found]
    same(record.read_step(path, 20), sample(20, seed=1))


def test_a_file_without_a_record_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"no histograms\.bin in"):
        record.read(tmp_path / "histograms.bin")
    path = tmp_path / "f"
    for data in (b"", b"hello", record.pack(sample(1))[:-1]):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="no whole record"):
            record.read(path)
    newer = bytearray(record.pack(sample(1)))
    struct.pack_into("<H", newer, len(record.MAGIC), record.VERSION + 1)
    path.write_bytes(newer)
    with pytest.raises(ValueError, match="newer mptrain"):
        record.read_step(path)


def test_a_step_that_is_not_there_is_answered_with_those_that_are(tmp_path):
    path = file_of(tmp_path, *range(10, 400, 20))
    with pytest.raises(ValueError, match=r"step 40 is not recorded .* 10, 30, .*, \.\.\. .*390 \(20 steps\)"):
        record.read_step(path, 40)


def forged(head, arrays=b"", raw_bytes=None):
    """A record with a right CRC whose content is whatever ``head`` says."""
    raw = struct.pack("<I", len(head)) + head + arrays
    payload = zlib.compress(raw)
    sizes = (len(payload), len(raw) if raw_bytes is None else raw_bytes)
    rest = record.HEAD.pack(record.MAGIC, record.VERSION, 0, 0, 5, *sizes)[record.CRC_FROM :]
    crc = zlib.crc32(payload, zlib.crc32(rest))
    return record.HEAD.pack(record.MAGIC, record.VERSION, 0, crc, 5, *sizes) + payload


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("unpickled",)


@pytest.mark.parametrize(
    "head",
    [
        b"not json",
        b"[1, 2]",
        b'{"about": {}, "rows": []}',
        b'{"about": {}, "rows": [], "tables": [["x", "object", [1], null]]}',
        b'{"about": {}, "rows": [], "tables": [["x", "float32", [99999999], null]]}',
        b'{"about": {}, "rows": [], "tables": [["x", "float32", [-1], null]]}',
        b'{"about": {}, "rows": [["a", "b", ""]], "tables": [["x", "int64", [1, 300], '
        b'[["int64", 1], ["int64", 1], ["int64", 1]]]]}',
        pickle.dumps(Bomb()),
    ],
)
def test_a_forged_record_is_passed_over_and_runs_nothing(tmp_path, monkeypatch, head):
    monkeypatch.chdir(tmp_path)
    arrays = struct.pack("<3q", 1, 299, 2**40)[: 24 if b"300" in head else 0]
    path = file_of(tmp_path, 1)
    with path.open("ab") as file:
        file.write(forged(head, arrays) if b"300" not in head else forged(head.replace(b"300", b"256"), arrays))
    assert [found.step for found in record.read(path)] == [1]
    with pytest.raises(ValueError, match="step 5"):
        record.read_step(path, 5)
    assert not (tmp_path / "unpickled").exists()


def test_what_a_record_says_of_its_size_bounds_what_is_unpacked(tmp_path):
    path = file_of(tmp_path, 1)
    with path.open("ab") as file:
        file.write(forged(b"{}" + b" " * 10**7, raw_bytes=10))
        file.write(forged(b"{}", raw_bytes=2**40))
    assert [found.step for found in record.read(path)] == [1]


def test_a_full_disk_is_an_error_with_the_path():
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full on this system")
    from pathlib import Path

    with pytest.raises(OSError, match="No space left"):
        record.append(Path("/dev/full"), sample(1))

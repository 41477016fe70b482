"""Files as they come: cut short, missing, of either format; a cache that was torn, damaged or cannot be written."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mptrain.data import stdlib, tokens


def write_pair(folder, train=range(100), validation=range(50)):
    tokens.write_shard(folder / "train.bin", np.array(train))
    tokens.write_shard(folder / "val.bin", np.array(validation))
    return tokens.Config(str(folder / "train.bin"), str(folder / "val.bin"), block_size=4)


def test_both_formats_give_the_same_tokens(tmp_path):
    values = np.random.default_rng(0).integers(0, 50257, 1000, dtype=np.uint16)
    values.tofile(tmp_path / "nano.bin")
    tokens.write_shard(tmp_path / "llmc.bin", values)
    for name in ("nano.bin", "llmc.bin"):
        assert np.array_equal(tokens.open_shard(str(tmp_path / name)), values)
    header = np.fromfile(tmp_path / "llmc.bin", "<i4", count=256)
    assert header[:3].tolist() == [20240520, 1, 1000]
    assert not header[3:].any()
    assert os.path.getsize(tmp_path / "llmc.bin") == 1024 + 2000


def test_large_vocabularies_take_four_bytes(tmp_path):
    tokens.write_shard(tmp_path / "wide.bin", [0, 128255, 65536])
    assert tokens.open_shard(str(tmp_path / "wide.bin")).tolist() == [0, 128255, 65536]
    assert np.fromfile(tmp_path / "wide.bin", "<i4", count=3).tolist() == [20240801, 7, 3]


@given(cuts=st.lists(st.integers(1, 12), min_size=1, max_size=6), start=st.integers(0, 80), size=st.integers(0, 80))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_shards_read_like_the_joined_array(cuts, start, size):
    whole = np.arange(sum(cuts), dtype=np.uint16)
    joined = tokens.Shards(np.split(whole, np.cumsum(cuts)[:-1]))
    assert len(joined) == len(whole)
    assert np.array_equal(joined[start : start + size], whole[start : start + size])
    assert joined[start : start + size].dtype == whole.dtype


def test_shards_are_mapped_not_read(tmp_path):
    dataset = tokens.build(write_pair(tmp_path))
    parts = dataset.train_tokens.parts + dataset.validation_tokens.parts
    assert all(isinstance(part, np.memmap) for part in parts)


def test_the_fingerprint_follows_content_not_shards(tmp_path):
    whole = tokens.build(write_pair(tmp_path))
    tokens.write_shard(tmp_path / "part_0.bin", np.arange(30))
    tokens.write_shard(tmp_path / "part_1.bin", np.arange(30, 100))
    parts = tokens.Config(str(tmp_path / "part_*.bin"), str(tmp_path / "val.bin"), block_size=4)
    assert tokens.build(parts).fingerprint == whole.fingerprint
    assert tokens.build(write_pair(tmp_path, train=[*range(99), 3])).fingerprint != whole.fingerprint


@pytest.mark.parametrize("lost", [1, 2, 1000])
def test_a_shard_cut_short_is_named(tmp_path, lost):
    config = write_pair(tmp_path, train=range(1000))
    os.truncate(config.train, os.path.getsize(config.train) - lost)
    with pytest.raises(ValueError, match=r"train.bin: the header promises 1000 tokens, 3024 bytes, .* cut short"):
        tokens.build(config)


def test_headerless_files_must_hold_whole_tokens(tmp_path):
    for content in (b"", b"\x01\x00\x02"):
        (tmp_path / "train.bin").write_bytes(content)
        with pytest.raises(ValueError, match="not a whole number of 2-byte tokens"):
            tokens.open_shard(str(tmp_path / "train.bin"))


def test_an_unknown_header_version_is_an_error(tmp_path):
    np.array([20240520, 2, 0] + [0] * 253, "<i4").tofile(tmp_path / "train.bin")
    with pytest.raises(ValueError, match="header version 2 is not 1"):
        tokens.open_shard(str(tmp_path / "train.bin"))


def test_a_missing_file_is_answered_with_near_names(tmp_path):
    config = write_pair(tmp_path)
    with pytest.raises(ValueError, match=r"data.train=.*trian.bin: no such file; did you mean .*train.bin"):
        tokens.build(tokens.Config(str(tmp_path / "trian.bin"), config.validation, block_size=4))
    with pytest.raises(ValueError, match=r"data.validation=.*there is no folder .*absent"):
        tokens.build(tokens.Config(config.train, str(tmp_path / "absent" / "val_*.bin"), block_size=4))


def test_a_token_outside_the_vocabulary_is_found_where_it_is(tmp_path):
    config = write_pair(tmp_path, train=[*range(60), 5000, 1])
    with pytest.raises(ValueError, match=r"train.bin: token 5000 at position 60 .* set data.vocab_size=5001"):
        tokens.build(tokens.Config(config.train, config.validation, vocab_size=256, block_size=4))
    assert tokens.build(config).vocab_size == 5001


@pytest.mark.parametrize("wrong", [[], [-1, 3], [0.5], [[1, 2]], [2**32]])
def test_what_is_not_tokens_is_not_written(tmp_path, wrong):
    with pytest.raises(ValueError, match="integers from 0 to"):
        tokens.write_shard(tmp_path / "train.bin", wrong)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def library(tmp_path):
    """A small library and the Config that caches it."""
    for number in range(40):
        path = tmp_path / "lib" / "package" / f"module{number}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"answer = {number}\n".encode())
    for left_out in ("test/test_x.py", "site-packages/x.py", "deep/tests/y.py", "_sysconfigdata_x.py", "notes.txt"):
        path = tmp_path / "lib" / left_out
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"not in the corpus\n")
    return stdlib.Config(block_size=4, cache_dir=str(tmp_path / "cache"), root=str(tmp_path / "lib"))


def cache_files(config):
    return sorted(path for path in Path(config.cache_dir).rglob("*") if path.is_file())


def content(dataset):
    return bytes(dataset.train_tokens[:]), bytes(dataset.validation_tokens[:])


def test_the_corpus_is_the_sources_without_tests_split_by_path(library):
    train, validation = content(stdlib.build(library))
    lines = {f"answer = {number}\n" for number in range(40)}
    assert set(train.decode().splitlines(True)) | set(validation.decode().splitlines(True)) == lines
    assert len(train) + len(validation) == sum(map(len, lines))
    moved = stdlib.build(stdlib.Config(4, library.cache_dir, 0.5, library.root))
    assert set(validation.decode().splitlines()) < set(content(moved)[1].decode().splitlines())


def test_a_second_build_reads_the_cache_and_no_source(library, monkeypatch):
    first = stdlib.build(library)
    monkeypatch.setattr(stdlib, "collect", lambda *_: pytest.fail("the sources were read again"))
    second = stdlib.build(library)
    assert isinstance(second.train_tokens, np.memmap)
    assert (content(second), second.fingerprint) == (content(first), first.fingerprint)


@pytest.mark.parametrize("victim", ["train.bin", "validation.bin", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "empty", "gone", "flipped"])
def test_a_damaged_cache_is_rebuilt(library, victim, damage):
    whole = content(stdlib.build(library))
    path = next(path for path in cache_files(library) if path.name == victim)
    good = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes({"cut": good[:-3], "empty": b"", "flipped": good[:5] + b"\xff" + good[6:]}[damage])
    assert content(stdlib.build(library)) == whole
    assert path.read_bytes() == good


def test_an_interrupted_write_leaves_nothing_behind(library, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            stdlib.build(library)
    assert cache_files(library) == []
    assert len(stdlib.build(library).train_tokens) > 4
    assert [path.name for path in cache_files(library)] == ["manifest.json", "train.bin", "validation.bin"]


def test_a_cache_that_cannot_be_written_is_done_without(library, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_bytes(b"")
    without = stdlib.build(stdlib.Config(4, str(blocked / "cache"), library.validation_frac, library.root))
    assert content(without) == content(stdlib.build(library))
    assert without.fingerprint == stdlib.build(library).fingerprint


def test_a_changed_source_is_noticed(library):
    before = stdlib.build(library)
    (Path(library.root) / "package" / "module0.py").write_bytes(b"answer = 'another'\n")
    assert stdlib.build(library).fingerprint != before.fingerprint


def test_the_cache_goes_where_the_environment_says(library, tmp_path, monkeypatch):
    config = stdlib.Config(4, None, 0.1, library.root)
    monkeypatch.delenv("MPTRAIN_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    stdlib.build(config)
    monkeypatch.setenv("MPTRAIN_CACHE", str(tmp_path / "own"))
    stdlib.build(config)
    for name in ("xdg", "own"):
        assert len(list((tmp_path / name / "mptrain" / "data").iterdir())) == 1


def test_no_sources_and_no_split_are_errors(tmp_path):
    with pytest.raises(ValueError, match=r"no .py file in .*try data=tokens"):
        stdlib.build(stdlib.Config(4, str(tmp_path), root=str(tmp_path)))
    with pytest.raises(ValueError, match=r"validation_frac=1.0 .* try data.validation_frac=0.1"):
        stdlib.Config(validation_frac=1.0)


@pytest.mark.multi
def test_processes_that_start_together_agree(library):
    code = (
        "import sys; from mptrain.data import stdlib;"
        "print(stdlib.build(stdlib.Config(4, sys.argv[1], 0.1, sys.argv[2])).fingerprint)"
    )
    command = [sys.executable, "-c", code, library.cache_dir, library.root]
    home = Path(stdlib.__file__).parents[2]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=home) for _ in range(2)]
    answers = {process.communicate(timeout=60)[0].strip() for process in running}
    assert answers == {stdlib.build(library).fingerprint}
    assert [path.name for path in cache_files(library)] == ["manifest.json", "train.bin", "validation.bin"]


def test_the_real_library_is_the_corpus_described(tmp_path):
    dataset = stdlib.build(stdlib.Config(256, str(tmp_path)))
    size = len(dataset.train_tokens) + len(dataset.validation_tokens)
    assert 10e6 < size < 14e6
    assert 0.05 < len(dataset.validation_tokens) / size < 0.15
    frequency = np.bincount(dataset.train_tokens) / len(dataset.train_tokens)
    entropy_nats = -np.sum(frequency * np.log(frequency, where=frequency > 0, out=np.zeros_like(frequency)))
    assert 3.1 < entropy_nats < 3.4

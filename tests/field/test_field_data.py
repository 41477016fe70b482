"""Files that are no tokens, or tokens of another kind than they seem; batches in which there is nothing to learn."""

import gzip
import io
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import ranks
import torch
import torch.nn.functional as F
from torch import nn

import mptrain
from mptrain import Precision, World
from mptrain.data import tokens

ROOT = Path(mptrain.__file__).parent.parent
EVERY = ("fp32", "tf32", "bf16", "fp16", "fp8", "fp8-delayed", "fp8-rowwise", "fp8-block")
pytestmark = pytest.mark.usefixtures("one_thread")


def like_text(count, vocabulary=50257, seed=0):
    """Token ids as a corpus has them: small ones often, large ones seldom."""
    draw = np.random.default_rng(seed)
    return np.minimum(draw.zipf(1.2, count) + draw.integers(0, 40, count), vocabulary - 1)


IDS = like_text(20_000)
UNIFORM = np.random.default_rng(1).integers(0, 50257, 20_000)
CHARACTERS = np.random.default_rng(2).integers(0, 65, 20_000)


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def llm_c(array, width, magic, version, order):
    header = np.zeros(256, f"{order}i4")
    header[:3] = magic, version, len(array)
    return header.tobytes() + array.astype(f"{order}u{width}").tobytes()


def opened(folder, content, dtype="auto"):
    path = folder / "train.bin"
    path.write_bytes(content)
    return tokens.open_shard(str(path), dtype)


READ = {
    **{f"uint16 {name}": ids.astype("<u2").tobytes() for name, ids in (("text", IDS), ("uniform", UNIFORM))},
    "llm.c": llm_c(IDS, 2, 20240520, 1, "<"),
    "llm.c, wide": llm_c(IDS, 4, 20240801, 7, "<"),
    "llm.c, big-endian": llm_c(IDS, 2, 20240520, 1, ">"),
    "llm.c, wide, big-endian": llm_c(IDS, 4, 20240801, 7, ">"),
    **{f".npy {dtype}": npy(IDS.astype(dtype)) for dtype in ("<u2", ">u2", "<i4", "<u4", ">i8", "<i8")},
}


@pytest.mark.parametrize("kind", READ)
def test_what_says_or_shows_what_it_is_is_read(tmp_path, kind):
    wanted = UNIFORM if "uniform" in kind else IDS
    (tmp_path / "train.bin").write_bytes(READ[kind])
    assert np.array_equal(tokens.open_shard(str(tmp_path / "train.bin")), wanted)
    path = str(tmp_path / "train.bin")
    dataset = tokens.build(tokens.Config(path, path, vocab_size=50304, block_size=8))
    batch = dataset.batch(3, batch_size=2, seed=1)
    assert torch.equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])
    assert {*batch["tokens"].flatten().tolist()} <= {*wanted.tolist()}


def test_the_byte_order_is_not_part_of_the_content(tmp_path):
    prints = set()
    for kind in ("uint16 text", "llm.c", "llm.c, big-endian", ".npy <u2", ".npy >u2"):
        (tmp_path / "train.bin").write_bytes(READ[kind])
        path = str(tmp_path / "train.bin")
        prints.add(tokens.build(tokens.Config(path, path, block_size=8)).fingerprint)
    assert len(prints) == 1


@pytest.mark.parametrize("ids", [IDS, UNIFORM, CHARACTERS], ids=["text", "uniform", "characters"])
def test_small_vocabularies_and_short_files_are_tokens_too(tmp_path, ids):
    for count in (1, 7, 33, 64, 1000, 20_000):
        assert np.array_equal(opened(tmp_path, ids[:count].astype("<u2").tobytes()), ids[:count])


def archive():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        made.writestr("train.bin", IDS.astype("<u2").tobytes())
    return file.getvalue()


REFUSED = {  # what the message must hold
    "uint32": (IDS.astype("<u4").tobytes(), "4-byte tokens.*set data.dtype=uint32"),
    "uint32 uniform": (UNIFORM.astype("<u4").tobytes(), "4-byte tokens.*set data.dtype=uint32"),
    "uint32 Llama": (like_text(9000, 128_256).astype("<u4").tobytes(), "4-byte tokens.*set data.dtype=uint32"),
    "uint32 characters": (CHARACTERS.astype("<u4").tobytes(), "4-byte tokens.*set data.dtype=uint32"),
    "uint32 big-endian": (IDS.astype(">u4").tobytes(), "big-endian 4-byte tokens.*little-endian uint32"),
    "int64": (IDS.astype("<i8").tobytes(), "8-byte tokens.*write it again as little-endian uint32"),
    "big-endian": (IDS.astype(">u2").tobytes(), "big-endian 2-byte tokens.*write it again as little-endian"),
    "big-endian uniform": (UNIFORM.astype(">u2").tobytes(), "big-endian 2-byte tokens.*data.dtype=uint16"),
    "big-endian characters": (CHARACTERS.astype(">u2").tobytes(), "big-endian 2-byte tokens"),
    "gzip": (gzip.compress(IDS.astype("<u2").tobytes()), "gzip data, not tokens; .*unpack.*data.dtype"),
    "zip": (archive(), "a zip archive .*data.dtype=uint16"),
    "pickle": (pickle.dumps(IDS.tolist()), "a pickle"),
    "text": (b"First Citizen:\nBefore we proceed any further, hear me speak.\n" * 90, "this is text.*tokenize"),
    "short text": (b"First Citizen:\n", "this is text"),
    "UTF-8 text": ("Größe, naïve, 日本語\n".encode() * 400, "this is text"),
    "UTF-16 text": ("First Citizen".encode("utf-16"), "UTF-16 text"),
    "JSON": (b'[{"text": "First"}]' * 50 + b"\n", "this is text"),
    "parquet": (b"PAR1\x15\x04\x15" * 20, "a Parquet file"),
    "safetensors": ((60).to_bytes(8, "little") + b'{"x":{"dtype":"U16"}}'.ljust(60) + bytes(40), "a safetensors file"),
    "noise": (np.random.default_rng(3).bytes(1 << 17), "noise.*data.dtype"),
    ".npy float": (npy(IDS.astype("<f4")), "float32 of shape .*save it again as uint16"),
    ".npy 2-D": (npy(IDS.astype("<u2").reshape(10, -1)), r"of shape \[10, 2000\]"),
    ".npy cut": (npy(IDS.astype("<u2"))[:-7], "numpy cannot read this .npy file"),
    ".npy of objects": (npy(np.array([[1], None], dtype=object)), "numpy cannot read this .npy file"),
    "empty": (b"", "0 bytes are not a whole number"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_tokens_is_refused_with_a_way_on(tmp_path, kind):
    content, wanted = REFUSED[kind]
    with pytest.raises(ValueError, match=rf"(?s)train\.bin: .*{wanted}") as caught:
        opened(tmp_path, content)
    assert "vocab_size" not in str(caught.value)


def test_a_setting_says_what_a_file_without_a_header_holds(tmp_path):
    assert np.array_equal(opened(tmp_path, UNIFORM.astype("<u4").tobytes(), "uint32"), UNIFORM)
    assert np.array_equal(opened(tmp_path, b"ab" * 50, "uint16"), [0x6261] * 50)
    with pytest.raises(ValueError, match="6 bytes are not a whole number of 4-byte tokens"):
        opened(tmp_path, b"\x01\x00" * 3, "uint32")
    with pytest.raises(ValueError, match=r"data\.dtype=int8 .*set data\.dtype=auto, uint16 or uint32"):
        tokens.Config("a", "b", dtype="int8")


def test_a_wrong_vocabulary_is_not_the_answer_to_a_wrong_byte_order(tmp_path):
    """Too few to tell by their bytes; by the vocabulary they can be."""
    values = np.array([5, 300, 50_000, 199, 12, 7_000, 3, 41] * 2)
    path = tmp_path / "train.bin"
    path.write_bytes(values.astype(">u2").tobytes())
    with pytest.raises(ValueError, match="in the other byte order") as caught:
        tokens.build(tokens.Config(str(path), str(path), vocab_size=50304, block_size=4))
    assert "set data.vocab_size" not in str(caught.value)
    values[3] = -2
    path.write_bytes(npy(values))
    with pytest.raises(ValueError, match="token -2 is negative"):
        tokens.build(tokens.Config(str(path), str(path), vocab_size=50304, block_size=4))


# --- nothing to learn


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128))

    def forward(self, x, targets):
        return F.cross_entropy(self.body(x).float(), targets)


def prepared(name):
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    return model, Precision(name).prepare(model), optimizer


def batch(seed, ignored):
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(128, (128,), generator=generator)
    return torch.randn(128, 128, generator=generator), torch.full_like(targets, -100) if ignored else targets


def stepped(name, *micros, before=()):
    """The outcome of a step over these micro-batches, and the weights before and after it."""
    model, precision, optimizer = prepared(name)
    for group in (*before, micros):
        start = [p.detach().clone() for p in model.parameters()]
        for seed, ignored in group:
            with precision.forward():
                loss = model(*batch(seed, ignored))
            precision.backward(loss)
        outcome = precision.step(optimizer, clip=1.0)
        optimizer.zero_grad()
    return outcome, start, [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("name", EVERY)
def test_a_step_without_a_target_is_skipped_and_moves_nothing(name):
    for micros in ([(1, True)], [(1, True), (2, True)]):
        outcome, start, end = stepped(name, *micros, before=[[(0, False)]])
        assert not outcome.applied
        assert outcome.reason == "NaN loss of micro-batch 0, and no gradient: is every target ignored (-100)?"
        assert all(torch.equal(a, b) for a, b in zip(start, end, strict=True))


@pytest.mark.parametrize("name", EVERY)
def test_a_micro_batch_without_a_target_among_others_adds_nothing(name):
    kept, _, with_it = stepped(name, (1, False), (2, True))
    assert kept.applied
    if name != "fp8-delayed":  # whose scales are of all operands it has seen
        alone, _, without = stepped(name, (1, False))
        assert kept.grad_norm == alone.grad_norm
        assert all(torch.equal(a, b) for a, b in zip(with_it, without, strict=True))


def on_ranks(rank, ignored):
    model = Classifier()
    precision = Precision("bf16", ranks=World()).prepare(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    wrapped = nn.parallel.DistributedDataParallel(model)
    start = [p.detach().clone() for p in model.parameters()]
    with precision.forward():
        loss = wrapped(*batch(rank, ignored[rank]))
    precision.backward(loss)
    outcome = precision.step(optimizer)
    moved = any(not torch.equal(a, b) for a, b in zip(start, model.parameters(), strict=True))
    return outcome.applied, outcome.reason[:8], moved


@pytest.mark.multi
def test_all_ranks_must_have_nothing_to_learn():
    assert ranks.run(2, on_ranks, (False, True)) == [(True, "", True)] * 2
    assert ranks.run(2, on_ranks, (True, True)) == [(False, "NaN loss", False)] * 2


# --- kernels


def test_the_eager_quantizer_says_why(tmp_path):
    code = (
        "import torch; from mptrain import Precision; "
        "print(Precision('fp8').prepare(torch.nn.Sequential(torch.nn.Linear(16, 16))).backend.carrier)"
    )
    environment = os.environ | {"CC": "/bin/false", "MPTRAIN_CACHE": str(tmp_path), "PYTHONPATH": str(ROOT)}
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert (
        "eager quantizer (many times slower than compiled ones: /bin/false could not build the kernels" in said.stdout
    )

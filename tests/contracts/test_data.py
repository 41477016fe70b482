"""Every source in mptrain/data keeps the same promises: stateless order, whole samples, errors naming a setting."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mptrain import data
from mptrain.data import ImageDataset, Images, TokenDataset

YAMLS = sorted((Path(__file__).parents[2] / "conf" / "data").glob("*.yaml"))
BLOCK = 8


def library(folder):
    """A little tree of sources: enough files that both splits get some, and some that must be left out."""
    for number in range(60):
        path = folder / f"package{number % 3}" / f"module{number}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"# module {number}\nvalue = {number * number}\n".encode() * 4)
    return {"root": str(folder), "cache_dir": str(folder / "cache")}


def shards(folder):
    """Two training shards and one for validation, of tokens 0 to 96."""
    tokens = np.random.default_rng(0).integers(0, 97, 3000, dtype=np.uint16)
    for name, part in (("train_0", tokens[:1300]), ("train_1", tokens[1300:2400]), ("validation", tokens[2400:])):
        data.load("tokens").write_shard(folder / f"{name}.bin", part)
    return {"train": str(folder / "train_*.bin"), "validation": str(folder / "validation.bin")}


SMALL = {"stdlib": library, "tokens": shards, "digits": lambda folder: {}}
"""For each kind, settings of its Config that need no download: a new kind adds its own here."""
OF_INPUT = {kind: data.load(kind).INPUT for kind in data.kinds()}
TOKENS = [kind for kind, held in OF_INPUT.items() if held == "tokens"]
IMAGES = [kind for kind, held in OF_INPUT.items() if held == "images"]


def make(kind, folder, block_size=BLOCK):
    module = data.load(kind)
    sizes = {"block_size": block_size} if kind in TOKENS else {}
    return module.build(module.Config(**SMALL[kind](folder), **sizes))


@pytest.fixture(scope="module", params=data.kinds())
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def dataset(kind, tmp_path_factory):
    return make(kind, tmp_path_factory.mktemp(kind))


def test_every_kind_has_a_small_example():
    assert sorted(SMALL) == data.kinds()


def test_a_dataset_says_what_it_holds(dataset, kind, tmp_path):
    assert dataset.unit == OF_INPUT[kind]
    assert dataset.units_per_sample == (BLOCK if kind in TOKENS else 1)
    assert dataset.describe().startswith(f"{dataset.name}, ")
    assert dataset.unit in dataset.describe()
    assert all(size > 0 for size in dataset.sizes.values())
    assert len(dataset.fingerprint) == len(hashlib.sha256().hexdigest())
    assert make(kind, tmp_path).fingerprint == dataset.fingerprint


@pytest.mark.parametrize("kind", TOKENS, scope="module")
def test_batches_are_tokens_and_the_tokens_after_them(dataset):
    batch = dataset.batch(0, batch_size=5, seed=1)
    tokens, targets = batch["tokens"], batch["targets"]
    assert tokens.shape == targets.shape == (5, BLOCK)
    assert tokens.dtype == targets.dtype == torch.int64
    assert tokens.is_contiguous()
    assert targets.is_contiguous()
    assert torch.equal(tokens[:, 1:], targets[:, :-1])
    text = dataset.train_tokens[: len(dataset.train_tokens)].astype(np.int64)
    windows = {row.tobytes() for row in np.lib.stride_tricks.sliding_window_view(text, BLOCK + 1)}
    samples = torch.cat((tokens, targets[:, -1:]), dim=1).numpy()
    assert all(row.tobytes() in windows for row in samples)


def test_order_is_a_function_of_seed_and_step(dataset):
    def draw(step, seed):
        return inputs(dataset.batch(step, batch_size=16, seed=seed))

    assert torch.equal(draw(7, 3), draw(7, 3))
    assert not torch.equal(draw(7, 3), draw(8, 3))
    assert not torch.equal(draw(7, 3), draw(7, 4))
    assert not torch.equal(draw(3, 7), draw(7, 3))


@pytest.mark.parametrize(("microbatches", "world_size"), [(1, 1), (1, 4), (4, 1), (2, 2), (12, 1), (3, 4)])
def test_the_global_batch_is_the_same_however_it_is_split(dataset, microbatches, world_size):
    whole = dataset.batch(5, batch_size=12, seed=2)
    split = {"microbatches": microbatches, "world_size": world_size, "batch_size": 12 // (microbatches * world_size)}
    parts = [
        dataset.batch(5, micro=micro, rank=rank, seed=2, **split)
        for micro in range(microbatches)
        for rank in range(world_size)
    ]
    for key, value in whole.items():
        assert torch.equal(torch.cat([part[key] for part in parts]), value)


def test_positions_cover_the_whole_split(dataset):
    """A chi-square of 10 bins: below 33.7 with probability 0.9999 when starts are uniform (9 degrees of freedom)."""
    length = dataset.train_positions
    counting = TokenDataset("count", Position(length + BLOCK), Position(length + BLOCK), 2**31, BLOCK, "")
    starts = counting.batch(0, batch_size=5000, seed=0)["tokens"][:, 0].numpy()
    counts = np.histogram(starts, bins=10, range=(0, length))[0]
    assert ((counts - 500) ** 2 / 500).sum() < 33.7
    assert 0 <= starts.min() <= starts.max() < length


class Position:
    """Tokens that are their own positions."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return np.arange(*index.indices(self.length))


@pytest.mark.parametrize("kind", IMAGES, scope="module")
def test_batches_are_images_with_their_labels(dataset):
    batch = dataset.batch(0, batch_size=50, seed=1)
    images, labels = batch["images"], batch["labels"]
    sizes = dataset.sizes
    assert images.shape == (50, sizes["channels"], sizes["image_size"], sizes["image_size"])
    assert (images.dtype, labels.dtype, labels.shape) == (torch.float32, torch.int64, (50,))
    known = {image.tobytes(): label for image, label in zip(*dataset.train, strict=True)}
    assert [known[image.numpy().tobytes()] for image in images] == labels.tolist()
    assert 0 <= labels.min() <= labels.max() < sizes["classes"]
    images.zero_()
    assert dataset.batch(0, batch_size=50, seed=1)["images"].any(), "a batch is a copy"


@pytest.mark.parametrize("kind", IMAGES, scope="module")
def test_the_split_of_images_is_disjoint_and_of_all_classes_alike(dataset):
    train, held_out = dataset.train, dataset.held_out
    assert not {image.tobytes() for image in train.images} & {image.tobytes() for image in held_out.images}
    counts = [np.bincount(part.labels, minlength=dataset.classes) for part in (train, held_out)]
    share = counts[1] / (counts[0] + counts[1])
    assert share.max() - share.min() < 0.02
    (few,) = dataset.validation(2 * dataset.classes, 1)
    assert torch.bincount(few["labels"], minlength=dataset.classes).min() >= 1


def test_a_class_without_images_names_the_setting():
    images = np.zeros((4, 1, 2, 2), np.float32)
    train, held_out = Images(images, np.array([0, 1, 2, 2])), Images(images, np.array([0, 0, 2, 2]))
    with pytest.raises(ValueError, match=r"few: no validation image of class 1 among 4; try data.validation_frac=0.2"):
        ImageDataset("few", train, held_out, 3, "")


@given(
    length=st.integers(BLOCK + 1, 2000),
    batch_size=st.integers(1, 40),
    batches=st.integers(1, 40),
    seed=st.integers(0, 9),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_validation_blocks_never_overlap_and_are_whole(length, batch_size, batches, seed):
    dataset = TokenDataset("count", Position(50 + seed), Position(length), 2**31, BLOCK, "")
    got = list(dataset.validation(batch_size, batches))
    starts = torch.cat([batch["tokens"][:, 0] for batch in got])
    last = torch.cat([batch["targets"][:, -1] for batch in got])
    available = (length - 1) // BLOCK
    assert len({len(batch["tokens"]) for batch in got}) == 1
    assert len(starts) == (batch_size * batches if available >= batch_size * batches else len(starts)) <= available
    assert len(starts) >= min(available, batch_size)
    assert (starts.diff() >= BLOCK).all()
    assert last.max() < length


def inputs(batch):
    """What goes into the model: the first entry of a batch, the second being what should come out."""
    return next(iter(batch.values()))


def test_validation_is_the_same_each_time_and_reads_validation_data(dataset):
    first, again = list(dataset.validation(4, 3)), list(dataset.validation(4, 3))
    assert len(first) == 3
    for one, two in zip(first, again, strict=True):
        assert all(torch.equal(one[key], two[key]) for key in one)
    shown = torch.cat([inputs(batch) for batch in first])
    every = inputs(dataset.validation_at(list(range(dataset.validation_samples))))
    assert torch.equal(shown, every[[i * len(every) // 12 for i in range(12)]])


@pytest.mark.parametrize("kind", TOKENS, scope="module")
def test_validation_samples_are_blocks_one_after_the_other(dataset):
    batch = dataset.validation_at([0, 1])
    assert np.array_equal(batch["tokens"].flatten().numpy(), dataset.validation_tokens[: 2 * BLOCK])
    assert np.array_equal(batch["targets"].flatten().numpy(), dataset.validation_tokens[1 : 2 * BLOCK + 1])


@pytest.mark.parametrize("kind", TOKENS, scope="module")
def test_tokens_are_of_the_vocabulary(dataset):
    assert dataset.train_tokens[: len(dataset.train_tokens)].max() < dataset.vocab_size


@pytest.mark.parametrize("kind", TOKENS)
def test_data_shorter_than_a_sample_names_the_setting(kind, tmp_path):
    with pytest.raises(ValueError, match=r"too few for block_size=100000; set model.block_size=\d+ or less"):
        make(kind, tmp_path, block_size=100_000)
    with pytest.raises(ValueError, match=r"block_size=0 must be positive; try data.block_size=256"):
        make(kind, tmp_path, block_size=0)


@pytest.mark.parametrize(
    "wrong", [{"micro": 1}, {"rank": 2, "world_size": 2}, {"batch_size": 0}, {"seed": -1}, {"rank": -1}]
)
def test_impossible_slices_are_errors(dataset, wrong):
    with pytest.raises(ValueError, match=r"no micro-batch|must not be negative"):
        dataset.batch(0, **{"batch_size": 2, "seed": 0, **wrong})


def test_an_unknown_kind_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'stdlib'"):
        data.load("stdlb")


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_yaml_is_a_config_of_its_kind(path):
    lines = path.read_text().splitlines()
    chosen = yaml.safe_load(path.read_text())
    assert len(lines) <= 20
    assert lines[0].startswith(f"# python train.py data={path.stem}")
    assert next(iter(chosen)) == "kind"
    module = data.load(chosen.pop("kind"))
    assert module.Config(**chosen)

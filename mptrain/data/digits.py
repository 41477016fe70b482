"""Handwritten digits: 1,797 grey images of 8 x 8 pixels in 10 classes, shipped with scikit-learn; nothing to download.

The test half of UCI's Optical Recognition of Handwritten Digits (Alpaydin and Kaynak 1998), 13 writers. Every
fifth image of each class is held out, so a writer's digits are in both splits: the accuracy is for known writers.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mptrain.data import ImageDataset, Images, require_share

INPUT = "images"
SIZE, CLASSES = 8, 10


@dataclass(frozen=True)
class Config:
    """``validation_frac``: the share of each class that is held out."""

    validation_frac: float = 0.2

    def __post_init__(self) -> None:
        require_share("digits", self.validation_frac, 0.2)


def build(config: Config) -> ImageDataset:
    """Return the images, their pixels 0 to 16 mapped to -1 to 1 in steps of 1/8, exact in every 16-bit format."""
    from sklearn.datasets import load_digits  # lazy: importing scikit-learn takes a second

    pixels, labels = load_digits(return_X_y=True)
    images = (pixels / 8 - 1).astype(np.float32).reshape(-1, 1, SIZE, SIZE)
    train, held_out = (Images(images[part], labels[part].astype(np.int64)) for part in split(labels, config))
    content = hashlib.sha256()
    for array in (*train, *held_out):
        content.update(hashlib.sha256(array.tobytes()).digest())
    return ImageDataset("digits", train, held_out, CLASSES, content.hexdigest())


def split(labels: npt.NDArray[np.integer], config: Config) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Return indices of the training and of the validation images, evenly spaced within each class.

    Validation images are sorted by class, so that evenly spaced ones cover all classes equally.
    """
    held_out = []
    for label in range(CLASSES):
        members = np.flatnonzero(labels == label)
        share = np.floor(np.arange(len(members) + 1) * config.validation_frac)
        held_out.append(members[np.diff(share) > 0])
    validation = np.concatenate(held_out)
    return np.setdiff1d(np.arange(len(labels)), validation), validation

"""Data sets, their fixed split, and the batches that training reads."""

from typing import NamedTuple

import numpy as np

from Training import archives
from Training.recipe import InputError

SPLIT_SEED = 0  # of the held-out images: the same for every run, so that runs compare


class Examples(NamedTuple):
    """Images uint8 `(n, height, width, channels)` and labels int32 `(n,)`."""

    images: np.ndarray
    labels: np.ndarray


class Data(NamedTuple):
    """A data set, split: what is trained on, held out, and tested once at the end."""

    train: Examples
    validation: Examples
    test: Examples
    classes: tuple[str, ...]
    held_out: np.ndarray  # positions of the validation images in the official training set

    @property
    def mean(self):
        """Per-pixel mean of the training images, float32 `(height, width, channels)`."""
        return self.train.images.mean(axis=0, dtype="float64").astype("float32")

    def refuse_batch(self, batch_size):
        """Raise `InputError` where the training images do not fill one batch."""
        count = len(self.train.labels)
        if batch_size > count:
            raise InputError(f"batch_size={batch_size} needs as many images to train on, received {count}")


def digits():
    """scikit-learn's handwritten digits: 1,797 real images of 8x8, enlarged to 32x32 in three channels."""
    from sklearn.datasets import load_digits

    source = load_digits()
    pixels = np.kron(source.images, np.ones((1, 4, 4))) * (255 / 16)
    images = np.repeat(pixels[..., None], 3, axis=-1).round().astype("uint8")  # (1797, 32, 32, 3)
    labels = source.target.astype("int32")
    rest, test = _stratified(labels, 360)
    return images[rest], labels[rest], images[test], labels[test], tuple(str(n) for n in source.target_names)


def _stratified(labels, count):
    """Positions of the others and of `count` examples, with the same share of each class, both sorted."""
    from sklearn.model_selection import train_test_split

    positions = np.arange(len(labels))
    if count == 0:
        return positions, positions[:0]
    try:
        rest, chosen = train_test_split(positions, test_size=count, stratify=labels, random_state=SPLIT_SEED)
    except ValueError as error:
        raise InputError(f"{count} of {len(labels)} images cannot be split off by class: {error}") from None
    return np.sort(rest), np.sort(chosen)


def load(name, data_dir="", validation_split=0.1, samples=0):
    """Read a data set and hold out a fixed, stratified part of its training set.

    Args:
        name: "cifar10", "cifar100" or "digits".
        data_dir: see `archives.read`; not used for the digits.
        validation_split: share of the training set that is held out; 0 holds out nothing.
        samples: limit of images trained on, the same share of each class; 0 is no limit.

    Raises:
        InputError: the data cannot be had or is not what it should be, or the split leaves a class empty.
    """
    source = digits() if name == "digits" else archives.read(name, data_dir)
    images, labels, test_images, test_labels, classes = source
    kept, held_out = _stratified(labels, round(validation_split * len(labels)))
    if samples and samples < len(kept):
        kept = kept[_stratified(labels[kept], samples)[1]]
    return Data(
        train=Examples(images[kept], labels[kept]),
        validation=Examples(images[held_out], labels[held_out]),
        test=Examples(test_images, test_labels),
        classes=classes,
        held_out=held_out,
    )

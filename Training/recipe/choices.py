"""The choices of a recipe: data sets, augmentations and optimizers, one row each.

A row names the code that does the work as `module:name`, so that reading a recipe does not start a framework. To add an
entry, add a row here and the code that it names (see CONTRIBUTING.md).
"""

import importlib
import re
from typing import NamedTuple


class Dataset(NamedTuple):
    """A data set.

    The reader of images in memory takes `(name, data_dir)` and returns training images, training labels, test images,
    test labels and class names. The reader of streamed pictures takes `(name, data_dir, broken)` and returns
    `({"train": listing.Listing, ...}, class names)`.
    """

    reader: str
    streamed: bool = False  # pictures are decoded on demand, not held in memory
    mirrored: bool = True  # the mirror image of an image belongs to the same class
    named: bool = False  # the name continues after a colon, as in tfds:NAME


DATASETS = {
    "cifar10": Dataset("Training.data.archives:read"),
    "cifar100": Dataset("Training.data.archives:read"),
    "digits": Dataset("Training.data.datasets:read_digits", mirrored=False),
    "folder": Dataset("Training.data.folder:read", streamed=True),
    "shards": Dataset("Training.data.shards:read", streamed=True),
    "tfds": Dataset("Training.data.tfds:read", streamed=True, named=True),
}


class Augmentation(NamedTuple):
    """An augmentation: its help text, its layer, and the recipe's fields that are the layer's arguments."""

    help: str
    layer: str = ""  # "" for no augmentation
    fields: tuple[str, ...] = ()
    random_crops: bool = False  # random crops are cut from whole pictures during decoding, so they must be streamed


AUGMENTATIONS = {
    "affine": Augmentation(
        "rotation, shift, flip (the reference's)",
        "Training.engine.augmentation:RandomAffine",
        ("rotation", "shift", "flip"),
    ),
    "crop": Augmentation("pad 4, crop, flip (the paper's)", "Training.engine.augmentation:RandomCrop", ("flip",)),
    "imagenet": Augmentation(
        "crops of random scale and aspect ratio, flip, colour (the paper's), for streamed pictures",
        "Training.engine.augmentation:RandomLighting",
        ("flip",),
        random_crops=True,
    ),
    "none": Augmentation("no augmentation"),
}


class Optimizer(NamedTuple):
    """An optimizer: its class, its default learning rate, and the recipe's fields that are its arguments."""

    kind: str
    rate: float  # default learning rate
    fields: tuple[str, ...] = ()
    l2: bool = True  # L2 may be added to the gradient; False for optimizers that are defined with decoupled decay


# Default rates are those of Keras or, if they are meant for other tasks, of the optimizer's paper or of PyTorch. Not
# included: Ftrl, which is made for sparse linear models, and ScheduleFreeAdamW, which replaces the schedule and
# evaluates other weights than those it trains.
OPTIMIZERS = {
    "sgd": Optimizer("Training.engine.optimizers:SGD", 0.1, ("momentum",)),
    "adam": Optimizer("keras.optimizers:Adam", 1e-3),
    "adamw": Optimizer("keras.optimizers:AdamW", 1e-3, l2=False),
    "nadam": Optimizer("keras.optimizers:Nadam", 1e-3),
    "adamax": Optimizer("keras.optimizers:Adamax", 2e-3),
    "rmsprop": Optimizer("keras.optimizers:RMSprop", 1e-3),
    "adagrad": Optimizer("keras.optimizers:Adagrad", 1e-2),
    "adadelta": Optimizer("keras.optimizers:Adadelta", 1.0),
    "adafactor": Optimizer("keras.optimizers:Adafactor", 1e-2),
    "lion": Optimizer("keras.optimizers:Lion", 1e-4, l2=False),
    "lamb": Optimizer("keras.optimizers:Lamb", 2e-3, l2=False),
    "muon": Optimizer("Training.engine.optimizers:Muon", 2e-3, l2=False),
}


def describe_optimizers():
    """Return the help text of the field `learning_rate`."""
    rates = ", ".join(f"{name} {row.rate:g}" for name, row in OPTIMIZERS.items())
    return f"highest learning rate; 0 is the optimizer's default: {rates}"


def describe_augmentations():
    """Return the help text of the field `augmentation`."""
    return "; ".join(f"{name}: {row.help}" for name, row in AUGMENTATIONS.items())


def describe_datasets():
    """Return the help text of the field `dataset`."""
    return f"data set: {dataset_names()}"


def find_dataset(name):
    """Return the row of a data set.

    Raises:
        ValueError: no data set has this name.
    """
    key, colon, rest = name.partition(":")
    row = DATASETS.get(key)
    if row is None or row.named != bool(colon) or (colon and not re.fullmatch(r"\w[\w./:-]*", rest)):
        raise ValueError(f"must be one of {dataset_names()}, received {name!r:.80}")
    return row


def dataset_names():
    """Return the names of all data sets as a text for help and errors."""
    names = [f"{name}:NAME" if row.named else name for name, row in DATASETS.items()]
    return f"{', '.join(names[:-1])} or {names[-1]}"


def is_streamed(dataset):
    """Return whether the pictures of a data set are decoded on demand.

    Raises:
        ValueError: no data set has this name.
    """
    return find_dataset(dataset).streamed


def load_object(path):
    """Import the class or function that a row names as `module:name`."""
    module, name = path.split(":")
    return getattr(importlib.import_module(module), name)

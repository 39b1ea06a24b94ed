"""Data sets of TensorFlow Datasets by their name (`--dataset tfds:NAME`), an optional package."""

import contextlib
import io

import numpy as np

from Training.data.listing import Listing, digest
from Training.errors import InputError, shorten

VALIDATION = ("validation", "val")  # names that the catalogue's data sets use


def read(name, data_dir="", broken="skip"):
    """The parts of a data set for classification, prepared (and downloaded) where it is not yet.

    It is kept as ArrayRecord files, which give any example at once; pictures stay encoded until they are asked for.

    Args:
        name: "tfds:" and a name as `tensorflow_datasets.builder` takes it, such as "tfds:imagenette/160px-v2".
        data_dir: folder with the prepared data; "" is the package's own, `~/tensorflow_datasets`.

    Returns:
        `({"train": Listing, ...}, classes)`, as `folder.read` gives them.

    Raises:
        InputError: the package is not there, the data set cannot be had, or has no pictures with one class each.
    """
    name = name.removeprefix("tfds:")
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise InputError(f"--dataset tfds:{name} needs requirements-tfds.txt: {error}") from None
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            builder = tfds.builder(name, data_dir=data_dir or None, file_format="array_record")
            builder.download_and_prepare()
        sources = builder.as_data_source(decoders={"image": tfds.decode.SkipDecoding()})
        classes = tuple(builder.info.features["label"].names)
    # The package raises many kinds of errors, some of them pages long.
    except Exception as error:
        raise InputError(f"--dataset tfds:{name} cannot be had: {shorten(error)}") from None
    chosen = {"train": "train", "test": "test", "val": next((v for v in VALIDATION if v in sources), None)}
    parts = {part: _listing(name, split, sources[split]) for part, split in chosen.items() if split in sources}
    parts = {part: listing for part, listing in parts.items() if listing}
    if "train" not in parts:
        raise InputError(
            f"--dataset tfds:{name} has no training pictures with labels, only the parts {', '.join(sources)}"
        )
    return parts, classes


def _listing(name, split, source):
    """The pictures of a split, or None where it is empty or, as ImageNet's test set, without labels."""
    labels = np.asarray([example["label"] for example in source], "int32")
    if not len(labels) or labels.min() < 0:
        return None

    def fetch(i):
        return f"tfds:{name} {split} {i}", source[int(i)]["image"]

    return Listing(fetch, labels, digest(f"{name} {split}".encode() + labels.tobytes()))

"""Reads data sets of TensorFlow Datasets (`--dataset tfds:NAME`), an optional package."""

import contextlib
import io
from pathlib import Path

import numpy as np

from Training.console import warn
from Training.data.listing import Listing, digest, find_parts
from Training.errors import InputError, shorten
from Training.files import read_bytes, replace_file

LARGEST_LABELS = 2**30  # bytes of a file of labels, four bytes per label


def read(name, data_dir="", broken="skip"):
    """Read the parts of a data set for classification; download and prepare it if necessary.

    It is prepared as ArrayRecord files, which allow random access. Pictures are decoded on demand.

    Args:
        name: "tfds:" and a name as `tensorflow_datasets.builder` takes it, such as "tfds:imagenette/160px-v2".
        data_dir: folder with the prepared data; "" for the default of the package, `~/tensorflow_datasets`.

    Returns:
        `({"train": Listing, ...}, classes)`, as `folder.read`.

    Raises:
        InputError: the package is not installed, or the data set is not available or has no pictures with one class
            each.
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
    # The package raises many kinds of exceptions, some with pages of text.
    except Exception as error:
        raise InputError(f"--dataset tfds:{name} is not available: {shorten(error)}") from None
    chosen = find_parts(sources)
    parts = {
        part: _make_listing(name, split, sources[split], builder.data_dir, len(classes))
        for part, split in chosen.items()
    }
    parts = {part: listing for part, listing in parts.items() if listing}
    unused = [split for split in sources if split not in [chosen[part] for part in parts]]
    if unused:
        warn(f"not used of tfds:{name}: {', '.join(unused)}")
    if "train" not in parts:
        raise InputError(
            f"--dataset tfds:{name} has no training pictures with labels, only the parts {', '.join(sources)}"
        )
    return parts, classes


def read_labels(source, path):
    """Return the labels of a split, int32 `(n,)`, and keep them in a file: reading them means reading every record.

    Args:
        source: a sequence of examples.
        path: path of the file, in the folder of this version of the data set. If it cannot be used, the records are
            read; if it cannot be written, the next run reads them again.
    """
    with contextlib.suppress(Exception):  # a damaged file can raise nearly anything
        labels = np.load(io.BytesIO(read_bytes(path, LARGEST_LABELS)), allow_pickle=False)
        if labels.dtype == np.int32 and labels.shape == (len(source),):
            return labels
    labels = np.asarray([example["label"] for example in source], "int32")
    raw = io.BytesIO()
    np.save(raw, labels)
    with contextlib.suppress(OSError):
        replace_file(path, raw.getvalue())
    return labels


def _make_listing(name, split, source, folder, classes):
    """Return the pictures of a split, or None if it is empty or, like ImageNet's test set, has no labels."""
    labels = read_labels(source, Path(folder) / f"labels-{split}.npy")
    if not len(labels) or labels.min() < 0:
        return None
    if labels.max() >= classes:
        raise InputError(f"tfds:{name}, {split}: a label is {labels.max()}, and there are {classes} classes")

    def fetch(i):
        return f"tfds:{name} {split} {i}", source[int(i)]["image"]

    return Listing(fetch, labels, digest(f"{name} {split}".encode() + labels.tobytes()))

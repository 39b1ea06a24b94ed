"""Data sets of TensorFlow Datasets by their name (`--dataset tfds:NAME`), an optional package."""

import contextlib
import io
from pathlib import Path

import numpy as np

from Training.console import warn
from Training.data.listing import Listing, digest, find_parts
from Training.errors import InputError, shorten
from Training.files import read_bytes, replace_file

LARGEST_LABELS = 2**30  # bytes of a file of labels, four each


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
    chosen = find_parts(sources)
    parts = {part: _listing(name, split, sources[split], builder.data_dir) for part, split in chosen.items()}
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
    """The labels of a split, int32 `(n,)`; kept in a file, since reading them means reading every record.

    Args:
        source: a sequence of examples.
        path: of the file, which is in the folder of this version of the data set. If it cannot be used, the records are
            read; if it cannot be written, they are read in the next run too.
    """
    with contextlib.suppress(Exception):  # a broken file can raise nearly anything
        labels = np.load(io.BytesIO(read_bytes(path, LARGEST_LABELS)), allow_pickle=False)
        if labels.dtype == np.int32 and labels.shape == (len(source),):
            return labels
    labels = np.asarray([example["label"] for example in source], "int32")
    raw = io.BytesIO()
    np.save(raw, labels)
    with contextlib.suppress(OSError):
        replace_file(path, raw.getvalue())
    return labels


def _listing(name, split, source, folder):
    """The pictures of a split, or None if it is empty or, as ImageNet's test set, without labels."""
    labels = read_labels(source, Path(folder) / f"labels-{split}.npy")
    if not len(labels) or labels.min() < 0:
        return None

    def fetch(i):
        return f"tfds:{name} {split} {i}", source[int(i)]["image"]

    return Listing(fetch, labels, digest(f"{name} {split}".encode() + labels.tobytes()))

"""Pictures by the thousand in one file: `python -m Training.tools.shards` writes them, as TFRecord files.

A record is a `tf.train.Example` with the picture file as it was (`image/encoded`) and its class (`image/class/label`),
so that TensorFlow's own readers take the shards too. Beside them `index.npz` says where each picture's bytes lie: any
picture can be read at once, without TensorFlow, and an epoch's order is a permutation like every other's.
"""

import io
import os
import zipfile
from pathlib import Path

import numpy as np

from Training.data.listing import Listing, digest, refuse_missing
from Training.errors import InputError, format_path
from Training.files import open_file, read_bytes

INDEX = "index.npz"
LARGEST_INDEX = 256 * 2**20  # bytes: 8 million pictures
LARGEST_SHARD = 2**40  # bytes
COLUMNS = ("shard", "offset", "length", "label")


def shard_name(part, number, count):
    return f"{part}-{number:05d}-of-{count:05d}.tfrecord"


def read(name, data_dir, broken="skip"):
    """The parts of a folder of shards, as `folder.read` gives them.

    Raises:
        InputError: no index, a broken one, or a shard that is missing or too short.
    """
    refuse_missing(name, data_dir)
    path = Path(data_dir) / INDEX
    try:
        raw = read_bytes(path, LARGEST_INDEX)
        with np.load(io.BytesIO(raw), allow_pickle=False) as file:
            index = dict(file)
        classes = tuple(str(name) for name in index["classes"])
        names = [part for part in ("train", "val", "test") if f"{part}_label" in index]
        place = f"{os.path.realpath(path)} {path.stat().st_mtime_ns}"
        parts = {part: _listing(data_dir, part, index, len(classes), digest(raw), place) for part in names}
    except InputError:
        raise
    except OSError as error:
        raise InputError(
            f"{format_path(path)} cannot be read ({error.strerror or error}): --data-dir must be a folder that "
            "python -m Training.tools.shards wrote to its end"
        ) from None
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{format_path(path)} is no index of shards: {error}") from None
    if "train" not in parts:
        raise InputError(f"{format_path(path)} has no training pictures")
    return parts, classes


def _listing(data_dir, part, index, classes, identity, place):
    shard, offset, length, label = (index[f"{part}_{name}"] for name in COLUMNS)
    if not len(shard) == len(offset) == len(length) == len(label) > 0 or not 0 <= label.min() <= label.max() < classes:
        raise ValueError(f"the columns of {part} do not fit each other")
    count = int(shard.max()) + 1
    paths = [Path(data_dir) / shard_name(part, number, count) for number in range(count)]
    ends = np.zeros(count, "int64")
    np.maximum.at(ends, shard, offset + length)
    for path, end in zip(paths, ends):
        if path.stat().st_size < end:
            raise InputError(f"{format_path(path)} is truncated: it must have {end} bytes and more")

    def fetch(i):
        with open_file(paths[shard[i]], LARGEST_SHARD) as file:
            file.seek(offset[i])
            return f"{paths[shard[i]]}, byte {offset[i]}", file.read(length[i])

    return Listing(fetch, label.astype("int32"), identity, shard, f"{place} {part}")

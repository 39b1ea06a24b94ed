"""Pictures by the thousand in one file: `python -m Training.data.shards DIR OUT` writes TFRecord shards from a folder.

A record is a `tf.train.Example` with the picture file as it was (`image/encoded`) and its class (`image/class/label`),
so that TensorFlow's own readers take the shards too. Beside them `index.npz` says where each picture's bytes lie: any
picture can be read at once, without TensorFlow, and an epoch's order is a permutation like every other's.
"""

import os
import sys
import zipfile
from pathlib import Path

import numpy as np

from Training.data import folder
from Training.data.stream import Listing, hash_of
from Training.errors import InputError, one_line, shown
from Training.flags import Parser

INDEX = "index.npz"
COLUMNS = ("shard", "offset", "length", "label")
SHUFFLE_SEED = 0  # of the pictures' order in the shards: each shard is a sample of all classes


def shard_name(part, number, count):
    return f"{part}-{number:05d}-of-{count:05d}.tfrecord"


def write_part(part, listing, out, per_shard):
    """Write one part's shards, its pictures in random order; returns its columns of the index."""
    import tensorflow as tf

    order = np.random.default_rng(SHUFFLE_SEED).permutation(len(listing.labels))
    count = -(-len(order) // per_shard)
    rows = []
    for number in range(count):
        path, end = str(Path(out) / shard_name(part, number, count)), 0
        with tf.io.TFRecordWriter(path) as writer:
            for i in order[number * per_shard : (number + 1) * per_shard]:
                raw, label = Path(listing.fetch(i)[0]).read_bytes(), int(listing.labels[i])
                record = _example(tf.train, raw, label)
                writer.write(record)
                # A record is its length (8 bytes), a checksum of it (4), the bytes, and a checksum of them (4).
                rows.append((number, end + 12 + record.index(raw), len(raw), label))
                end += 12 + len(record) + 4
    return {f"{part}_{name}": np.asarray(column) for name, column in zip(COLUMNS, zip(*rows))}


def _example(train, raw, label):
    encoded = train.Feature(bytes_list=train.BytesList(value=[raw]))
    number = train.Feature(int64_list=train.Int64List(value=[label]))
    features = train.Features(feature={"image/encoded": encoded, "image/class/label": number})
    return train.Example(features=features).SerializeToString()


def write(data_dir, out, per_shard=1000, broken="skip"):
    """Write a folder of pictures (see `folder.read`) as shards and their index; returns the number of pictures.

    Raises:
        InputError: see `folder.read`; or `out` is there already or cannot be written.
    """
    import tensorflow as tf

    parts, classes = folder.read(data_dir, broken)
    try:
        Path(out).mkdir(parents=True)
        columns = {}
        for part, listing in parts.items():
            columns.update(write_part(part, listing, out, per_shard))
        # Last: a folder without the index is known to be unfinished.
        np.savez(Path(out) / INDEX, classes=np.asarray(classes), **columns)
    except FileExistsError:
        raise InputError(f"{out} is already there: name a folder that is not") from None
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error.strerror or error}") from None
    except tf.errors.OpError as error:
        raise InputError(f"{out} cannot be written: {one_line(error)}") from None
    return sum(len(listing.labels) for listing in parts.values())


def read(data_dir):
    """The parts of a folder of shards, as `folder.read` gives them.

    Raises:
        InputError: no index, a broken one, or a shard that is missing or too short.
    """
    path = Path(data_dir) / INDEX
    try:
        raw = path.read_bytes()
        with np.load(path, allow_pickle=False) as file:
            index = dict(file)
        classes = tuple(str(name) for name in index["classes"])
        names = [name for name in ("train", "val", "test") if f"{name}_label" in index]
        place = f"{os.path.realpath(path)} {path.stat().st_mtime_ns}"
        parts = {name: _listing(data_dir, name, index, len(classes), hash_of(raw), place) for name in names}
    except OSError as error:
        raise InputError(
            f"{shown(path)} cannot be read ({error.strerror or error}): --data-dir must be a folder that "
            "python -m Training.data.shards wrote to its end"
        ) from None
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{shown(path)} is no index of shards: {error}") from None
    if "train" not in parts:
        raise InputError(f"{shown(path)} has no training pictures")
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
            raise InputError(f"{shown(path)} is truncated: it must have {end} bytes and more")

    def fetch(i):
        with open(paths[shard[i]], "rb") as file:
            file.seek(offset[i])
            return f"{paths[shard[i]]}, byte {offset[i]}", file.read(length[i])

    return Listing(fetch, label.astype("int32"), identity, shard, f"{place} {part}")


def main(arguments=None):
    from Training.console import one_line_errors, start_keras

    parser = Parser(prog="python -m Training.data.shards", description="Write a folder of pictures as TFRecord shards.")
    parser.add_argument("folder", help="folder with train/<class>/* and, where there are, val/ and test/")
    parser.add_argument("out", help="folder that gets the shards and their index; it must not exist")
    parser.add_argument("--per-shard", type=int, default=1000, metavar="N", help="pictures in a shard (default: 1000)")
    parser.add_argument("--broken", choices=("skip", "refuse"), default="skip", help="pictures that cannot be read")
    words = parser.parse_args(arguments)
    with one_line_errors(parser.prog, "Stopped."):
        if words.per_shard < 1:
            raise InputError(f"--per-shard must be 1 or more, received {words.per_shard}")
        start_keras()  # quiets TensorFlow, which writes the records
        count = write(words.folder, words.out, words.per_shard, words.broken)
    print(f"{count:,} pictures in {words.out}")


if __name__ == "__main__":
    sys.exit(main())

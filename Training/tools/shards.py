"""Write a folder of pictures as TFRecord shards: `python -m Training.tools.shards DIR OUT`."""

import importlib.util
import os
from pathlib import Path

import numpy as np

from Training.console import entry_point, format_count, report_errors, run_program, start_keras
from Training.data import folder
from Training.data.shards import COLUMNS, INDEX, name_shard
from Training.errors import InputError, format_path, shorten
from Training.files import LARGEST_PICTURE, read_bytes
from Training.flags import Parser

SHUFFLE_SEED = 0  # shuffles the pictures, so that each shard is a sample of all classes


def write_part(part, listing, out, per_shard):
    """Write the shards of one part, with its pictures in random order; return its columns of the index."""
    import tensorflow as tf

    order = np.random.default_rng(SHUFFLE_SEED).permutation(len(listing.labels))
    count = -(-len(order) // per_shard)
    rows = []
    for number in range(count):
        path, end = os.fsencode(Path(out) / name_shard(part, number, count)), 0
        with tf.io.TFRecordWriter(path) as writer:
            for i in order[number * per_shard : (number + 1) * per_shard]:
                raw, label = read_bytes(listing.fetch(i)[0], LARGEST_PICTURE), int(listing.labels[i])
                record = _example(tf.train, raw, label)
                writer.write(record)
                # A record is its length (8 bytes), the checksum of that (4), the bytes, and their checksum (4).
                rows.append((number, end + 12 + record.index(raw), len(raw), label))
                end += 12 + len(record) + 4
    return {f"{part}_{name}": np.asarray(column) for name, column in zip(COLUMNS, zip(*rows))}


def _example(train, raw, label):
    encoded = train.Feature(bytes_list=train.BytesList(value=[raw]))
    number = train.Feature(int64_list=train.Int64List(value=[label]))
    features = train.Features(feature={"image/encoded": encoded, "image/class/label": number})
    return train.Example(features=features).SerializeToString()


def write(data_dir, out, per_shard=1000, broken="skip"):
    """Write a folder of pictures (see `folder.read`) as shards and their index; return the number of pictures.

    Raises:
        InputError: see `folder.read`; or `out` already exists or cannot be written.
    """
    import tensorflow as tf

    parts, classes = folder.read("folder", data_dir, broken)
    try:
        Path(out).mkdir(parents=True)
        columns = {}
        for part, listing in parts.items():
            columns.update(write_part(part, listing, out, per_shard))
        # The index is written last: a folder without it is unfinished.
        np.savez(Path(out) / INDEX, classes=np.asarray(classes), **columns)
    except FileExistsError:
        raise InputError(f"{format_path(out)} already exists: choose another folder") from None
    except OSError as error:
        raise InputError(f"{format_path(out)} cannot be written: {error.strerror or error}") from None
    except tf.errors.OpError as error:
        raise InputError(f"{format_path(out)} cannot be written: {shorten(error)}") from None
    return sum(len(listing.labels) for listing in parts.values())


@entry_point("python -m Training.tools.shards")
def main(arguments=None):
    """Run the command line."""
    parser = Parser(
        prog="python -m Training.tools.shards", description="Write a folder of pictures as TFRecord shards."
    )
    parser.add_argument("folder", help="folder with train/<class>/* and, optionally, val/ and test/")
    parser.add_argument("out", help="folder for the shards and their index, which must not exist")
    parser.add_argument("--per-shard", type=int, default=1000, metavar="N", help="pictures per shard (default: 1000)")
    parser.add_argument(
        "--broken", choices=("skip", "refuse"), default="skip",
        help="what to do with pictures that cannot be read (default: skip)",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    with report_errors(parser.prog, "Stopped."):
        if options.per_shard < 1:
            raise InputError(f"--per-shard must be 1 or more, received {options.per_shard}")
        if Path(options.out).exists():
            raise InputError(f"{format_path(options.out)} already exists: choose another folder")
        if not importlib.util.find_spec("tensorflow"):
            raise InputError("TensorFlow, which writes the records, is not installed: pip install tensorflow")
        start_keras()  # starts TensorFlow, which writes the records, without its notes
        count = write(options.folder, options.out, options.per_shard, options.broken)
    print(f"{format_count(count, 'picture')} in {format_path(options.out)}")


if __name__ == "__main__":
    run_program(main)

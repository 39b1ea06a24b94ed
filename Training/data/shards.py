"""Thousands of pictures in one file: TFRecord files that `python -m Training.tools.shards` writes.

A record is a `tf.train.Example` with the picture file as it was (`image/encoded`) and its class (`image/class/label`),
so that TensorFlow's own readers take the shards too. Next to them `index.npz` says where each picture's bytes are: any
picture can be read at once, without TensorFlow, and an epoch's order is a permutation as for other data sets.

Nothing in the index is trusted: types and ranges are checked before it is used, and the checksums of a record each time
that its picture is read.
"""

import io
import os
import struct
import zipfile
from pathlib import Path

import numpy as np

from Training.data.crc32c import compute_masked_crc32c
from Training.data.listing import PARTS, Listing, digest, refuse_missing
from Training.errors import InputError, format_path, shorten
from Training.files import LARGEST_PICTURE, open_file, read_bytes, refuse_special

INDEX = "index.npz"
COLUMNS = ("shard", "offset", "length", "label")
LARGEST_INDEX = 256 * 2**20  # bytes, packed and unpacked: 8 million pictures
LARGEST_SHARD = 2**40  # bytes
# A record is its length (8 bytes), the checksum of that (4), the Example, and the checksum of that (4).
HEADER, CHECKSUM = struct.Struct("<QI"), struct.Struct("<I")
AROUND = 128  # bytes of a record before and after its picture, at most; there are about 40 and 40


def shard_name(part, number, count):
    """The name of one of `count` shards."""
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
        index = load_index(raw, path)
        place = f"{os.path.realpath(path)} {path.stat().st_mtime_ns}"
        parts = {part: _listing(path, part, index, digest(raw), place) for part in PARTS if f"{part}_label" in index}
    except OSError as error:
        raise InputError(
            f"{format_path(error.filename or path)} cannot be read ({error.strerror or error}): --data-dir must be a "
            "folder that python -m Training.tools.shards wrote completely"
        ) from None
    if "train" not in parts:
        raise InputError(f"{format_path(path)} has no training pictures")
    return parts, tuple(index["classes"])


def load_index(raw, path):
    """The columns of an index, int64 `(n,)` by `<part>_<column>`, and the list of class names as "classes".

    Args:
        raw: the bytes of `index.npz`.
        path: names the file in messages.

    Raises:
        InputError: not an index, more than `LARGEST_INDEX` bytes unpacked, or a value of a wrong type or out of range.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as file:
            size = sum(member.file_size for member in file.infolist())
        if size > LARGEST_INDEX:
            raise ValueError(f"it unpacks to {size:,} bytes, more than {LARGEST_INDEX:,}")
        with np.load(io.BytesIO(raw), allow_pickle=False) as file:
            names = file["classes"]
            arrays = {
                part: {column: file[f"{part}_{column}"] for column in COLUMNS}
                for part in PARTS
                if f"{part}_label" in file
            }
        if names.ndim != 1 or names.dtype.kind != "U":
            raise ValueError(f"classes must be a row of texts, received {names.dtype} {names.shape}")
        index = {"classes": names.tolist()}
        for part, columns in arrays.items():
            index.update(_check_part(part, columns, len(names)))
    # A broken archive or array can raise nearly anything.
    except Exception as error:
        raise InputError(f"{format_path(path)} is not an index of shards: {shorten(error)}") from None
    return index


def _check_part(part, columns, classes):
    """The columns of one part as int64.

    Raises:
        ValueError: a wrong type, shape or value.
    """
    count = columns["label"].size
    limits = {"shard": count, "offset": 2**62, "length": LARGEST_PICTURE, "label": classes}  # below which they are
    checked = {}
    for name, values in columns.items():
        column = f"{part}_{name}"
        if values.dtype.kind not in "iu" or values.shape != (count,) or not count:
            raise ValueError(f"{column} must be {count or 'some'} integers, received {values.dtype} {values.shape}")
        low, high = int(values.min()), int(values.max())
        if low < 0 or high >= limits[name]:
            raise ValueError(f"{column} must be from 0 to {limits[name] - 1}, received {low if low < 0 else high}")
        checked[column] = values.astype("int64")
    return checked


def _listing(path, part, index, identity, place):
    shard, offset, length, label = (index[f"{part}_{name}"] for name in COLUMNS)
    count = int(shard.max()) + 1
    paths = [path.with_name(shard_name(part, number, count)) for number in range(count)]
    ends = np.zeros(count, "int64")
    np.maximum.at(ends, shard, offset + length)
    for file, end in zip(paths, ends):
        status = file.stat()
        refuse_special(file, status.st_mode)
        if status.st_size < end + CHECKSUM.size:
            raise InputError(f"{format_path(file)} is truncated: it must have more than {end + CHECKSUM.size} bytes")

    def fetch(i):
        file = paths[shard[i]]
        return f"{file}, byte {offset[i]}", read_picture(file, int(offset[i]), int(length[i]))

    return Listing(fetch, label.astype("int32"), identity, shard, f"{place} {part}")


def read_picture(path, offset, length):
    """The bytes of a picture in a shard, from a record whose checksums are right.

    The index says where the picture is, not where its record starts: that is the one place before it from which a
    length with its checksum leads to an end behind the picture.

    Args:
        path: of the shard.
        offset: int, position of the picture in bytes.
        length: int, bytes of the picture.

    Raises:
        InputError: there is no such record, or its checksum is wrong.
    """
    before = min(offset, HEADER.size + AROUND)
    with open_file(path, LARGEST_SHARD) as file:
        file.seek(offset - before)
        raw = file.read(before + length + AROUND + CHECKSUM.size)
    if len(raw) < before + length:
        raise InputError(f"{format_path(path)} is truncated: it ends within the picture at byte {offset}")
    for start in range(before - HEADER.size, -1, -1):
        size, checksum = HEADER.unpack_from(raw, start)
        end = start + HEADER.size + size
        if not before + length <= end <= len(raw) - CHECKSUM.size:
            continue
        if checksum == compute_masked_crc32c(raw[start : start + 8]):
            if CHECKSUM.unpack_from(raw, end)[0] == compute_masked_crc32c(raw[start + HEADER.size : end]):
                return raw[before : before + length]
            raise InputError(f"{format_path(path)}, byte {offset}: the record's checksum is wrong")
    raise InputError(f"{format_path(path)}, byte {offset}: no record with a right checksum is around the picture")

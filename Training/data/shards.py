"""Reads shards: TFRecord files with thousands of pictures each, written by `python -m Training.tools.shards`.

A record is a `tf.train.Example` with the unchanged picture file (`image/encoded`) and its class (`image/class/label`),
which TensorFlow's own readers can read too. The file `index.npz` next to the shards contains the position of each
picture, so any picture can be read directly, without TensorFlow, and epochs are shuffled as for other data sets.

The index is not trusted: its types and ranges are checked before it is used. The checksums of a record are checked each
time its picture is read.
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
AROUND = 128  # most bytes of a record before and after its picture; usually about 40 each


def name_shard(part, number, count):
    """Return the file name of one of `count` shards."""
    return f"{part}-{number:05d}-of-{count:05d}.tfrecord"


def read(name, data_dir, broken="skip"):
    """Read the parts of a folder of shards.

    Returns:
        `({"train": Listing, ...}, classes)`, as `folder.read`.

    Raises:
        InputError: the index is missing or invalid, or a shard is missing or too short.
    """
    refuse_missing(name, data_dir)
    path = Path(data_dir) / INDEX
    try:
        raw = read_bytes(path, LARGEST_INDEX)
        index = load_index(raw, path)
        place = f"{os.path.realpath(path)} {path.stat().st_mtime_ns}"
        parts = {
            part: _make_listing(path, part, index, digest(raw), place) for part in PARTS if f"{part}_label" in index
        }
    except OSError as error:
        raise InputError(
            f"{format_path(error.filename or path)} cannot be read ({error.strerror or error}): --data-dir must be a "
            "folder that python -m Training.tools.shards wrote completely"
        ) from None
    if "train" not in parts:
        raise InputError(f"{format_path(path)} has no training pictures")
    return parts, tuple(index["classes"])


def load_index(raw, path):
    """Return the columns of an index, `{"<part>_<column>": int64 (n,)}`, and the list of class names as "classes".

    Args:
        raw: the bytes of `index.npz`.
        path: path of the file, for messages.

    Raises:
        InputError: the bytes are not an index, unpack to more than `LARGEST_INDEX` bytes, or contain a value of a wrong
            type or out of range.
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
            raise ValueError(f"classes must be a vector of strings, received {names.dtype} {names.shape}")
        index = {"classes": names.tolist()}
        for part, columns in arrays.items():
            index.update(_check_part(part, columns, len(names)))
    # A damaged archive or array can raise nearly anything.
    except Exception as error:
        raise InputError(f"{format_path(path)} is not an index of shards: {shorten(error)}") from None
    return index


def _check_part(part, columns, classes):
    """Return the columns of one part as int64.

    Raises:
        ValueError: a column has a wrong type, shape or value.
    """
    count = columns["label"].size
    limits = {"shard": count, "offset": 2**62, "length": LARGEST_PICTURE, "label": classes}  # exclusive
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


def _make_listing(path, part, index, identity, place):
    shard, offset, length, label = (index[f"{part}_{name}"] for name in COLUMNS)
    count = int(shard.max()) + 1
    paths = [path.with_name(name_shard(part, number, count)) for number in range(count)]
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
    """Return the bytes of a picture in a shard, after checking the checksums of its record.

    The index contains the position of the picture, not of its record. The record starts at the one place before the
    picture where a length with a correct checksum reaches beyond the picture.

    Args:
        path: path of the shard.
        offset: int, position of the picture in bytes.
        length: int, length of the picture in bytes.

    Raises:
        InputError: there is no such record, or its checksum is wrong.
    """
    before = min(offset, HEADER.size + AROUND)
    with open_file(path, LARGEST_SHARD) as file:
        file.seek(offset - before)
        raw = file.read(before + length + AROUND + CHECKSUM.size)
    if len(raw) < before + length:
        raise InputError(f"{format_path(path)} is truncated: it ends inside the picture at byte {offset}")
    for start in range(before - HEADER.size, -1, -1):
        size, checksum = HEADER.unpack_from(raw, start)
        end = start + HEADER.size + size
        if not before + length <= end <= len(raw) - CHECKSUM.size:
            continue
        if checksum == compute_masked_crc32c(raw[start : start + 8]):
            if CHECKSUM.unpack_from(raw, end)[0] == compute_masked_crc32c(raw[start + HEADER.size : end]):
                return raw[before : before + length]
            raise InputError(f"{format_path(path)}, byte {offset}: the record's checksum is wrong")
    raise InputError(f"{format_path(path)}, byte {offset}: the picture is not in a record with correct checksums")

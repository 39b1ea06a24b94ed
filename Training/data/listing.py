"""What is known of a set of pictures before any is decoded."""

import hashlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from Training.errors import InputError

PARTS = ("train", "val", "test")
VALIDATION = ("val", "valid", "validation", "dev")  # usual names of the part "val"


def find_parts(names):
    """Which of the names of folders or splits are the parts of a data set, `{part: name}`.

    Raises:
        InputError: two of them are usual names of the same part.
    """
    held_out = [name for name in VALIDATION if name in names]
    if len(held_out) > 1:
        raise InputError(f"{' and '.join(held_out)} are both there, and each may be the validation set: rename one")
    found = {"train": "train", "val": held_out[0] if held_out else "", "test": "test"}
    return {part: name for part, name in found.items() if name in names}


class Listing(NamedTuple):
    """What is known of a set of pictures before any is decoded."""

    fetch: Callable  # from a position to `(name, raw)`; raw is None where the name is a file's path
    labels: np.ndarray  # int32 (n,)
    identity: str  # a digest that changes when pictures are added, removed or resized
    shard: np.ndarray | None = None  # (n,), the file that holds each picture, where one holds many
    place: str = ""  # where the pictures lie, and since when: a cache of them is for these alone


def digest(raw):
    """SHA-256 of bytes, in hexadecimal digits."""
    return hashlib.sha256(raw).hexdigest()


def refuse_missing(name, data_dir):
    """Raise `InputError` if a data set that lies in a folder was given none."""
    if not data_dir:
        raise InputError(f"dataset={name} needs its folder: give --data-dir")

"""Listings of pictures: what is known about them before any is decoded."""

import hashlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from Training.errors import InputError

PARTS = ("train", "val", "test")
VALIDATION = ("val", "valid", "validation", "dev")  # common names of the part "val"


def find_parts(names):
    """Return which names of folders or splits are the parts of a data set, as `{part: name}`.

    Raises:
        InputError: two of them are names of the validation set.
    """
    held_out = [name for name in VALIDATION if name in names]
    if len(held_out) > 1:
        raise InputError(f"{' and '.join(held_out)} could both be the validation set: rename one")
    found = {"train": "train", "val": held_out[0] if held_out else "", "test": "test"}
    return {part: name for part, name in found.items() if name in names}


class Listing(NamedTuple):
    """What is known about a set of pictures before any is decoded."""

    fetch: Callable  # from a position to `(name, raw)`; raw is None if the name is the path of a file
    labels: np.ndarray  # int32 (n,)
    identity: str  # a digest that changes when pictures are added, removed or resized
    shard: np.ndarray | None = None  # (n,), the number of each picture's shard, or None for single files
    place: str = ""  # the pictures' location and times of change, which identify a cache of them


def digest(raw):
    """Return the SHA-256 of bytes in hexadecimal digits."""
    return hashlib.sha256(raw).hexdigest()


def refuse_missing(name, data_dir):
    """Raise `InputError` if no folder is given for a data set that needs one."""
    if not data_dir:
        raise InputError(f"dataset={name} needs its folder: give --data-dir")

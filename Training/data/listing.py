"""Listings of pictures: what is known about them before any is decoded."""

import hashlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from Training.errors import InputError, format_path

PARTS = ("train", "val", "test")
# Common names of each part, in lower case; folders may have capitals.
COMMON = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev", "eval"),
    "test": ("test", "testing"),
}


def find_parts(names):
    """Return which names of folders or splits are the parts of a data set, as `{part: name}`.

    Raises:
        InputError: two of them are names of one part.
    """
    found = {part: [name for name in names if name.lower() in common] for part, common in COMMON.items()}
    for part, candidates in found.items():
        if len(candidates) > 1:
            what = {"train": "training", "val": "validation", "test": "test"}[part]
            there = " and ".join(map(format_path, candidates))
            raise InputError(f"{there} could both be the {what} set: rename one")
    return {part: candidates[0] for part, candidates in found.items() if candidates}


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

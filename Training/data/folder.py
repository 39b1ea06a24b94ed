"""Own pictures in folders, one a class."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from Training.console import warn
from Training.data import decoding
from Training.data.listing import Listing, digest, refuse_missing
from Training.devices import count_cores
from Training.errors import InputError, format_path
from Training.files import LARGEST_PICTURE, open_file

# How whole files of the two common formats begin and end.
WHOLE = {b"\xff\xd8\xff": b"\xff\xd9", b"\x89PNG\r\n\x1a\n": b"IEND\xaeB`\x82"}


class Scanned(NamedTuple):
    """The files of one class: names, sizes, times of those that can be read, and a line for each of the others."""

    names: list[str]
    sizes: list[int]
    times: list[int]  # of the last change, ns
    broken: list[str]


def looks_whole(path):
    """Whether a file begins and ends as a whole JPEG or PNG file does; False says nothing."""
    try:
        with open_file(path, LARGEST_PICTURE) as file:
            head = file.read(8)
            file.seek(-8, os.SEEK_END)
            tail = file.read()
    except (InputError, OSError):
        return False
    return any(head.startswith(first) and tail.endswith(last) for first, last in WHOLE.items())


def scan(folder, decode):
    """The pictures right in a folder, sorted by name, hidden files left out.

    What looks like a whole JPEG or PNG file is taken for one, unless `decode` asks to decode every file; all others
    are decoded once.
    """
    found = Scanned([], [], [], [])
    with os.scandir(folder) as entries:
        files = sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)
    for entry in files:
        if decode or not looks_whole(entry.path):
            try:
                decoding.read(entry.path)
            except InputError as error:
                found.broken.append(str(error))
                continue
        found.names.append(entry.name)
        found.sizes.append(entry.stat().st_size)
        found.times.append(entry.stat().st_mtime_ns)
    return found


def class_folders(folder):
    """Names of the folders in a folder, sorted; hidden ones left out.

    Raises:
        InputError: there is none.
    """
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise InputError(f"{format_path(folder)} cannot be read: {error.strerror}") from None
    if not names:
        raise InputError(
            f"{format_path(folder)} must have a folder for each class, and has none: move each picture into "
            f"{Path(folder).name}/<class>/ (for ImageNet's flat val, by the labels of its development kit)"
        )
    return names


def listing(folder, classes, broken="skip"):
    """The pictures of one part, in the order of classes and names.

    Args:
        folder: path, with a folder for each class.
        classes: names of all classes, whose positions are the labels.
        broken: "skip" names on the standard error what cannot be read; "refuse" decodes every file at once.

    Returns:
        `listing.Listing`.

    Raises:
        InputError: a class that is not in `classes` or cannot be read, no picture at all, or a broken one to refuse.
    """
    names = class_folders(folder)
    unknown = sorted(set(names) - set(classes))
    if unknown:
        raise InputError(f"{format_path(folder)} has classes that train/ lacks: {', '.join(unknown):.200}")
    with ThreadPoolExecutor(2 * count_cores()) as pool:
        try:
            found = list(pool.map(lambda name: scan(Path(folder) / name, broken == "refuse"), names))
        except OSError as error:
            raise InputError(f"{format_path(error.filename)} cannot be read: {error.strerror}") from None
    report_broken(folder, [line for each in found for line in each.broken], broken)
    paths = [f"{folder}/{name}/{file}" for name, each in zip(names, found) for file in each.names]
    if not paths:
        raise InputError(f"{format_path(folder)} has no picture that can be read")
    labels = np.repeat([classes.index(name) for name in names], [len(each.names) for each in found]).astype("int32")
    identity = repr([(name, each.names, each.sizes) for name, each in zip(names, found)])
    place = repr((os.path.realpath(folder), [each.times for each in found]))
    return Listing(lambda i: (paths[i], None), labels, digest(identity.encode(errors="surrogateescape")), place=place)


def report_broken(folder, lines, broken):
    """Name each picture that cannot be read, or refuse them."""
    if lines and broken == "refuse":
        raise InputError(
            f"{len(lines)} files in {format_path(folder)} cannot be read: {lines[0]}; mend or remove them, or give "
            "--broken skip"
        )
    for line in lines:
        warn(f"skipped: {line}")
    if lines:
        warn(f"{len(lines)} files in {format_path(folder)} are no pictures that can be read, and were skipped")


def read(name, data_dir, broken="skip"):
    """The parts of a folder with `train/<class>/*` and, where they are there, `val/<class>/*` and `test/<class>/*`.

    Returns:
        `({"train": Listing, ...}, classes)`; the classes are the folders of train/, sorted.

    Raises:
        InputError: see `listing`; or no train/, or a class there without a picture.
    """
    refuse_missing(name, data_dir)
    root = Path(data_dir)
    if not (root / "train").is_dir():
        raise InputError(f"--data-dir {format_path(root)} must have train/<class>/, and has no folder train")
    classes = class_folders(root / "train")
    parts = {part: listing(root / part, classes, broken) for part in ("train", "val", "test") if (root / part).is_dir()}
    empty = [classes[i] for i in np.flatnonzero(np.bincount(parts["train"].labels, minlength=len(classes)) == 0)]
    if empty:
        raise InputError(f"{format_path(root / 'train')} has classes without a picture: {', '.join(empty):.200}")
    return parts, tuple(classes)

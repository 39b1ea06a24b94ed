"""Reads your own pictures from one folder per class."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from Training.console import format_count, warn
from Training.data import decoding
from Training.data.listing import Listing, digest, find_parts, refuse_missing
from Training.devices import count_cores
from Training.errors import InputError, format_path
from Training.files import LARGEST_PICTURE, open_file

# How whole files of the two common formats begin and end.
WHOLE = {b"\xff\xd8\xff": b"\xff\xd9", b"\x89PNG\r\n\x1a\n": b"IEND\xaeB`\x82"}
MOST_NAMED = 10  # unused files named in a warning


class Scanned(NamedTuple):
    """The pictures of one class, and a message for each file that cannot be read."""

    names: list[str]
    sizes: list[int]
    times: list[int]  # of the last change, ns
    broken: list[str]


def looks_whole(path):
    """Return whether a file begins and ends like a complete JPEG or PNG file; other pictures give False."""
    try:
        with open_file(path, LARGEST_PICTURE) as file:
            head = file.read(8)
            file.seek(-8, os.SEEK_END)
            tail = file.read()
    except (InputError, OSError):
        return False
    return any(head.startswith(first) and tail.endswith(last) for first, last in WHOLE.items())


def scan(folder, decode):
    """Return the pictures directly in a folder, sorted by name, without hidden files.

    Files that look like complete JPEG or PNG files are accepted, unless `decode` is True. All others are decoded once.
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


def _list(folder):
    """Return the names of the directories and of the other files in a directory, both sorted, without hidden ones."""
    try:
        with os.scandir(folder) as entries:
            found = sorted((entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith("."))
    except OSError as error:
        raise InputError(f"{format_path(folder)} cannot be read: {error.strerror}") from None
    return [name for name, is_folder in found if is_folder], [name for name, is_folder in found if not is_folder]


def list_classes(folder):
    """Return the sorted names of the directories in a directory, without hidden ones.

    Raises:
        InputError: there are none.
    """
    names, _ = _list(folder)
    if not names:
        raise InputError(
            f"{format_path(folder)} must contain a folder for each class, but has none: move each picture into "
            f"{Path(folder).name}/<class>/ (for ImageNet's flat val, by the labels of its development kit)"
        )
    return names


def list_part(folder, classes, broken="skip"):
    """Return the pictures of one part, in the order of classes and names.

    Args:
        folder: path with a folder for each class.
        classes: names of all classes, whose positions are the labels.
        broken: "skip" warns about files that cannot be read; "refuse" decodes every file now, and raises an error.

    Returns:
        `listing.Listing`.

    Raises:
        InputError: a class is not in `classes` or cannot be read, there is no picture at all, or `broken="refuse"`
            and a file cannot be read.
    """
    names = list_classes(folder)
    unknown = sorted(set(names) - set(classes))
    if unknown:
        raise InputError(f"{format_path(folder)} has classes that are missing in train/: {', '.join(unknown):.200}")
    with ThreadPoolExecutor(2 * count_cores()) as pool:
        try:
            found = list(pool.map(lambda name: scan(Path(folder) / name, broken == "refuse"), names))
        except OSError as error:
            raise InputError(f"{format_path(error.filename)} cannot be read: {error.strerror}") from None
    report_broken(folder, [line for each in found for line in each.broken], broken)
    paths = [f"{folder}/{name}/{file}" for name, each in zip(names, found) for file in each.names]
    if not paths:
        raise InputError(f"{format_path(folder)} has no readable picture")
    labels = np.repeat([classes.index(name) for name in names], [len(each.names) for each in found]).astype("int32")
    identity = repr([(name, each.names, each.sizes) for name, each in zip(names, found)])
    place = repr((os.path.realpath(folder), [each.times for each in found]))
    return Listing(lambda i: (paths[i], None), labels, digest(identity.encode(errors="surrogateescape")), place=place)


def report_broken(folder, lines, broken):
    """Warn about each file that cannot be read or, if `broken` is "refuse", raise `InputError`."""
    if lines and broken == "refuse":
        raise InputError(
            f"{format_count(len(lines), 'file')} in {format_path(folder)} cannot be read: {lines[0]}; repair or remove "
            "them, or give --broken skip"
        )
    for line in lines:
        warn(f"skipped: {line}")
    if lines:
        warn(f"{format_count(len(lines), 'file')} in {format_path(folder)} skipped: not readable as pictures")


def report_unused(root, parts):
    """Warn in one line about files and folders that belong to no class of a part; hidden ones are left out."""
    folders, unused = _list(root)
    unused += [f"{name}/" for name in folders if name not in parts]
    unused += [f"{name}/{file}" for name in parts for file in _list(root / name)[1]]
    if unused:
        names = [format_path(name) for name in sorted(unused)]
        more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
        warn(f"not used in {format_path(root)}: {', '.join(names[:MOST_NAMED])}{more}")


def read(name, data_dir, broken="skip"):
    """Read the parts of a folder with `train/<class>/*` and, optionally, `val/<class>/*` and `test/<class>/*`.

    The parts may have other common names, see `listing.COMMON`. A warning names files that are not used.

    Returns:
        `({"train": Listing, ...}, classes)`; the classes are the folders of train/, sorted.

    Raises:
        InputError: see `list_part`; or there is no train/, there are two folders for a part, or a class has no training
            picture.
    """
    refuse_missing(name, data_dir)
    root = Path(data_dir)
    if not root.is_dir():
        raise InputError(f"--data-dir {format_path(root)}: not a directory")
    folders = find_parts(_list(root)[0])
    if "train" not in folders:
        raise InputError(f"--data-dir {format_path(root)} must contain train/<class>/, but has no folder train")
    report_unused(root, folders.values())
    train = root / folders["train"]
    classes = list_classes(train)
    parts = {part: list_part(root / folder, classes, broken) for part, folder in folders.items()}
    empty = [classes[i] for i in np.flatnonzero(np.bincount(parts["train"].labels, minlength=len(classes)) == 0)]
    if empty:
        raise InputError(f"{format_path(train)} has classes without a picture: {', '.join(empty):.200}")
    return parts, tuple(classes)

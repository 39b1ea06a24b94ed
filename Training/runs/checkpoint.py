"""Checkpoints that survive an interruption at any moment.

Keras' `BackupAndRestore` overwrites its only file in place, so that a kill during a save loses it, and it stores
neither the metrics within an epoch nor the state of callbacks. Here a checkpoint is one file with its own checksum. It
is written next to the others, synced, renamed and read back. The two newest are kept.
"""

import hashlib
import io
import json
import math
import re
import zipfile
from pathlib import Path

import numpy as np

from Training.errors import RunError, format_path, shorten
from Training.files import LARGEST_CHECKPOINT, read_bytes, replace_file, sync_directory

MAGIC = b"residual-attention checkpoint 2\n"
POSITIONAL = b"residual-attention checkpoint 1\n"  # arrays without names, written by earlier versions
HEAD = len(MAGIC) + 65  # bytes: the first line and the line of the checksum
KEPT = 2
NAME = re.compile(r"step-(\d{9,})\.checkpoint")


def pack(state, arrays):
    """Return the bytes of a checkpoint: a first line, the SHA-256 of the rest, and a ZIP file of JSON and arrays.

    Args:
        state: dictionary of plain data.
        arrays: dictionary of names and arrays.
    """
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w") as file:
        file.writestr("state.json", json.dumps(state))
        file.writestr("names.json", json.dumps(list(arrays)))
        for i, array in enumerate(arrays.values()):
            with file.open(f"{i}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)
    content = body.getvalue()
    return MAGIC + hashlib.sha256(content).hexdigest().encode() + b"\n" + content


def unpack(raw):
    """Return the state and the arrays in the bytes of a checkpoint.

    The arrays are a dictionary by name or, for a checkpoint of an earlier version, by position.

    Raises:
        ValueError: the bytes are truncated, damaged, or not a checkpoint.
    """
    if raw[: len(MAGIC)] not in (MAGIC, POSITIONAL) or len(raw) < HEAD:
        raise ValueError("it is not a checkpoint of this project")
    content = raw[HEAD:]
    if hashlib.sha256(content).hexdigest().encode() + b"\n" != raw[len(MAGIC) : HEAD]:
        raise ValueError("its checksum is wrong: the file is truncated or damaged")
    named = raw.startswith(MAGIC)
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as file:
            members = {name: _read_member(file, name) for name in file.namelist()}
        state = json.loads(members["state.json"])
        names = json.loads(members["names.json"]) if named else range(len(members) - 1)
        arrays = {name: _parse_array(members[f"{i}.npy"]) for i, name in enumerate(names)}
    except (zipfile.BadZipFile, KeyError, TypeError, RecursionError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"its content cannot be read: {shorten(error)}") from None
    if named and not all(isinstance(name, str) for name in names) or len(arrays) != len(members) - 1 - named:
        raise ValueError("its names do not match its arrays")
    return state, arrays


def _read_member(file, name):
    """Return the bytes of a member of a ZIP file. Compressed members are refused: they could expand without limit."""
    info = file.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name!r:.80} in it is compressed")
    return file.read(info)


def _parse_array(raw):
    """Return the array in the bytes of an .npy file, without allocating more memory than there are bytes."""
    file = io.BytesIO(raw)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("an array in it has an unknown format")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    values = raw[file.tell() :]
    if dtype.hasobject or math.prod(shape) * dtype.itemsize != len(values):
        raise ValueError("the size of an array in it does not match its header")
    return np.frombuffer(values, dtype).reshape(shape, order="F" if fortran else "C")


def refuse_wrong_state(state):
    """Raise `ValueError` unless a checkpoint's state has the entries that a run writes, with the right types."""
    if not isinstance(state, dict):
        raise ValueError(f"its state is {type(state).__name__}, not an object")
    for name, is_right in _STATE.items():
        if name not in state:
            raise ValueError(f"its state has no {name!r}")
        if not is_right(state[name]):
            raise ValueError(f"its {name} cannot be {state[name]!r:.80}")


def is_count(value):
    """Return whether a value is an int in [0, 2**53), and not a bool."""
    return type(value) is int and 0 <= value < 2**53


def _is_tree_of_numbers(value):
    if isinstance(value, list):
        return all(map(_is_tree_of_numbers, value))
    return type(value) is float or (type(value) is int and abs(value) < 2**53)


_STATE = {
    "epoch": is_count,
    "step": is_count,
    "stopped": lambda value: type(value) is bool,
    "recipe": lambda value: isinstance(value, dict),
    "callbacks": lambda value: (
        isinstance(value, dict)
        and all(isinstance(each, dict) and all(type(x) is float for x in each.values()) for each in value.values())
    ),
    "metrics": lambda value: isinstance(value, list) and _is_tree_of_numbers(value),
    "history": lambda value: value is None or isinstance(value, str),
    "events": lambda value: isinstance(value, dict) and all(map(is_count, value.values())),
}


def list_checkpoints(folder):
    """Return the paths of the checkpoints in a run's folder, the newest first."""
    found = [(NAME.fullmatch(path.name), path) for path in (Path(folder) / "backup").glob("step-*.checkpoint")]
    return [path for _, path in sorted(((int(match[1]), path) for match, path in found if match), reverse=True)]


def write(folder, step, state, arrays):
    """Write a checkpoint, read it back, and then remove all but the newest two.

    Raises:
        OSError: it cannot be written; the others are untouched.
        RunError: reading the file back gives other bytes.
    """
    path = Path(folder) / "backup" / f"step-{step:09d}.checkpoint"
    if not path.parent.is_dir():
        path.parent.mkdir()
        sync_directory(folder)
    raw = pack(state, arrays)
    replace_file(path, raw)
    if read_bytes(path, LARGEST_CHECKPOINT) != raw:
        path.unlink()
        raise RunError(f"{path} reads back differently from how it was written: the disk may be faulty")
    # Checkpoints with a higher number are unusable: otherwise the run would have resumed from them.
    paths = list_checkpoints(folder)
    kept = paths[paths.index(path) :][:KEPT]
    for old in paths:
        if old not in kept:
            old.unlink()


def load_newest(folder, say):
    """Return state and arrays of the newest usable checkpoint, or None; `say` receives a line for each unusable one."""
    for path in list_checkpoints(folder):
        try:
            state, arrays = unpack(read_bytes(path, LARGEST_CHECKPOINT))
            refuse_wrong_state(state)
            return state, arrays
        except Exception as error:  # a damaged archive can raise nearly anything
            say(f"{format_path(path)} cannot be used ({shorten(error)}); trying the checkpoint before it")
    return None

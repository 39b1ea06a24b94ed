"""Checkpoints that no interruption can lose, and what must be undone before a run goes on from one.

Keras' `BackupAndRestore` overwrites its only file in place, so a kill within a save loses it, and it knows neither the
metrics within an epoch nor the state of callbacks. Here a checkpoint is one file with its own checksum, written beside
the others, synced, renamed and read back; the two newest are kept.
"""

import hashlib
import io
import json
import re
import zipfile
from pathlib import Path

import numpy as np

from Training.errors import RunError, shorten
from Training.files import LARGEST_CHECKPOINT, read_bytes, replace_file

MAGIC = b"residual-attention checkpoint 1\n"
KEPT = 2
NAME = re.compile(r"step-(\d{9})\.checkpoint")


def pack(state, arrays):
    """The bytes of a checkpoint: a line of its own, the SHA-256 of the rest, JSON and arrays."""
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w") as file:
        file.writestr("state.json", json.dumps(state))
        for i, array in enumerate(arrays):
            with file.open(f"{i}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)
    content = body.getvalue()
    return MAGIC + hashlib.sha256(content).hexdigest().encode() + b"\n" + content


def unpack(raw):
    """The state and the arrays in the bytes of a checkpoint.

    Raises:
        ValueError: torn, changed, or no checkpoint at all.
    """
    head = len(MAGIC) + 65
    if raw[: len(MAGIC)] != MAGIC or len(raw) < head:
        raise ValueError("it is no checkpoint of this project")
    content = raw[head:]
    if hashlib.sha256(content).hexdigest().encode() != raw[len(MAGIC) : head - 1]:
        raise ValueError("its checksum is wrong: the file is torn or was changed")
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        state = json.loads(file.read("state.json"))
        names = [f"{i}.npy" for i in range(len(file.namelist()) - 1)]
        arrays = [np.lib.format.read_array(io.BytesIO(file.read(name)), allow_pickle=False) for name in names]
    return state, arrays


def list_checkpoints(folder):
    """Paths of the checkpoints in a run's folder, the newest first."""
    paths = [path for path in (Path(folder) / "backup").glob("step-*.checkpoint") if NAME.fullmatch(path.name)]
    return sorted(paths, reverse=True)


def write(folder, step, state, arrays):
    """Add a checkpoint; when it has been read back whole, drop all but the newest two.

    Raises:
        OSError: it cannot be written; the ones before are untouched.
        RunError: what was read back is not what was written.
    """
    path = Path(folder) / "backup" / f"step-{step:09d}.checkpoint"
    path.parent.mkdir(exist_ok=True)
    raw = pack(state, arrays)
    replace_file(path, raw)
    if read_bytes(path, LARGEST_CHECKPOINT) != raw:
        path.unlink()
        raise RunError(f"{path} reads back other bytes than were written: the disk cannot be trusted")
    for old in list_checkpoints(folder)[KEPT:]:
        old.unlink()


def load_newest(folder, say):
    """State and arrays of the newest checkpoint that is whole, or None; `say` is told of each that is not."""
    for path in list_checkpoints(folder):
        try:
            return unpack(read_bytes(path, LARGEST_CHECKPOINT))
        except Exception as error:  # a damaged archive can raise nearly anything
            say(f"{path} cannot be used ({shorten(error)}); the checkpoint before it is tried")
    return None

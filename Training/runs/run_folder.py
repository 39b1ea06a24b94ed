"""The folder of one run, and what the run stands on."""

import json
import os
import time
from pathlib import Path

from Training.errors import InputError, format_path
from Training.files import LARGEST_TEXT, open_own, read_bytes, read_text, replace_file
from Training.runs import checkpoint


def create(logs):
    """Make `<logs>/<YYYYmmdd-HHMMSS>`; runs started in one second get -2, -3 and so on.

    Raises:
        InputError: the folder cannot be made.
    """
    name = time.strftime("%Y%m%d-%H%M%S")
    for attempt in range(1, 1000):
        folder = Path(logs) / (name if attempt == 1 else f"{name}-{attempt}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            if not Path(logs).is_dir():
                raise InputError(f"--logs {logs} is no folder") from None
        except OSError as error:
            raise InputError(f"--logs {logs} cannot be written: {error.strerror}") from None
    raise InputError(f"--logs {logs} has 999 runs of this second")


def reopen(folder):
    """The folder of an earlier run, as a path; checked to be writable."""
    folder = Path(folder)
    if not os.access(folder, os.W_OK):
        raise InputError(f"--resume {folder} cannot be written")
    return folder


def save_model(model, path):
    """Save a model as `.keras`, whole at every moment."""
    beside = Path(path).with_suffix(".new.keras")
    try:
        model.save(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write(folder, name, text):
    """Write a small text file of the run, whole at every moment."""
    replace_file(Path(folder) / name, text.encode())


def write_json(folder, name, value):
    write(folder, name, json.dumps(value, indent=2) + "\n")


def write_split(folder, held_out, identity):
    """Write `split.json`: positions of the images held out, and the digest of streamed pictures ("" for others).

    Raises:
        InputError: the run is resumed, and the pictures are not those that it began with, or the file cannot be read.
    """
    path = Path(folder) / "split.json"
    try:
        before = json.loads(read_text(path)).get("identity", "")
    except FileNotFoundError:
        before = identity
    except InputError:
        raise
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or "it is no JSON object"
        raise InputError(
            f"{format_path(path)} cannot be read: {reason}; without it, the run goes on unchecked"
        ) from None
    if before != identity:
        raise InputError("the pictures are not those that the run began with: files were added, removed or changed")
    write_json(folder, path.name, {"validation": held_out.tolist(), "identity": identity})


def refuse_to_start_over(folder, epochs_between):
    """Raise `InputError` where a run has no checkpoint to go on from, but a history or a result that would be lost.

    A run that was ended before its first checkpoint was due begins anew.

    Args:
        folder: path of the run's folder.
        epochs_between: int, epochs between the run's checkpoints.
    """
    folder, reasons = Path(folder), []
    backup = folder / "backup"
    if backup.is_dir() and not os.access(backup, os.R_OK | os.W_OK | os.X_OK):
        raise InputError(f"{backup} cannot be read and written: mend its permissions")
    if checkpoint.load_newest(folder, reasons.append):
        return
    history = folder / "history.csv"
    epochs = read_bytes(history, LARGEST_TEXT).count(b"\n") - 1 if history.exists() else 0
    if reasons or epochs > epochs_between or (folder / "result.json").exists():
        why = "no checkpoint that can be used" if reasons else "no checkpoint"
        raise InputError(f"{folder} has {why} in backup/, and to begin anew would lose its history: start another run")


def event_files(folder):
    """TensorBoard's files of a run, as paths relative to its folder."""
    return sorted(path.relative_to(folder) for path in Path(folder).rglob("events.out.tfevents*"))


def rewind(folder, state):
    """Make history and event files what they were at the checkpoint; without one (None), what they were at the start.

    What was written behind the checkpoint is written again by the resumed run: no point is doubled.
    """
    folder = Path(folder)
    history, sizes = (state["history"], state["events"]) if state else (None, {})
    for path in event_files(folder):
        size = sizes.get(path.as_posix())
        if size is None:
            (folder / path).unlink()
        else:
            os.truncate(folder / path, min(size, (folder / path).stat().st_size))
    if history is None:
        (folder / "history.csv").unlink(missing_ok=True)
    else:
        replace_file(folder / "history.csv", history.encode())


def lock(folder):
    """Hold the run's folder until this process ends.

    Raises:
        InputError: another process holds it, or it cannot be written.
    """
    try:
        import fcntl
    except ImportError:  # no such lock on Windows
        return None
    path = Path(folder) / "lock"
    try:
        file = open_own(path)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise InputError(f"another process trains in {folder}: wait for it, or start a run of its own") from None
    return file


def sync_event_files(folder):
    """Sizes of the event files, all bytes of them on the disk."""
    sizes = {}
    for path in event_files(folder):
        with open_own(folder / path) as file:
            os.fsync(file.fileno())
            sizes[path.as_posix()] = os.fstat(file.fileno()).st_size
    return sizes

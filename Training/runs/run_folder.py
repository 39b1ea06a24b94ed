"""Creates, locks, writes and rewinds the folder of a run."""

import errno
import json
import os
import time
from pathlib import Path

from Training.console import warn
from Training.errors import InputError, format_path
from Training.files import LARGEST_TEXT, open_own, read_bytes, read_text, replace_file, sync_directory
from Training.runs import checkpoint

UNFINISHED_MODEL = ".new.keras"


def create(logs, label=""):
    """Create `<logs>/<YYYYmmdd-HHMMSS>-<label>`; runs started in the same second get -2, -3 and so on.

    Args:
        logs: path of the folder of runs.
        label: str, what the run trains, as part of a file name; see `recipe.label_run`.

    Raises:
        InputError: the folder cannot be created.
    """
    name = "-".join(filter(None, (time.strftime("%Y%m%d-%H%M%S"), label)))
    for attempt in range(1, 1000):
        folder = Path(logs) / (name if attempt == 1 else f"{name}-{attempt}")
        try:
            new = [parent for parent in (folder, *folder.parents) if not parent.exists()]
            folder.mkdir(parents=True)
            for made in new:
                sync_directory(made.parent)
            return folder
        except FileExistsError:
            if not Path(logs).is_dir():
                raise InputError(f"--logs {format_path(logs)} is not a directory") from None
        except OSError as error:
            raise InputError(f"--logs {format_path(logs)} cannot be written: {error.strerror}") from None
    raise InputError(f"--logs {format_path(logs)} already has 999 runs started in this second")


def reopen(folder):
    """Return the folder of an earlier run as a path.

    Raises:
        InputError: it is not writable, or contains symbolic links, through which the run would change files outside it.
    """
    folder = Path(folder)
    if not os.access(folder, os.W_OK):
        raise InputError(f"--resume {format_path(folder)} cannot be written")
    refuse_links(folder)
    return folder


def refuse_links(folder):
    """Raise `InputError` if a run's folder holds a symbolic link.

    Links under the names of unfinished files, which end in .new, are replaced and never followed.
    """
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(parent) / name
            if path.is_symlink() and Path(name).suffix != ".new" and not name.endswith(UNFINISHED_MODEL):
                raise InputError(
                    f"{format_path(path)} is a symbolic link: a run only writes into its own folder; "
                    "replace the link with the file or directory itself"
                )


def save_model(model, path):
    """Save a model as `.keras`; the file at `path` is never incomplete."""
    new = Path(path).with_suffix(UNFINISHED_MODEL)
    new.unlink(missing_ok=True)  # what an earlier attempt left, or a link
    try:
        model.save(new)
        with open_own(new) as file:
            os.fsync(file.fileno())
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)
    sync_directory(Path(path).parent)


def write(folder, name, text):
    """Write a small text file of the run; the file is never incomplete."""
    replace_file(Path(folder) / name, text.encode())


def write_json(folder, name, value):
    write(folder, name, json.dumps(value, indent=2) + "\n")


def write_split(folder, held_out, identity):
    """Write `split.json`: positions of the images held out, and the digest of streamed pictures ("" for others).

    Raises:
        InputError: the pictures differ from those the run started with, or the file cannot be read.
    """
    path = Path(folder) / "split.json"
    try:
        before = json.loads(read_text(path)).get("identity", "")
    except FileNotFoundError:
        before = identity
    except InputError:
        raise
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or "it is not a JSON object"
        raise InputError(
            f"{format_path(path)} cannot be read: {reason}; if it is removed, the run resumes without checking its data"
        ) from None
    if before != identity:
        raise InputError("the pictures differ from those the run started with: files were added, removed or changed")
    write_json(folder, path.name, {"validation": held_out.tolist(), "identity": identity})


def refuse_to_start_over(folder, epochs_between):
    """Raise `InputError` if a run has no usable checkpoint, and starting over would lose a history or a result.

    A run that ended before its first checkpoint was due starts over.

    Args:
        folder: path of the run's folder.
        epochs_between: int, epochs between the run's checkpoints.
    """
    folder, reasons = Path(folder), []
    backup = folder / "backup"
    if backup.is_dir() and not os.access(backup, os.R_OK | os.W_OK | os.X_OK):
        raise InputError(f"{format_path(backup)} must be readable and writable: check its permissions")
    if checkpoint.load_newest(folder, reasons.append):
        return
    history = folder / "history.csv"
    epochs = read_bytes(history, LARGEST_TEXT).count(b"\n") - 1 if history.exists() else 0
    if reasons or epochs > epochs_between or (folder / "result.json").exists():
        why = "no usable checkpoint" if reasons else "no checkpoint"
        raise InputError(
            f"{format_path(folder)} has {why} in backup/, and starting over would lose its history: start another run"
        )


def event_files(folder):
    """Return the paths of a run's TensorBoard files, relative to its folder."""
    return sorted(path.relative_to(folder) for path in Path(folder).rglob("events.out.tfevents*"))


def rewind(folder, state, say=print):
    """Restore history and event files to a checkpoint or, without one, to the start of the run.

    The resumed run writes everything after the checkpoint again. Without this, its points would appear twice.

    Args:
        folder: path of the run's folder.
        state: state of the checkpoint, or None.
        say: function that receives a line for each event file that is missing or shorter than at the checkpoint.
    """
    folder = Path(folder)
    history, sizes = (state["history"], state["events"]) if state else (None, {})
    found = event_files(folder)
    for name in sorted(sizes.keys() - {path.as_posix() for path in found}):
        say(f"{format_path(folder / name)} is missing: TensorBoard will not show its points")
    for path in found:
        size = sizes.get(path.as_posix())
        if size is None:
            (folder / path).unlink()
            continue
        with open_own(folder / path) as file:
            status = os.fstat(file.fileno())
            if status.st_size < size:
                say(
                    f"{format_path(folder / path)} is shorter than at the checkpoint: TensorBoard will lack some points"
                )
            elif status.st_nlink > 1:  # also a file of a backup made with hard links, which must stay as it is
                replace_file(folder / path, file.read(size))
            else:
                file.truncate(size)
    if history is None:
        (folder / "history.csv").unlink(missing_ok=True)
    else:
        replace_file(folder / "history.csv", history.encode())


def lock(folder, say=warn):
    """Lock the run's folder until the returned file is closed or the process ends.

    On file systems without locks, such as some network file systems, it warns, and the run continues unlocked.

    Returns:
        The open file, or None if there is no lock.

    Raises:
        InputError: another process holds the lock, or the file cannot be written.
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
    except OSError as error:
        file.close()
        if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
            message = f"another process is training in {format_path(folder)}: wait for it, or start another run"
            raise InputError(message) from None
        say(f"{format_path(path)} cannot be locked ({error.strerror}): no other process may train in this folder")
        return None
    return file


def sync_event_files(folder):
    """Sync the event files, the history and their directories to disk; return the sizes of the event files by path."""
    folder, sizes = Path(folder), {}
    for path in event_files(folder):
        with open_own(folder / path) as file:
            os.fsync(file.fileno())
            sizes[path.as_posix()] = os.fstat(file.fileno()).st_size
    if (folder / "history.csv").exists():
        with open_own(folder / "history.csv") as file:
            os.fsync(file.fileno())
    for parent in {folder, *((folder / path).parent for path in map(Path, sizes))}:
        sync_directory(parent)
    return sizes

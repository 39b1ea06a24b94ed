"""Opens untrusted files safely, and replaces a run's own files atomically."""

import contextlib
import errno
import os
import stat
from pathlib import Path

from Training.errors import InputError, format_path

LARGEST_TEXT = 64 * 2**20  # bytes of a JSON or CSV file: a million rows of a table
LARGEST_PICTURE = 512 * 2**20  # bytes of a picture file: 90 million pixels without compression
LARGEST_CHECKPOINT = 8 * 2**30  # bytes: 700 million parameters with two slots of an optimizer

# Errors of file systems that cannot sync a directory, such as some network and FUSE file systems.
NOT_FOR_DIRECTORIES = (errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.ENOSYS)

_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
    (stat.S_ISLNK, "a symbolic link"),
)
# Opening must not wait for a peer, take over a terminal, leak the file to child processes or convert line ends.
_SAFE = sum(getattr(os, name, 0) for name in ("O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC", "O_BINARY"))


def refuse_special(path, mode):
    """Raise `InputError` unless `mode`, the `st_mode` of a file, is that of a regular file."""
    if not stat.S_ISREG(mode):
        kind = next((name for test, name in _KINDS if test(mode)), "a special file")
        raise InputError(f"{format_path(path)} must be a regular file, but is {kind}")


def open_file(path, limit):
    """Open a regular file for reading; never blocks.

    The file is checked before it is opened, since opening a device can have side effects, and again afterwards, since
    it may have been replaced in between. Symbolic links are followed.

    Args:
        path: path of the file.
        limit: int, the largest size in bytes.

    Returns:
        A binary file object.

    Raises:
        InputError: not a regular file, or larger than `limit`.
        OSError: the file does not exist or cannot be opened.
    """
    refuse_special(path, os.stat(path).st_mode)
    file = os.fdopen(os.open(path, os.O_RDONLY | _SAFE), "rb")
    try:
        status = os.fstat(file.fileno())
        refuse_special(path, status.st_mode)
        if status.st_size > limit:
            raise InputError(f"{format_path(path)} must have at most {limit:,} bytes, but has {status.st_size:,}")
    except BaseException:
        file.close()
        raise
    return file


def read_bytes(path, limit):
    """Return the bytes of a regular file, see `open_file`; bytes that are appended during reading are left out."""
    with open_file(path, limit) as file:
        return file.read(os.fstat(file.fileno()).st_size)


def read_text(path, limit=LARGEST_TEXT):
    """Return the UTF-8 text of a regular file with its line ends, see `read_bytes`.

    Raises:
        InputError: see `open_file`; or the file is not UTF-8.
    """
    try:
        return read_bytes(path, limit).decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{format_path(path)} must be UTF-8 text, byte {error.start} is not") from None


def open_own(path):
    """Open one of the program's own files for reading and writing; keep its content, or create it if it is missing.

    Links are refused, so that nothing outside the folder can be changed through them.

    Returns:
        A binary file object, positioned at the start.

    Raises:
        InputError: the file exists and is a symbolic link or not a regular file.
        OSError: it cannot be opened or created.
    """
    with contextlib.suppress(FileNotFoundError):
        refuse_special(path, os.lstat(path).st_mode)
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | _SAFE
    file = os.fdopen(os.open(path, flags, 0o666), "r+b")
    try:
        refuse_special(path, os.fstat(file.fileno()).st_mode)
    except BaseException:
        file.close()
        raise
    return file


def replace_file(path, raw):
    """Replace the file at `path` atomically: write a new file next to it, sync it, and rename it.

    A file or link with the name of the new file, left by an earlier attempt, is removed and never followed. If `path`
    is a link, the link is replaced.
    """
    new = Path(f"{path}.new")
    new.unlink(missing_ok=True)
    try:
        with open(new, "xb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except OSError:
        new.unlink(missing_ok=True)
        raise
    sync_directory(Path(path).parent)


def sync_directory(path):
    """Sync the names in a directory to disk, if the system and the file system support it."""
    if os.name != "posix":
        return
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    except OSError as error:
        if error.errno not in NOT_FOR_DIRECTORIES:
            raise
    finally:
        os.close(directory)

"""Exceptions for errors that end a run or refuse an input, and helpers for their one-line messages."""

import errno
import os
import signal

# These errors always mean a failed write: the file system is full or read-only.
NOT_WRITTEN = {getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS") if hasattr(errno, name)}


class RunError(Exception):
    """The run cannot continue. The message is one line with the cause and the state that is left."""


class InputError(ValueError):
    """The user's input cannot be used. The message is one line that says what was received and what is valid."""


class Interrupted(Exception):
    """A signal stopped the run after its state was saved."""

    def __init__(self, number):
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


def escape(text):
    """Return a text as one line: line breaks and other unprintable characters become Python escapes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def shorten(error):
    """Return an exception's message in one line of at most 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def format_path(path):
    """Return a path as text for a one-line message."""
    text = str(path)
    return text if text.isprintable() else ascii(text)


def format_os_error(error, place):
    """Return one line for an `OSError`: the file or `place`, and the reason that the system gives.

    Only unambiguous errors are called a failed write. Others may come from reading, or from a lack of memory or
    processes.
    """
    name = error.filename if isinstance(error.filename, str | bytes | os.PathLike) else place
    reason = error.strerror or shorten(error)
    cannot = " cannot be written" if error.errno in NOT_WRITTEN else ""
    return f"{format_path(os.fsdecode(name))}{cannot}: {reason}"

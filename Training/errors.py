"""Errors that end a run or refuse an input, and the texts of their one-line messages."""

import errno
import os
import signal

# What these mean is the same wherever they come from: the file system takes no more bytes, or no writes at all.
NOT_WRITTEN = {getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS") if hasattr(errno, name)}


class RunError(Exception):
    """The run cannot continue; the message is one line with the cause and what is left."""


class InputError(ValueError):
    """Something that the user gave cannot be used; the message is one line that says what would be right."""


class Interrupted(Exception):
    """A signal asked the run to stop, and its state is saved."""

    def __init__(self, number):
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


class Stopped(KeyboardInterrupt):
    """A signal stopped the program; unlike `Interrupted`, no state was saved for it."""

    def __init__(self, number):
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


def escape(text):
    """Return a text as one line: line breaks and other characters that are not printed are escaped as in Python."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def shorten(error):
    """Return an exception's message in one line of at most 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def format_path(path):
    """Return a path as it can stand in a one-line message."""
    text = str(path)
    return text if text.isprintable() else ascii(text)


def format_os_error(error, place):
    """Return one line for an `OSError`: the file or `place`, and the system's own reason.

    Only errors that can come from nothing else are called a failed write: one without a file's name may as well be from
    reading, or from a lack of memory or processes.
    """
    name = error.filename if isinstance(error.filename, str | bytes | os.PathLike) else place
    reason = error.strerror or shorten(error)
    cannot = " cannot be written" if error.errno in NOT_WRITTEN else ""
    return f"{format_path(os.fsdecode(name))}{cannot}: {reason}"

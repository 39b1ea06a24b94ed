"""What ends a run or refuses an input, and the texts of such lines."""

import signal


class RunError(Exception):
    """The run cannot go on; the message is one line that says why and what is left."""


class InputError(ValueError):
    """Something the user gave cannot be used; the message is one line that says what would be right."""


class Interrupted(Exception):
    """A signal asked the run to stop, and its state is saved."""

    def __init__(self, number):
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


def escape(text):
    """A text in one line: line breaks and all else that is not printed are escaped, as Python does it."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def shorten(error):
    """What an exception says, in at most 200 characters of one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def format_path(path):
    """A path as it may stand in one line of a message."""
    text = str(path)
    return text if text.isprintable() else ascii(text)

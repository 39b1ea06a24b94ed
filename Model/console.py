"""Standard streams and signals, the same for every program of the project."""

import contextlib
import errno
import os
import signal
import stat
import sys
import threading
from pathlib import Path

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Stopped(KeyboardInterrupt):
    """A signal stopped the program. No state was saved."""

    def __init__(self, number):
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


def run_program(main):
    """Run a program's `main` and exit with the code that it returns. Signals are ignored afterwards."""
    try:
        raise SystemExit(main() or 0)
    finally:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)


class Output:
    """A text stream whose reader may disappear: after the first failed write, all output is discarded.

    Args:
        stream: the text stream.
        report: function that receives the first `OSError`; exceptions that it raises reach the writer.
    """

    def __init__(self, stream, report):
        self.stream = stream
        self.report = report
        self.lost = None

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        self._attempt(self.stream.write, text)
        return len(text)

    def writelines(self, lines):
        self.write("".join(lines))

    def flush(self):
        self._attempt(self.stream.flush)

    def _attempt(self, method, *args):
        if self.lost:
            return
        try:
            method(*args)
        except OSError as error:
            self.lost = error
            _discard(self.stream)
            self.report(error)


def _discard(stream):
    """Redirect a stream's buffered and future output to the null device."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        stream.flush()


def open_missing_streams():
    """Open the null device in place of standard streams without which the process was started.

    Otherwise the next file that the program opens would get the number of a standard stream, and messages would be
    written into it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            mode = "r" if number == 0 else "w"
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115  stays open


@contextlib.contextmanager
def guard_streams(program, output_needed):
    """Make the standard streams usable: missing ones are opened, and characters outside their encoding are escaped.

    If the standard output can no longer be written, a program that needs it ends with exit code 1, silently if the
    reader has closed a pipe, as `head` does. Other programs print one warning and continue without it.
    """
    if isinstance(sys.stdout, Output):  # an entry point was called from another
        yield
        return
    open_missing_streams()

    def report(error):
        if output_needed:
            raise error
        warn(f"{program}: the standard output cannot be written ({error.strerror}): the run continues without it")

    before = sys.stdout, sys.stderr
    for number in (1, 2):
        # A pipe that another program made non-blocking refuses text while its reader is busy: that is no lost reader.
        with contextlib.suppress(AttributeError, OSError):  # AttributeError: Windows
            os.set_blocking(number, True)
    for stream in before:
        # In the locale C, Python's streams have the second, which fails for characters too.
        if getattr(stream, "errors", None) in ("strict", "surrogateescape") and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = output, _ = Output(sys.stdout, report), Output(sys.stderr, lambda error: None)
    try:
        try:
            yield
        finally:
            output.flush()
            if output.lost and output_needed:  # argparse ignores such errors
                raise output.lost
    except OSError as error:
        if error is not output.lost:
            raise
        if error.errno != errno.EPIPE:
            warn(f"{program}: error: the standard output cannot be written: {error.strerror}")
        raise SystemExit(1) from None
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def _raise_stopped(number, _frame):
    signal.signal(number, signal.SIG_DFL)  # a second signal ends the process at once
    raise Stopped(number)


def _repeat_lost_signal(unraisable):
    """Send a signal again that came in a finalizer or a callback of Python's, where exceptions are ignored."""
    if not isinstance(unraisable.exc_value, Stopped):
        sys.__unraisablehook__(unraisable)
        return
    number = unraisable.exc_value.exit_code - 128
    signal.signal(number, _raise_stopped)
    # By then, the finalizer has ended. Only a signal to the main thread interrupts the call that it waits in.
    if hasattr(signal, "pthread_kill"):
        again = threading.Timer(0.1, signal.pthread_kill, (threading.main_thread().ident, number))
    else:  # Windows
        again = threading.Timer(0.1, signal.raise_signal, (number,))
    again.daemon = True
    again.start()


@contextlib.contextmanager
def catch_signals():
    """Raise `Stopped` for SIGINT, SIGTERM and SIGHUP.

    Signals that are ignored, like SIGHUP under `nohup`, or that have another handler are left alone.
    """
    usual = (signal.SIG_DFL, signal.default_int_handler)
    ours = threading.current_thread() is threading.main_thread()
    caught = [number for number in SIGNALS if ours and signal.getsignal(number) in usual]
    before = {number: signal.signal(number, _raise_stopped) for number in caught}
    report, sys.unraisablehook = sys.unraisablehook, _repeat_lost_signal if caught else sys.unraisablehook
    try:
        yield
    finally:
        sys.unraisablehook = report
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def hold_signals():
    """Delay signals until the end of the context; then the first of them raises `Stopped`.

    An exception while a framework starts could be mistaken for a failed import, or abort the process.
    """
    held = []
    caught = [number for number in SIGNALS if signal.getsignal(number) is _raise_stopped]
    for number in caught:
        signal.signal(number, lambda number, _frame: held.append(number))
    try:
        yield
    finally:
        for number in caught:
            signal.signal(number, _raise_stopped)
    if held:
        raise Stopped(held[0])


def import_keras():
    """Import Keras regardless of the user's configuration for other projects, and return the module.

    Limits of epochs and steps and Flax' variables, which environment variables ask for, are left out.

    Raises:
        ValueError: Keras cannot read its `keras.json`; names the file.
        ImportError: a package is missing.
    """
    for name in ("KERAS_MAX_EPOCHS", "KERAS_MAX_STEPS_PER_EPOCH"):
        os.environ.pop(name, None)
    os.environ["KERAS_NNX_ENABLED"] = "false"
    path = Path(os.environ.get("KERAS_HOME") or Path.home() / ".keras") / "keras.json"
    with contextlib.suppress(OSError):
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError(f"{path}, Keras' configuration, must be a regular file")
    try:
        import keras
    except ImportError:
        raise
    except Exception as error:  # can be of any type: Keras uses assertions to check the file
        cause = f" ({error})" if str(error) else ""
        raise ValueError(f"{path} cannot be used as Keras' configuration{cause}: repair or remove it") from None
    return keras


def warn(line):
    """Write one line to standard error."""
    sys.stderr.write(line + "\n")

"""What every program shares: standard streams, signals, the start of Keras, and errors in one line."""

import contextlib
import errno
import functools
import logging
import os
import shlex
import signal
import sys
import threading

from Training.errors import InputError, Interrupted, RunError, Stopped, escape, format_os_error

PROGRAM = "training_cifar10.py"
BACKENDS = ("tensorflow", "jax")
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


def entry_point(program, stopped="Stopped.", output_needed=True):
    """Make a function the `main` of a program.

    Inside it the standard streams can be used whatever they are (see `guard_streams`), signals that would end the
    process raise `Stopped`, and errors of the user's input end the process in one line.

    Args:
        program: name of the program, which begins its messages.
        stopped: what a signal's message says, if nothing closer to the work says it.
        output_needed: bool, whether the program is of no use without its standard output.
    """

    def decorate(main):
        @functools.wraps(main)
        def run(*args, **kwargs):
            with guard_streams(program, output_needed), catch_signals(), report_errors(program, stopped):
                return main(*args, **kwargs)

        return run

    return decorate


def run_program(main):
    """Run a program's `main` as all that this process does, and exit with the code that it returns.

    Once it has ended, signals are ignored: nothing is left to stop.
    """
    try:
        raise SystemExit(main() or 0)
    finally:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)


class _Output:
    """A text stream whose reader may go away: from the first failed write on, what is written is discarded.

    Args:
        stream: the text stream.
        report: function that gets the first `OSError`; what it raises reaches the writer.
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
    """Send what a stream still holds, and all that is written to its file from now on, to the null device."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        stream.flush()


def open_missing_streams():
    """Open the null device in place of standard streams that the process was started without.

    Otherwise the next file that the program opens gets a standard stream's number, and messages are written into it.
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
    """Make the standard streams usable: missing ones are opened, and characters that they lack are escaped.

    When the standard output cannot be written any more, a program that needs it ends with exit code 1, silently if its
    reader has closed a pipe, as `head` does. Other programs say so once and continue without it.
    """
    if isinstance(sys.stdout, _Output):  # one entry point called by another
        yield
        return
    open_missing_streams()

    def report(error):
        if output_needed:
            raise error
        warn(f"{program}: the standard output cannot be written ({error.strerror}): the run continues without it")

    before = sys.stdout, sys.stderr
    for stream in before:
        if getattr(stream, "errors", None) == "strict" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = output, _ = _Output(sys.stdout, report), _Output(sys.stderr, lambda error: None)
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


@contextlib.contextmanager
def catch_signals():
    """Raise `Stopped` for SIGINT, SIGTERM and SIGHUP.

    Signals that are ignored, as SIGHUP is under `nohup`, or that someone else handles are left alone.
    """
    usual = (signal.SIG_DFL, signal.default_int_handler)
    ours = threading.current_thread() is threading.main_thread()
    caught = [number for number in SIGNALS if ours and signal.getsignal(number) in usual]
    before = {number: signal.signal(number, _raise_stopped) for number in caught}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def hold_signals():
    """Hold signals back until the end, where the first of them raises `Stopped`.

    An exception in the middle of a framework's start can be taken for a failed import, or end the process.
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


def warn(line):
    """Write one line to the standard error."""
    sys.stderr.write(line + "\n")


def format_duration(seconds):
    """Return seconds as a text such as 45 s, 12 min or 3 h 20 min."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def format_count(number, noun):
    """Return a number and its noun: 1 epoch, 2,000 epochs."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


@contextlib.contextmanager
def silence_stderr():
    """Discard what is written to the process' standard error, also by C++; exceptions pass."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def reset_configuration(keras):
    """Undo what the user's keras.json or environment sets for all of their projects; see `keras.config`."""
    keras.config.set_floatx("float32")
    keras.config.set_epsilon(1e-7)
    keras.config.set_image_data_format("channels_last")
    keras.config.set_max_epochs(None)
    keras.config.set_max_steps_per_epoch(None)


def start_keras(distribute="none"):
    """Import Keras and its backend and find the device; return the `keras` module.

    TensorFlow's C++ writes several lines of notes while it starts, a failed search for a GPU among them, before it
    reads any of its switches. They would hide the program's own lines.

    Args:
        distribute: see `devices`; with "data", the other processes of the run are waited for.

    Raises:
        InputError: KERAS_BACKEND names no backend of this project, or one that is not installed; see also `devices`.
    """
    from Training import devices

    backend = os.environ.get("KERAS_BACKEND") or "tensorflow"
    if backend not in BACKENDS:
        raise InputError(f"KERAS_BACKEND must be one of {', '.join(BACKENDS)}, received {backend!r:.80}")
    devices.refuse_mode(distribute, backend)
    os.environ["KERAS_BACKEND"] = backend
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # Python raises what is an error for a run
    try:
        with hold_signals(), silence_stderr():
            import keras
        reset_configuration(keras)
        devices.join_processes(distribute)
        # From here on JAX handles SIGTERM in each of several processes, which must not be taken from it.
        with contextlib.nullcontext() if distribute == "data" else hold_signals(), silence_stderr():
            devices.device_name()
        # Many models in one process, as in a notebook, are no reason for TensorFlow to warn.
        logging.getLogger("tensorflow").setLevel(logging.ERROR)
    except ImportError as error:
        raise InputError(
            f"{error}: install requirements.txt, or requirements-jax.txt for JAX, or set KERAS_BACKEND to the other of "
            f"{', '.join(BACKENDS)}"
        ) from None
    return keras


def exit_with(code, line):
    """End the process with one line on the standard error; a line break at its start is for a terminal, after ^C."""
    start = "\n" if line.startswith("\n") and sys.stderr.isatty() else ""
    sys.stderr.write(start + escape(line.removeprefix("\n")) + "\n")
    raise SystemExit(code) from None


@contextlib.contextmanager
def report_errors(program=PROGRAM, stopped="Stopped before the training began."):
    """End the process in one line: exit code 2 if the user can fix the cause, 128 + n and `stopped` for a signal n."""
    try:
        yield
    except InputError as error:
        exit_with(2, f"{program}: error: {error}")
    except KeyboardInterrupt as signal:
        exit_with(getattr(signal, "exit_code", 130), f"\n{stopped}")


@contextlib.contextmanager
def report_how_to_resume(folder):
    """End the process in one line if the run is stopped, cannot continue, or its folder cannot be written."""
    resume = f"python {PROGRAM} --resume {shlex.quote(str(folder))}"
    try:
        yield
    except Interrupted as signal:
        exit_with(signal.exit_code, f"\nStopped by {signal}, everything is saved. Resume with: {resume}")
    except KeyboardInterrupt as signal:
        name = str(signal) or "SIGINT"
        exit_with(getattr(signal, "exit_code", 130), f"\nStopped by {name}. Resume with: {resume}")
    except RunError as error:
        exit_with(1, f"{PROGRAM}: error: {error}")
    except OSError as error:
        if isinstance(sys.stdout, _Output) and error is sys.stdout.lost:
            raise
        exit_with(1, f"{PROGRAM}: error: {format_os_error(error, folder)}; once fixed, resume with: {resume}")

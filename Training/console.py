"""Shared by all programs: standard streams, signals, starting Keras, and one-line error messages."""

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
    """Decorate the `main` function of a program.

    Inside it, the standard streams are always usable (see `guard_streams`), signals that would end the process raise
    `Stopped`, and errors in the user's input end the process with a one-line message.

    Args:
        program: str, name of the program, with which its messages begin.
        stopped: str, message after a signal, unless an inner function prints one.
        output_needed: bool, whether the program is useless without its standard output.
    """

    def decorate(main):
        @functools.wraps(main)
        def run(*args, **kwargs):
            with guard_streams(program, output_needed), catch_signals(), report_errors(program, stopped):
                return main(*args, **kwargs)

        return run

    return decorate


def run_program(main):
    """Run a program's `main` and exit with the code that it returns. Signals are ignored afterwards."""
    try:
        raise SystemExit(main() or 0)
    finally:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)


class _Output:
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
    if isinstance(sys.stdout, _Output):  # an entry point was called from another
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

    Signals that are ignored, like SIGHUP under `nohup`, or that have another handler are left alone.
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


def warn(line):
    """Write one line to standard error."""
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
    """Discard everything that is written to standard error, also by C++ code; exceptions pass through."""
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
    """Undo the user's global settings from keras.json and the environment; see `keras.config`."""
    keras.config.set_floatx("float32")
    keras.config.set_epsilon(1e-7)
    keras.config.set_image_data_format("channels_last")
    keras.config.set_max_epochs(None)
    keras.config.set_max_steps_per_epoch(None)


def start_keras(distribute="none"):
    """Import Keras and its backend, find the device, and return the `keras` module.

    While TensorFlow starts, its C++ code writes several lines of notes before it reads any of its settings. They are
    discarded, since they would hide the program's own messages.

    Args:
        distribute: see `devices`; with "data", this waits for the other processes of the run.

    Raises:
        InputError: KERAS_BACKEND is not a backend of this project, or is not installed; see also `devices`.
    """
    from Training import devices

    backend = os.environ.get("KERAS_BACKEND") or "tensorflow"
    if backend not in BACKENDS:
        raise InputError(f"KERAS_BACKEND must be one of {', '.join(BACKENDS)}, received {backend!r:.80}")
    devices.refuse_mode(distribute, backend)
    os.environ["KERAS_BACKEND"] = backend
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # errors that matter for a run are raised in Python too
    try:
        with hold_signals(), silence_stderr():
            import keras
        reset_configuration(keras)
        devices.join_processes(distribute)
        # From here on, JAX handles SIGTERM in each of several processes; its handler must stay in place.
        with contextlib.nullcontext() if distribute == "data" else hold_signals(), silence_stderr():
            devices.device_name()
        # TensorFlow warns about many models in one process, which is normal in a notebook.
        logging.getLogger("tensorflow").setLevel(logging.ERROR)
    except ImportError as error:
        raise InputError(
            f"{error}: install requirements.txt, or requirements-jax.txt for JAX, or set KERAS_BACKEND to the other of "
            f"{', '.join(BACKENDS)}"
        ) from None
    return keras


def exit_with(code, line):
    """End the process with one line on standard error; a leading line break is only written to a terminal, after ^C."""
    start = "\n" if line.startswith("\n") and sys.stderr.isatty() else ""
    sys.stderr.write(start + escape(line.removeprefix("\n")) + "\n")
    raise SystemExit(code) from None


@contextlib.contextmanager
def report_errors(program=PROGRAM, stopped="Stopped before the training began."):
    """Turn exceptions into one-line messages: exit code 2 for `InputError`, 128 + n and `stopped` for signal n."""
    try:
        yield
    except InputError as error:
        exit_with(2, f"{program}: error: {error}")
    except KeyboardInterrupt as signal:
        exit_with(getattr(signal, "exit_code", 130), f"\n{stopped}")


@contextlib.contextmanager
def report_how_to_resume(folder):
    """End the process with a one-line message if the run is stopped, fails, or its folder cannot be written."""
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

"""Shared by all programs: starting Keras, and one-line error messages; see also `Model.console`."""

import contextlib
import functools
import gc
import logging
import os
import shlex
import sys
import traceback

from Model.console import SIGNALS, Output, catch_signals, guard_streams, hold_signals, import_keras, run_program, warn
from Training.errors import InputError, Interrupted, RunError, escape, format_os_error

PROGRAM = "training_cifar10.py"
BACKENDS = ("tensorflow", "jax")
__all__ = [
    "BACKENDS",
    "PROGRAM",
    "SIGNALS",
    "catch_signals",
    "entry_point",
    "exit_with",
    "format_count",
    "format_duration",
    "guard_streams",
    "hold_signals",
    "report_errors",
    "report_how_to_resume",
    "run_program",
    "silence_stderr",
    "start_keras",
    "warn",
]


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


def format_duration(seconds):
    """Return seconds as a text such as 45 s, 12 min or 3 h 20 min."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def format_count(number, noun):
    """Return a number and its noun: 1 epoch, 2,000 epochs, 0 classes."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}{'es' if noun.endswith('s') else 's'}"


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


def choose_backend():
    """Set KERAS_BACKEND, by default to TensorFlow, and return it.

    Raises:
        InputError: it is not a backend of this project.
    """
    backend = os.environ.get("KERAS_BACKEND") or "tensorflow"
    if backend not in BACKENDS:
        raise InputError(f"KERAS_BACKEND must be one of {', '.join(BACKENDS)}, received {backend!r:.80}")
    os.environ["KERAS_BACKEND"] = backend
    return backend


@contextlib.contextmanager
def explain_import_errors():
    """Raise `InputError` if the backend is not installed, or if Keras cannot use its own configuration."""
    try:
        yield
    except InputError:
        raise
    except ValueError as error:
        raise InputError(str(error)) from None
    except ImportError as error:
        raise InputError(
            f"{error}: install requirements.txt, or requirements-jax.txt for JAX, or set KERAS_BACKEND to the other of "
            f"{', '.join(BACKENDS)}"
        ) from None


def start_keras(distribute="none"):
    """Import Keras and its backend, find the device, and return the `keras` module.

    While TensorFlow starts, its C++ code writes several lines of notes before it reads any of its settings. They are
    discarded, since they would hide the program's own messages.

    Args:
        distribute: see `devices`; with "data", this waits for the other processes of the run.

    Raises:
        InputError: KERAS_BACKEND is not a backend of this project, or is not installed, or Keras cannot use its own
            configuration; see also `devices`.
    """
    from Training import devices

    backend = choose_backend()
    devices.refuse_mode(distribute, backend)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # errors that matter for a run are raised in Python too
    with explain_import_errors():
        with hold_signals(), silence_stderr():
            keras = import_keras()
        reset_configuration(keras)
        devices.join_processes(distribute)
        # From here on, JAX handles SIGTERM in each of several processes; its handler must stay in place.
        with contextlib.nullcontext() if distribute == "data" else hold_signals(), silence_stderr():
            devices.device_name()
        # TensorFlow warns about many models in one process, which is normal in a notebook.
        logging.getLogger("tensorflow").setLevel(logging.ERROR)
    return keras


def exit_with(code, line):
    """End the process with one line on standard error; a leading line break is only written to a terminal, after ^C."""
    start = "\n" if line.startswith("\n") and sys.stderr.isatty() else ""
    sys.stderr.write(start + escape(line.removeprefix("\n")) + "\n")
    error = sys.exc_info()[1]
    # Training holds iterators. It raises no InputError: those of its streams become RunError.
    if error and not isinstance(error, InputError):
        _release_frames(error)
    raise SystemExit(code) from None


def _release_frames(error):
    """Delete what the functions that an exception ended hold: TensorFlow warns of iterators that outlive Python."""
    for ended, _ in traceback.walk_tb(error.__traceback__):
        for frame, _ in traceback.walk_stack(ended):  # Keras removes its own frames from the traceback
            with contextlib.suppress(RuntimeError):  # still running
                frame.clear()
    gc.collect()  # Keras' iterator and its generator refer to each other


@contextlib.contextmanager
def report_errors(program=PROGRAM, stopped="Stopped before the training began."):
    """End the process in one line.

    The exit code is 2 if the user can fix the cause, 1 for what the system refuses, and 128 + n, with the line
    `stopped`, for a signal n.
    """
    try:
        yield
    except InputError as error:
        exit_with(2, f"{program}: error: {error}")
    except RunError as error:
        exit_with(1, f"{program}: error: {error}")
    except OSError as error:
        if isinstance(sys.stdout, Output) and error is sys.stdout.lost:
            raise
        exit_with(1, f"{program}: error: {format_os_error(error, 'the system')}")
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
        if isinstance(sys.stdout, Output) and error is sys.stdout.lost:
            raise
        exit_with(1, f"{PROGRAM}: error: {format_os_error(error, folder)}; once fixed, resume with: {resume}")

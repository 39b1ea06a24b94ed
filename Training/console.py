"""What a run says on the console besides its progress: a quiet start, and every end that is not success in one line."""

import contextlib
import logging
import os
import shlex
import sys

from Training import devices
from Training.errors import InputError, Interrupted, RunError, escape

PROGRAM = "training_cifar10.py"
BACKENDS = ("tensorflow", "jax")


def warn(line):
    """Write one line to the standard error."""
    sys.stderr.write(line + "\n")


def format_duration(seconds):
    """Seconds as words: 45 s, 12 min, 3 h 20 min."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


@contextlib.contextmanager
def silence_stderr():
    """Send what is written to the process' standard error, also by C++, nowhere; exceptions pass as ever."""
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
    """Import Keras and its backend and find the device; returns the `keras` module.

    TensorFlow's C++ writes half a dozen lines of notes while it starts, a failed search for a GPU among them, before
    any of its switches is read; a user's own line would drown in them.

    Args:
        distribute: see `devices`; where it is "data", the other processes of the run are waited for.

    Raises:
        InputError: KERAS_BACKEND names no backend of ours, or one that is not installed; see also `devices`.
    """
    backend = os.environ.get("KERAS_BACKEND") or "tensorflow"
    if backend not in BACKENDS:
        raise InputError(f"KERAS_BACKEND must be one of {', '.join(BACKENDS)}, received {backend!r:.80}")
    devices.refuse_mode(distribute, backend)
    os.environ["KERAS_BACKEND"] = backend
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # what is an error for a run, Python raises, too
    try:
        with silence_stderr():
            import keras
        reset_configuration(keras)
        devices.join_processes(distribute)
        with silence_stderr():
            devices.device_name()
        # Many models in one process, as in a notebook, are no mistake of which TensorFlow need warn.
        logging.getLogger("tensorflow").setLevel(logging.ERROR)
    except ImportError as error:
        raise InputError(
            f"{error}: install requirements.txt, for JAX requirements-jax.txt, or set KERAS_BACKEND to the other of "
            f"{', '.join(BACKENDS)}"
        ) from None
    return keras


def exit_with(code, line):
    """End the process with one line on the standard error; it may begin with a line break, below what Ctrl-C shows."""
    sys.stderr.write(line[:1] + escape(line[1:]) + "\n")
    raise SystemExit(code) from None


@contextlib.contextmanager
def report_errors(program=PROGRAM, stopped="Stopped before the training began."):
    """Turn what the user can mend into one line and exit code 2, and Ctrl-C into `stopped` and 130."""
    try:
        yield
    except InputError as error:
        exit_with(2, f"{program}: error: {error}")
    except KeyboardInterrupt:
        exit_with(130, f"\n{stopped}")


@contextlib.contextmanager
def report_how_to_resume(folder):
    """End the process in one line when the run is stopped, cannot go on, or its folder cannot be written."""
    go_on = f"python {PROGRAM} --resume {shlex.quote(str(folder))}"
    try:
        yield
    except Interrupted as signal:
        exit_with(signal.exit_code, f"\nStopped by {signal}, everything is saved. Go on with: {go_on}")
    except KeyboardInterrupt:
        exit_with(130, f"\nStopped. Go on with: {go_on}")
    except RunError as error:
        exit_with(1, f"{PROGRAM}: error: {error}")
    except OSError as error:
        what = f"{error.filename or folder} cannot be written: {error.strerror or error}"
        exit_with(1, f"{PROGRAM}: error: {what}; when that is mended, go on with: {go_on}")

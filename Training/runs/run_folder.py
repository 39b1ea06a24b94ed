"""The folder of one run, and what the run stands on."""

import json
import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path

from Training.errors import InputError, shown

PACKAGES = ("keras", "tensorflow", "jax", "tensorboard", "numpy", "scikit-learn", "matplotlib", "pillow")


def create(logs):
    """Make `<logs>/<YYYYmmdd-HHMMSS>`; runs started in one second get -2, -3 and so on.

    Raises:
        InputError: the folder cannot be made.
    """
    name = time.strftime("%Y%m%d-%H%M%S")
    for attempt in range(1, 1000):
        folder = Path(logs) / (name if attempt == 1 else f"{name}-{attempt}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            if not Path(logs).is_dir():
                raise InputError(f"--logs {logs} is no folder") from None
        except OSError as error:
            raise InputError(f"--logs {logs} cannot be written: {error.strerror}") from None
    raise InputError(f"--logs {logs} has 999 runs of this second")


def open_again(folder):
    """The folder of an earlier run, as a path; checked to be writable."""
    folder = Path(folder)
    if not os.access(folder, os.W_OK):
        raise InputError(f"--resume {folder} cannot be written")
    return folder


def _version(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_commit():
    """The commit of this code, with a + where files differ from it, or None outside a checkout."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=10)
        status = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return commit.stdout.strip() + ("+" if status.stdout.strip() else "") or None


def _processor():
    """The processor's name, as Linux tells it, or what Python knows."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def device():
    """What the backend trains on: the GPU's name, or the processor's and its number of cores."""
    import keras

    if keras.backend.backend() == "jax":
        import jax

        first = jax.devices()[0]
        if first.platform != "cpu":
            return first.device_kind
    elif keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        gpus = tf.config.list_physical_devices("GPU")
        if gpus:
            return tf.config.experimental.get_device_details(gpus[0]).get("device_name", gpus[0].name)
    return (
        f"{_processor()}, {len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} cores"
    )


def environment():
    """Versions, backend, device, processor and git commit, as plain data."""
    import keras

    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "backend": keras.backend.backend(),
        "device": device(),
        "git_commit": _git_commit(),
    }


def replace_file(path, raw):
    """Write bytes beside the file, sync them, and put them in its place: it is whole at every moment."""
    beside = Path(f"{path}.new")
    try:
        with open(beside, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the name, too, must be on the disk
        folder = os.open(Path(path).parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def save_model(model, path):
    """Save a model as `.keras`, whole at every moment."""
    beside = Path(path).with_suffix(".new.keras")
    try:
        model.save(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write(folder, name, text):
    """Write a small text file of the run, whole at every moment."""
    replace_file(Path(folder) / name, text.encode())


def write_json(folder, name, value):
    write(folder, name, json.dumps(value, indent=2) + "\n")


def write_split(folder, held_out, identity):
    """Write `split.json`: positions of the images held out, and the digest of streamed pictures ("" for others).

    Raises:
        InputError: the run is resumed, and the pictures are not those that it began with, or the file cannot be read.
    """
    path = Path(folder) / "split.json"
    try:
        before = json.loads(path.read_text(encoding="utf-8")).get("identity", "")
    except FileNotFoundError:
        before = identity
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or "it is no JSON object"
        raise InputError(f"{shown(path)} cannot be read: {reason}; without it, the run goes on unchecked") from None
    if before != identity:
        raise InputError("the pictures are not those that the run began with: files were added, removed or changed")
    write_json(folder, path.name, {"validation": held_out.tolist(), "identity": identity})

"""Finds, loads and packs the trained weights that come with the project.

Each has a folder `weights/<network>-<weights>/` with `network.weights.h5` and `about.json`, packed by
`python -m Training.tools.ship`. The file has the layout of Keras' `save_weights`, with matrices and kernels stored as
float16, vectors as float32, and the mean and standard deviation of the preprocessing in a group of their own.
"""

import hashlib
import io
import json
import stat
import tempfile
from pathlib import Path

from Model.geometries import parse_name

FOLDER = Path(__file__).resolve().parent.parent / "weights"
FILE = "network.weights.h5"
ABOUT = "about.json"
LARGEST_FILE = 2**30  # bytes
DEFAULT_NETWORK = "attention_56"
PREPROCESSING = "preprocessing"  # group of the file, which Keras' own loading does not read
FREE = ("name", "dropout", "classifier_l2")  # arguments that do not affect the weights


def list_weights():
    """Return the names of all available weights, such as `attention_56-cifar10`."""
    return sorted(path.parent.name for path in FOLDER.glob(f"*/{ABOUT}"))


def find_weights(weights, network=DEFAULT_NETWORK):
    """Return the folder of weights, or None if there are no weights of this name.

    Args:
        weights: str, such as `cifar10` or, with the network, `attention_56-cifar10`.
        network: str, the network to use if the name does not include one.
    """
    there = list_weights()
    return next((FOLDER / name for name in (f"{network}-{weights}", weights) if name in there), None)


def read_regular_file(path):
    """Return the bytes of a file of at most `LARGEST_FILE` bytes.

    Raises:
        ValueError: it is larger, or not a regular file, which could hang the program or fill its memory.
        OSError: it cannot be read.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST_FILE:
        raise ValueError(f"it must be a regular file of at most {LARGEST_FILE:,} bytes")
    return path.read_bytes()


def read_about(folder):
    """Return the description of weights: the content of `about.json`.

    `architecture` contains the arguments of the builder, `class_names` the classes in the order of the outputs.

    Args:
        folder: path of the folder with the weights.

    Raises:
        ValueError: the file cannot be read.
    """
    path = Path(folder) / ABOUT
    try:
        about = json.loads(read_regular_file(path))
        parts = {"architecture": dict(about["architecture"]), "class_names": list(about["class_names"])}
        return {**about, **parts, "sha256": str(about["sha256"])}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {type(error).__name__}: {str(error):.100}") from None


def read_file(path, sha256):
    """Return the bytes of a weights file.

    Raises:
        ValueError: the file cannot be read, or its SHA-256 is wrong.
    """
    try:
        raw = read_regular_file(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{path} cannot be read: {reason}; restore it with: git checkout {path}") from None
    found = hashlib.sha256(raw).hexdigest()
    if found != sha256:
        raise ValueError(
            f"{path} is corrupted: its SHA-256 is {found:.12}..., expected {sha256:.12}...; restore it with: "
            f"git checkout {path}"
        )
    return raw


def refuse_other_arguments(name, architecture, arguments):
    """Raise `ValueError` if an argument of the builder contradicts the network that was trained.

    Args:
        name: str, the name of the weights.
        architecture: dictionary of the arguments with which the network was built.
        arguments: dictionary of the caller's arguments; None leaves the choice to the weights.
    """
    for key, value in arguments.items():
        if value is None or key in FREE:
            continue
        if key == "preprocessing":
            raise ValueError(f"weights={name!r} have their own preprocessing: leave out preprocessing")
        if key not in architecture:
            raise ValueError(f"weights={name!r}: unknown argument {key}, known are {', '.join([*architecture, *FREE])}")
        own = architecture[key]
        own, value = (tuple(v) if isinstance(v, list | tuple) else v for v in (own, value))
        if value != own:
            raise ValueError(f"weights={name!r} need {key}={own!r}, received {key}={value!r:.80}")


def load_network(network, weights, include_top=True, **arguments):
    """Build a trained network and load its weights.

    Args:
        network: str, name of the network, such as `attention_56`.
        weights: str, such as `cifar10`, `cifar100` or `attention_56-cifar10-nal`.
        include_top: bool, see `builder.network`.
        arguments: those of `builder.residual_attention_network`; by default, the values used in training.

    Returns:
        A functional model that takes raw images of 0 to 255.

    Raises:
        ValueError: there are no such weights, the file is corrupted, or an argument contradicts them.
    """
    folder = find_weights(weights, network)
    if folder is None:
        there = ", ".join(list_weights()) or f"none, {FOLDER} is empty or missing"
        raise ValueError(f"weights={weights!r:.80}: no such weights of {network}; available: {there}")
    about = read_about(folder)
    if about["architecture"].get("model") != network:
        raise ValueError(f"weights={weights!r} are those of {about['architecture'].get('model')}, received {network}")
    return load_folder(folder, include_top, **arguments)


def load_folder(folder, include_top=True, **arguments):
    """Build the network in a folder with `network.weights.h5` and `about.json`; see `load_network`."""
    from Model.builder import assemble
    from Model.preprocessing import mean_subtraction

    path = Path(folder) / FILE
    about = read_about(folder)
    architecture = dict(about["architecture"])
    name = architecture.pop("model")
    architecture["unit"], depth = parse_name(name)
    refuse_other_arguments(path.parent.name, architecture, arguments)
    raw = read_file(path, about["sha256"])
    chosen = {key: value for key, value in arguments.items() if key in FREE and value is not None}
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place) / FILE
        copy.write_bytes(raw)  # the bytes whose SHA-256 was checked
        preprocessing = mean_subtraction(*read_preprocessing(copy))
        chosen = {"name": name, "preprocessing": preprocessing, **architecture, **chosen}
        made = assemble(name, depth, include_top=include_top, **chosen)
        made.load_weights(copy)
    return made


def read_preprocessing(path):
    """Return the mean and the standard deviation in a weights file, as float32 arrays."""
    import h5py

    with h5py.File(path) as file:
        return tuple(file[PREPROCESSING][key][()] for key in ("mean", "std"))


def pack_weights(network, path):
    """Write a network's weights in the layout that the loader reads.

    Kernels are stored as float16. Vectors stay float32: they are small, and moving variances may be beyond the range of
    float16.

    Args:
        network: a functional model with a `keras.layers.Normalization` as its preprocessing.
        path: path of the file to write, `*.weights.h5`.

    Raises:
        ValueError: a kernel is beyond the range of float16, or there is no preprocessing.
    """
    import h5py

    from Model.preprocessing import read_mean_and_std

    mean, std = read_mean_and_std(network)
    with tempfile.TemporaryDirectory() as place:
        whole = Path(place) / FILE
        network.save_weights(whole)
        packed = io.BytesIO()  # on a full disk, h5py ends the process with a segmentation fault
        with h5py.File(whole) as source, h5py.File(packed, "w") as target:
            copy_as_float16(source, target)
            target[f"{PREPROCESSING}/mean"] = mean
            target[f"{PREPROCESSING}/std"] = std
    Path(path).write_bytes(packed.getvalue())


def copy_as_float16(source, target):
    """Copy an HDF5 group with its content; float32 arrays of two or more axes become float16.

    Raises:
        ValueError: a value is beyond the range of float16.
    """
    import h5py
    import numpy as np

    target.attrs.update(source.attrs)
    for name, item in source.items():
        if isinstance(item, h5py.Group):
            copy_as_float16(item, target.create_group(name))
            continue
        values = item[()]
        if values.ndim > 1 and values.dtype == "float32":
            largest = np.abs(values).max(initial=0)
            if not largest <= np.finfo("float16").max:
                raise ValueError(f"{item.name} is beyond the range of float16: {largest:g}")
            values = values.astype("float16")
        target.create_dataset(name, data=values).attrs.update(item.attrs)

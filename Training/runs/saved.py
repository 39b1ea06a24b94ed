"""Finds and loads networks that runs have saved, and reads the names of their classes."""

import contextlib
import dataclasses
import io
import json
import math
import warnings
import zipfile
from pathlib import Path

from Model import weights
from Training.errors import InputError, format_path, shorten
from Training.files import open_file, read_text, refuse_special
from Training.recipe import Recipe, find_dataset

CAUSE = "Exception encountered:"  # precedes the cause in Keras' messages
LARGEST_NETWORK = 2**30  # bytes: 250 million parameters, five times those of the largest network here
LARGEST_CONFIG = 64 * 2**20  # bytes of a network's description
LARGEST_MAP = 2**28  # bytes of what one layer gives for one image: 256 channels of 512x512
UNITS = ("p", "t", "r", "r_up", "mask_depth")  # arguments that say how many parts an attention block has
MOST_UNITS = 1000  # largest value of each of them
LARGEST_SIDE = 100_000  # of packed weights: pixels of an image's side, or classes
WEIGHTS = "model.weights.h5"
CONFIG = "config.json"


def find(where, best=False, network=weights.DEFAULT_NETWORK):
    """Return the file of a saved network.

    Args:
        where: name of weights that come with the project, such as "cifar10" (looked up first), a run's folder (for its
            `last.keras`), or a file.
        best: bool, whether to use the folder's `best.keras`.
        network: str, the network to use if the name of the weights does not include one.

    Raises:
        InputError: there is no such file.
    """
    path = Path(where)
    folder = weights.find_weights(str(where), network)
    if folder and not best:
        return folder / weights.FILE
    if folder and not path.exists():
        raise InputError(f"--best needs a run's folder, received the weights {format_path(where)}")
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        if not path.is_dir():
            refuse_special(path, path.stat().st_mode)
    if path.is_file():
        if best:
            raise InputError(f"--best needs a run's folder, received the file {format_path(where)}")
        return path
    if not path.is_dir():
        there = ", ".join(weights.list_weights()) or "none"
        raise InputError(
            f"{format_path(where)} does not exist: a run's folder, a .keras file or the name of weights is needed "
            f"(available: {there})"
        )
    if (path / weights.FILE).is_file() and not best:
        return path / weights.FILE
    name = "best.keras" if best else "last.keras"
    if not (path / name).is_file():
        others = ", ".join(sorted(other.name for other in path.glob("*.keras"))) or "no .keras file"
        raise InputError(f"{format_path(where)} has no {name}; it has {others}")
    return path / name


def _measure_unpacked(path):
    """Return the unpacked size of a saved network in bytes: of its members or, if larger, of its HDF5 arrays."""
    import h5py

    with open_file(path, LARGEST_NETWORK) as source, contextlib.ExitStack() as stack:
        members = 0
        if zipfile.is_zipfile(source):
            file = stack.enter_context(zipfile.ZipFile(source))
            members = sum(member.file_size for member in file.infolist())
            if members > LARGEST_NETWORK:
                return members
            source = io.BytesIO(file.read(WEIGHTS))  # HDF5 needs random access, which is slow in a member of a ZIP file
        items = []
        stack.enter_context(h5py.File(source, "r")).visititems(lambda _, item: items.append(item))
        return max(members, sum(item.nbytes for item in items if isinstance(item, h5py.Dataset)))


def _read_if_possible(read, path):
    """Return `read(path)`, or None if the file is damaged: the loader then reports what is wrong with it."""
    try:
        return read(path)
    except InputError:
        raise
    except Exception:
        return None


def _refuse_large(path):
    """Raise `InputError` if a saved network unpacks to more than `LARGEST_NETWORK` bytes."""
    size = _read_if_possible(_measure_unpacked, path)
    if size is not None and size > LARGEST_NETWORK:
        raise InputError(f"{format_path(path)} unpacks to {size:,} bytes, at most {LARGEST_NETWORK:,} are read")


def _read_config(path):
    """The description of a saved network, as plain data."""
    import h5py

    with open_file(path, LARGEST_NETWORK) as source, contextlib.ExitStack() as stack:
        if zipfile.is_zipfile(source):
            file = stack.enter_context(zipfile.ZipFile(source))
            if file.getinfo(CONFIG).file_size > LARGEST_CONFIG:
                raise InputError(f"{format_path(path)}: its {CONFIG} has more than {LARGEST_CONFIG:,} bytes")
            return json.loads(file.read(CONFIG))
        return json.loads(stack.enter_context(h5py.File(source, "r")).attrs["model_config"])


def _list_objects(value):
    """Yield every JSON object in a value, at any depth."""
    if isinstance(value, dict):
        yield value
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _list_objects(each)


def _refuse_large_description(path):
    """Raise `InputError` if a saved network's description asks for more than the bounds, whatever its file holds."""
    config = _read_if_possible(_read_config, path)
    if config is None:
        return
    for each in _list_objects(config):
        for name in UNITS:
            if type(each.get(name)) is int and each[name] > MOST_UNITS:
                raise InputError(f"{format_path(path)}: {name} must be {MOST_UNITS} or less, but is larger")
    weights_size, largest_map = _measure_description(config)
    for size, limit, what in (
        (weights_size, LARGEST_NETWORK, "weights"),
        (largest_map, LARGEST_MAP, "one layer's output for one image"),
    ):
        if size > limit:
            raise InputError(
                f"{format_path(path)} describes a network with {size:,} bytes of {what}, at most {limit:,} are read"
            )


def _measure_description(config):
    """Build a network without values, and return the bytes of its weights and of the largest output of a layer.

    A network that cannot be built is measured as far as it was.
    """
    import keras
    from keras.src.backend.common import global_state

    global_state.set_global_attribute("uninitialized_variables", [])
    layers = []
    try:
        with keras.StatelessScope(initialize_variables=False):
            layers = keras.saving.deserialize_keras_object(config, safe_mode=True).layers
    except Exception:
        pass
    variables = global_state.get_global_attribute("uninitialized_variables")
    global_state.set_global_attribute("uninitialized_variables", [])  # otherwise Keras would initialize them later
    outputs = [output.shape[1:] for layer in layers for output in _list_tensors(layer)]
    weights_size = sum(_count_bytes(variable.shape) for variable in variables)
    return weights_size, max(map(_count_bytes, outputs), default=0)


def _count_bytes(shape):
    """Return the bytes of a float32 tensor; an unknown side counts as 1."""
    return 4 * math.prod(side or 1 for side in shape)


def _list_tensors(layer):
    """Return the symbolic outputs of a layer, or none if it was not called exactly once."""
    import keras

    try:
        return keras.tree.flatten(layer.output)
    except (AttributeError, ValueError):
        return []


def read_about(path):
    """Return the description of packed weights, or None if the file is a `.keras` file.

    Raises:
        InputError: the description cannot be read.
    """
    path = Path(path)
    if path.name != weights.FILE:
        return None
    try:
        return weights.read_about(path.parent)
    except ValueError as error:
        raise InputError(str(error)) from None


def load_packed(path):
    """Return the network with packed weights.

    Raises:
        InputError: see `Model.weights.load_network`, or the description asks for more than the bounds.
    """
    for name, value in read_about(path)["architecture"].items():
        limit = MOST_UNITS if name in UNITS else LARGEST_SIDE
        for each in value if isinstance(value, list) else [value]:
            if type(each) is int and each > limit:
                about = Path(path).with_name(weights.ABOUT)
                raise InputError(f"{format_path(about)}: {name} must be {limit:,} or less, but is larger")
    try:
        return weights.load_folder(Path(path).parent)
    except Exception as error:  # can be of any type if the description does not match its file
        raise InputError(shorten(error)) from None


def load(path):
    """Load the network in a file that `find` returned, from images to class probabilities.

    Raises:
        InputError: not a Keras file, one that this version cannot load, or not a network from RGB images to classes.
    """
    if read_about(path):
        return load_packed(path)
    import keras  # only here: finding files needs no framework

    import Module  # noqa: F401  registers the layers, so that Keras can load them

    _refuse_large(path)
    _refuse_large_description(path)
    try:
        with warnings.catch_warnings():
            # Keras only warns about weights that it does not find, and leaves them at their initial values.
            warnings.filterwarnings("error", module=r"keras\.src\.saving")
            model = keras.saving.load_model(path, compile=False)
    except Exception as error:  # can be of any type if the file is damaged or from another version
        raise InputError(
            f"{format_path(path)} cannot be loaded as a network{_version(path)}, this is Keras {keras.__version__}: "
            f"{_find_cause(error)}"
        ) from None
    inputs, outputs = (getattr(model, name, None) for name in ("input_shape", "output_shape"))
    if not isinstance(inputs, tuple) or len(inputs) != 4 or None in inputs[1:] or inputs[3] != 3:
        raise InputError(f"{format_path(path)} must take images (height, width, 3), but takes {inputs!r:.100}")
    if not isinstance(outputs, tuple) or len(outputs) != 2 or outputs[1] is None:
        raise InputError(f"{format_path(path)} must output one probability per class, but outputs {outputs!r:.100}")
    return model


def convert_to_float32(network):
    """Return the network with float32 arithmetic, whatever precision it was trained in."""
    import keras

    if all(layer.compute_dtype == "float32" for layer in network.layers):
        return network
    copy = keras.models.clone_model(
        network, clone_function=lambda layer: type(layer).from_config({**layer.get_config(), "dtype": "float32"})
    )
    copy.set_weights(network.get_weights())
    return copy


def read_recipe(path):
    """Return the recipe in a run's `recipe.json`.

    Raises:
        InputError: the file cannot be read, or is not a recipe.
    """
    try:
        return Recipe.from_json(read_text(path))
    except OSError as error:
        raise InputError(f"{format_path(path)} cannot be read: {error.strerror}") from None


def find_recipe(path, dataset=None, data_dir=None):
    """Return a recipe that reads a data set for a saved network.

    Args:
        path: path of the network. If a `recipe.json` next to it has the same data set, that recipe is returned, without
            the run's cache, which another machine does not have.
        dataset: str, name of the data set, or None for that of the run.
        data_dir: folder of the data set, or None for that of the recipe.

    Raises:
        InputError: no data set is given, and there is no recipe next to the network.
    """
    own = Path(path).with_name("recipe.json")
    recipe = read_recipe(own) if own.exists() else None
    if recipe is None or dataset not in (None, recipe.dataset):
        if dataset is None:
            raise InputError(f"there is no recipe.json next to {format_path(path)}: give --dataset")
        recipe = Recipe(dataset=dataset)
    return dataclasses.replace(recipe, cache="", data_dir=recipe.data_dir if data_dir is None else data_dir)


def fit_image_size(recipe, network):
    """Return the recipe with which streamed pictures are read in the size that a network takes."""
    streamed = find_dataset(recipe.dataset).streamed
    return dataclasses.replace(recipe, image_size=network.input_shape[1]) if streamed else recipe


def refuse_other_images(network, data, what):
    """Raise `InputError` if the images of the data set `what` have another size than those of a network."""
    if network.input_shape[1:] != data.test.images.shape[1:]:
        raise InputError(
            f"the network takes images of {network.input_shape[1:]}, {what} has {data.test.images.shape[1:]}"
        )


def _find_cause(error):
    """Return the cause in Keras' message for a file that it cannot load, in at most 200 characters.

    For a layer that cannot be restored, the message begins with an explanation of several hundred characters and shows
    the layer's configuration. The cause follows, in the last line that reports an exception.
    """
    cause = " ".join(str(error).rpartition(CAUSE)[2].split())
    return cause[:200] or shorten(error)


def _version(path):
    """Return a text with the version of Keras that saved the file, or "" if it is unknown."""
    try:
        with zipfile.ZipFile(path) as file:
            return f" (saved by Keras {json.loads(file.read('metadata.json'))['keras_version']!s:.20})"
    except Exception:
        return ""


def read_classes(path, least, most=None):
    """Return the class names from packed weights or a run's `classes.json`, or None if there is no such file.

    Raises:
        InputError: the file is not a list of `least` names (or, if `most` is given, of up to `most`).
    """
    about = read_about(path)
    if about:
        path, names = Path(path).with_name(weights.ABOUT), about["class_names"]
    else:
        path = Path(path).with_name("classes.json")
        if not path.exists():
            return None
        try:
            names = json.loads(read_text(path))
        except InputError:
            raise
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{format_path(path)} cannot be read: {shorten(error)}") from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{format_path(path)} must be a list of class names")
    if not least <= len(names) <= (most or least):
        raise InputError(
            f"{format_path(path)} must be a list of the network's {least} class names, but has {len(names)}"
        )
    return names

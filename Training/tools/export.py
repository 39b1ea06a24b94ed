"""Export a saved network, from raw images to probabilities, and compare the export with Keras on real images.

python -m Training.tools.export Logs/<run> --to savedmodel|onnx|tflite
"""

import importlib.util
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from Training.console import (
    entry_point,
    exit_with,
    format_count,
    report_errors,
    run_program,
    silence_stderr,
    start_keras,
)
from Training.data.datasets import load_for_recipe
from Training.errors import InputError, format_os_error, format_path, shorten
from Training.flags import Parser, add_data_flags
from Training.runs import saved

PROGRAM = "python -m Training.tools.export"
LARGEST_DIFFERENCE = 1e-4  # of a probability
BATCH = 64


class Format(NamedTuple):
    """An export format: its name in Keras, the extension of its files, and the packages and backends that it needs."""

    keras: str
    ending: str
    packages: tuple[str, ...]
    backends: tuple[str, ...]


FORMATS = {
    "savedmodel": Format("tf_saved_model", ".savedmodel", ("tensorflow",), ("tensorflow", "jax")),
    "onnx": Format("onnx", ".onnx", ("tensorflow", "tf2onnx", "onnxruntime"), ("tensorflow",)),
    "tflite": Format("litert", ".tflite", ("tensorflow",), ("tensorflow",)),
}


def parse(arguments):
    parser = Parser(prog=PROGRAM, description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument(
        "model", metavar="NAME|RUN|FILE", help="weights such as cifar10, a run's folder or a .keras file"
    )
    parser.add_argument("--to", required=True, choices=tuple(FORMATS), help="format")
    parser.add_argument("--best", action="store_true", help="best.keras (by validation accuracy), not last.keras")
    parser.add_argument(
        "--output",
        metavar="PATH",
        help="file, or folder of a SavedModel (default: next to the network; for weights with a name, in this folder)",
    )
    add_data_flags(parser)
    parser.add_argument("--images", type=int, default=256, metavar="N", help="images to compare (default: 256)")
    options = parser.parse_args(arguments)
    if options.images < 1:
        parser.error(f"--images must be 1 or more, received {options.images}")
    return options


def refuse_impossible(kind):
    """Raise `InputError` if this backend or the installed packages cannot export to the format."""
    import keras

    needed, backend = FORMATS[kind], keras.backend.backend()
    if backend not in needed.backends:
        raise InputError(
            f"Keras {keras.__version__} does not export to {kind} on {backend}: set KERAS_BACKEND=tensorflow; a saved "
            "network can be loaded on every backend"
        )
    missing = [name for name in needed.packages if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"{kind} needs {', '.join(missing)}: pip install -r requirements-export.txt")


def load_test_images(network, recipe, count):
    """Return the first test images of a recipe's data set.

    Raises:
        InputError: the data cannot be read, or has images of another size.
    """
    data = load_for_recipe(saved.fit_image_size(recipe, network))
    saved.refuse_other_images(network, data, recipe.dataset)
    return data.test.images[:count]


def export(network, kind, path):
    """Write the network to `path`; its input is float32 `(batch, height, width, 3)` from 0 to 255, with any batch size.

    Raises:
        InputError: Keras, or the converter that it calls, cannot export the network.
    """
    import keras

    for layer in network.layers:
        if isinstance(layer, keras.layers.Normalization):
            # TensorFlow tensors would become inputs of the ONNX graph; arrays become constants.
            layer.mean, layer.variance = (np.asarray(values) for values in (layer.mean, layer.variance))
    try:
        with silence_stderr():
            network.export(path, format=FORMATS[kind].keras, verbose=False)
    except Exception as error:  # converters raise exceptions of many types
        reason = shorten(error)
        raise InputError(f"Keras {keras.__version__} cannot export this network to {kind}: {reason}") from None


def open_export(kind, path):
    """Return the exported network as a function from images to probabilities, run by the library of the format."""
    if kind == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return lambda images: session.run(None, {session.get_inputs()[0].name: images})[0]
    import tensorflow as tf

    if kind == "savedmodel":
        module = tf.saved_model.load(path)
        return lambda images: module.serve(images).numpy()
    interpreter = tf.lite.Interpreter(str(path))
    interpreter.allocate_tensors()

    def run(images):
        source, target = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
        if tuple(source["shape"]) != images.shape:
            interpreter.resize_tensor_input(source["index"], images.shape)
            interpreter.allocate_tensors()
        interpreter.set_tensor(source["index"], images)
        interpreter.invoke()
        return interpreter.get_tensor(target["index"])

    return run


def measure_differences(run, images, expected):
    """Return the largest differences of `run` from the expected probabilities, `{batch size: difference}`."""
    images, found = images.astype("float32"), {}
    for batch in sorted({1, min(BATCH, len(images))}):
        given = [run(images[start : start + batch]) for start in range(0, len(images), batch)]
        found[batch] = float(np.abs(np.concatenate(given) - expected).max())
    return found


def export_and_check(network, kind, images, output):
    """Export to a temporary folder, compare, and move the export to `output` if it agrees; return the differences."""
    expected = network.predict(images, batch_size=BATCH, verbose=0)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".export-") as place:
        path = Path(place) / f"network{FORMATS[kind].ending}"
        export(network, kind, path)
        try:
            with silence_stderr():
                found = measure_differences(open_export(kind, path), images, expected)
        except Exception as error:  # can be of any type, depending on the library of the format
            raise InputError(f"the {kind} export does not run and was not kept: {shorten(error)}") from None
        if all(difference <= LARGEST_DIFFERENCE for difference in found.values()):  # also False for NaN
            os.replace(path, output)
    return found


def choose_output(path, ending):
    """Return the path of the export: next to the network, but in the current folder for weights of the project."""
    return Path(f"{path.parent.name}{ending}") if saved.read_about(path) else path.with_suffix(ending)


def run(options):
    path = saved.find(options.model, options.best)
    output = Path(options.output or choose_output(path, FORMATS[options.to].ending))
    if output.exists():
        raise InputError(f"{format_path(output)} exists: remove it, or give another --output")
    if not os.access(output.parent, os.W_OK):
        raise InputError(f"{format_path(output)} cannot be written")
    recipe = saved.find_recipe(path, options.dataset, options.data_dir)
    start_keras()
    refuse_impossible(options.to)
    network = saved.convert_to_float32(saved.load(path))
    images = load_test_images(network, recipe, options.images)
    found = export_and_check(network, options.to, images, output)
    compared = format_count(len(images), "test image")
    print(f"  compared with Keras on {compared} of {recipe.dataset}, largest difference of a probability:")
    for batch, difference in found.items():
        print(f"  {difference:.1e}  in batches of {batch}")
    if not output.exists():
        exit_with(1, f"{PROGRAM}: error: more than {LARGEST_DIFFERENCE:g}: the export was not kept")
    print(f"  {format_path(path)} exported to {format_path(output)}")


@entry_point(PROGRAM)
def main(arguments=None):
    options = parse(arguments)
    with report_errors(PROGRAM, "Stopped."):
        try:
            run(options)
        except OSError as error:
            exit_with(1, f"{PROGRAM}: error: {format_os_error(error, options.model)}")


if __name__ == "__main__":
    run_program(main)

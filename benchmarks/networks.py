"""Build, save, load and train every network for one step: python -m benchmarks.networks [NAME ...]

KERAS_BACKEND selects the backend. The step runs eagerly on two images; ImageNet's networks get 64 pixels. Prints a row
of a Markdown table for each network. The exit code is 1 if a loaded network has other outputs or a loss is not finite.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from Model.geometries import NETWORKS
from Training.console import entry_point, report_errors, run_program, start_keras
from Training.flags import Parser

PROGRAM = "benchmarks/networks.py"
CASES = [(name, "paper", 32) for name in NETWORKS]
CASES += [(f"attention_{depth}", geometry, 32) for geometry in ("compact", "full") for depth in (56, 92)]
CASES += [(name, "imagenet", 64) for name in NETWORKS if name.endswith(("_56", "_92"))]


def check(name, geometry, pixels, folder):
    """Return seconds to build, seconds to save and load, loss of a step, and whether outputs and loss are right."""
    import keras

    from Model import network

    keras.utils.clear_session()
    keras.utils.set_random_seed(0)
    begun = time.perf_counter()
    model = network(name, geometry=geometry, input_shape=(pixels, pixels, 3))
    built = time.perf_counter()
    path = Path(folder) / "network.keras"
    model.save(path)
    loaded = keras.models.load_model(path)
    saved = time.perf_counter()
    images = np.random.default_rng(0).normal(size=(2, pixels, pixels, 3)).astype("float32")
    outputs = [keras.ops.convert_to_numpy(each(images, training=False)) for each in (model, loaded)]
    model.compile(keras.optimizers.SGD(1e-3), "sparse_categorical_crossentropy", run_eagerly=True, jit_compile=False)
    loss = float(model.train_on_batch(images, np.array([0, 1])))
    fine = np.array_equal(*outputs) and np.isfinite(loss)
    return built - begun, saved - built, loss, fine


def parse(arguments):
    parser = Parser(prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NETWORKS)} (default: all)")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in NETWORKS]
    if unknown:
        parser.error(f"NAME must be one of {', '.join(NETWORKS)}, received {unknown[0]!r:.80}")
    return options.names


@entry_point(PROGRAM)
def main(arguments=None):
    names = parse(arguments)
    with report_errors(PROGRAM, "Stopped."):
        keras = start_keras()
    print(f"{keras.backend.backend()}\n")
    print("| network | geometry | build s | save and load s | loss of a step | |\n|---|---|---|---|---|---|")
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        for name, geometry, pixels in CASES:
            if not names or name in names:
                build, save, loss, fine = check(name, geometry, pixels, folder)
                wrong += not fine
                row = f"| {name} | {geometry} | {build:.1f} | {save:.1f} | {loss:.3f} | {'ok' if fine else 'WRONG'} |"
                print(row, flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    run_program(main)

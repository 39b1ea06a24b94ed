"""Profile a training step on TensorFlow: python -m benchmarks.operations [NETWORK] [BATCH SIZE]

Prints a Markdown table of the kinds of operations: their number in a step, their milliseconds and their share of the
total, measured with TensorFlow's profiler over ten steps. The times of concurrent operations add up.
"""

import argparse
import collections
import os
import tempfile
from pathlib import Path

import numpy as np

from Model.geometries import NETWORKS
from Training.console import entry_point, report_errors, run_program, start_keras
from Training.flags import Parser

PROGRAM = "benchmarks/operations.py"
STEPS = 10
SHOWN = 14


def make_training_step(name, batch_size):
    """Return a function that trains one step of the default recipe on random images, as `fit` does."""
    import tensorflow as tf

    from Model import network
    from Model.preprocessing import mean_subtraction
    from Training.engine.fit import compile_model
    from Training.recipe import Recipe

    built = network(name, preprocessing=mean_subtraction(np.full((32, 32, 3), 120.0, "float32")))
    model = compile_model(built, Recipe(model=name, batch_size=batch_size), 100)
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (batch_size, 32, 32, 3), dtype="uint8")
    labels = draw.integers(0, 10, batch_size).astype("int32")
    model.make_train_function()
    batches = iter(tf.data.Dataset.from_tensors((images, labels)).repeat())
    return lambda: model.train_function(batches)["loss"].numpy()


def profile(step):
    """Return `{kind of operation: [number, seconds]}` of a step, the mean over ten steps."""
    import tensorflow as tf
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    for _ in range(3):
        step()
    with tempfile.TemporaryDirectory() as folder:
        with tf.profiler.experimental.Profile(folder):
            for _ in range(STEPS):
                step()
        (file,) = Path(folder).glob("**/*.xplane.pb")
        space = xplane_pb2.XSpace.FromString(file.read_bytes())
    found = collections.defaultdict(lambda: [0, 0.0])
    for plane in space.planes:
        for line in plane.lines:
            for event in line.events if line.name.startswith("tf_Compute") else ():
                name, colon, kind = plane.event_metadata[event.metadata_id].name.rpartition(":")
                if colon and not name.endswith(":"):  # name:Kind is an operation, Class::Method part of the runtime
                    each = found[kind.removeprefix("_MklNative").removeprefix("_Mkl")]
                    each[0] += 1 / STEPS
                    each[1] += event.duration_ps / 1e12 / STEPS
    return found


def parse(arguments, program=PROGRAM, about=__doc__):
    """Parse the name of a network and a batch size; also for `benchmarks/convolutions.py`."""
    parser = Parser(prog=program, description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", nargs="?", choices=NETWORKS, default="attention_56", help="(default: %(default)s)")
    parser.add_argument("batch_size", nargs="?", type=int, default=64, help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.batch_size < 1:
        parser.error(f"batch_size must be 1 or more, received {options.batch_size}")
    return options


@entry_point(PROGRAM)
def main(arguments=None):
    options = parse(arguments)
    os.environ["KERAS_BACKEND"] = "tensorflow"
    with report_errors(PROGRAM, "Stopped."):
        start_keras()
    found = profile(make_training_step(options.network, options.batch_size))
    total = sum(seconds for _, seconds in found.values())
    print("| operation | number | ms | share |\n|---|---|---|---|")
    for kind, (number, seconds) in sorted(found.items(), key=lambda item: -item[1][1])[:SHOWN]:
        print(f"| {kind} | {number:.0f} | {1000 * seconds:.1f} | {100 * seconds / total:.1f} % |")
    print(f"| all | {sum(number for number, _ in found.values()):.0f} | {1000 * total:.0f} | 100 % |")


if __name__ == "__main__":
    run_program(main)

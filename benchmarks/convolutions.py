"""Measure the speed of single convolutions on TensorFlow: python -m benchmarks.convolutions [NETWORK] [BATCH SIZE]

Each shape of convolution in the network runs alone: forward, gradient of the input, gradient of the kernel. 1x1
convolutions are also measured as matrix products. Prints GFLOP/s (two operations per multiply-add), compares them with
a large matrix product, and prints the rate of a step that consists of convolutions only.
"""

import collections
import math
import os
import statistics
import time

from benchmarks.operations import parse
from Training.console import entry_point, report_errors, run_program, start_keras

PROGRAM = "benchmarks/convolutions.py"
SECONDS = 0.2  # duration of one measurement
MATRIX = 2048
WAYS = ("forward", "to the input", "to the kernel")


def measure_seconds(act):
    """Return the median seconds of a compiled call of a function that returns a tensor."""
    import tensorflow as tf

    compiled = tf.function(lambda: tf.reshape(act(), (-1,))[0])
    compiled().numpy()
    spent = []
    while sum(spent) < SECONDS or len(spent) < 3:
        begun = time.perf_counter()
        compiled().numpy()
        spent.append(time.perf_counter() - begun)
    return statistics.median(spent)


def count_convolutions(name):
    """Return `{(map shape, kernel shape, strides, padding): number of convolutions}` of a network."""
    import keras

    from Model import network

    found = collections.Counter()
    for layer in network(name)._flatten_layers():
        if isinstance(layer, keras.layers.Conv2D):
            image = tuple(layer.get_build_config()["input_shape"][1:])
            found[image, tuple(layer.kernel.shape), layer.strides[0], layer.padding.upper()] += 1
    return found


def measure_convolution(image, kernel, strides, padding, batch_size):
    """Return the seconds of the three passes of a convolution."""
    import tensorflow as tf

    x, weights = tf.random.normal((batch_size, *image)), tf.random.normal(kernel)
    how = {"strides": [1, strides, strides, 1], "padding": padding}
    y = tf.nn.conv2d(x, weights, **how)
    return [
        measure_seconds(lambda: tf.nn.conv2d(x, weights, **how)),
        measure_seconds(
            lambda: tf.raw_ops.Conv2DBackpropInput(input_sizes=x.shape, filter=weights, out_backprop=y, **how)
        ),
        measure_seconds(lambda: tf.raw_ops.Conv2DBackpropFilter(input=x, filter_sizes=kernel, out_backprop=y, **how)),
    ]


def measure_product(rows, inner, columns):
    """Return the seconds of the three passes of a matrix product."""
    import tensorflow as tf

    x, weights, y = (tf.random.normal(shape) for shape in ((rows, inner), (inner, columns), (rows, columns)))
    return [
        measure_seconds(lambda: tf.matmul(x, weights)),
        measure_seconds(lambda: tf.matmul(y, weights, transpose_b=True)),
        measure_seconds(lambda: tf.matmul(x, y, transpose_a=True)),
    ]


@entry_point(PROGRAM)
def main(arguments=None):
    options = parse(arguments, PROGRAM, __doc__)
    os.environ["KERAS_BACKEND"] = "tensorflow"
    with report_errors(PROGRAM, "Stopped."):
        start_keras()
    batch_size = options.batch_size
    large = []  # measured again for each shape, since the speed of a machine varies
    print("| map | kernel | stride | number | " + " | ".join(WAYS) + " | as matrix products |\n|" + "---|" * 8)
    work = taken = 0
    for (image, kernel, strides, padding), many in sorted(
        count_convolutions(options.network).items(), key=lambda item: -math.prod(item[0][0])
    ):
        height, width = (
            -(-side // strides) if padding == "SAME" else (side - kernel[0]) // strides + 1 for side in image[:2]
        )
        large.append(2 * MATRIX**3 / measure_product(MATRIX, MATRIX, MATRIX)[0] / 1e9)
        operations = 2 * batch_size * height * width * math.prod(kernel)
        spent = measure_convolution(image, kernel, strides, padding, batch_size)
        work, taken = work + 3 * many * operations, taken + many * sum(spent)
        rates = [f"{operations / each / 1e9:.0f}" for each in spent]
        alike = "-"
        if kernel[:2] == (1, 1) and strides == 1:
            times = measure_product(batch_size * height * width, *kernel[2:])
            alike = ", ".join(f"{operations / each / 1e9:.0f}" for each in times)
        row = ["x".join(map(str, image)), "x".join(map(str, kernel)), str(strides), str(many), *rates, alike]
        print(f"| {' | '.join(row)} |", flush=True)
    rate = work / taken / 1e9
    best = statistics.median(large)
    print(f"\nAll figures are GFLOP/s. Matrix product of {MATRIX} x {MATRIX}: {best:.0f}.")
    print(f"All convolutions of a step: {taken:.3f} s, {rate:.0f} GFLOP/s, {100 * rate / best:.0f} % of the product.")


if __name__ == "__main__":
    run_program(main)

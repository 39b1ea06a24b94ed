"""Max pooling as Caffe does it, with a gradient that is fast on JAX."""

import functools
import itertools

import keras
from keras import layers, ops


@keras.saving.register_keras_serializable(package="ResidualAttention")
class MaxPooling2D(layers.MaxPooling2D):
    """The largest value of each window, and of each channel.

    Keras' layer. On JAX, where it is XLA's window reduction, whose gradient scatters (on a CPU 9 to 30 times slower),
    it is the largest of the map's shifted slices. Where several values of a window are the largest, the gradient is
    then shared among them.

    Input shape:  `(batch, rows, columns, channels)`, rows and columns known.
    Output shape: `(batch, rows / strides, columns / strides, channels)`, rounded up with padding "same".
    """

    def call(self, inputs):
        if keras.backend.backend() != "jax":
            return super().call(inputs)
        sizes = self.compute_output_shape(inputs.shape)[1:3]
        spans = [(size - 1) * step + 1 for size, step in zip(sizes, self.strides)]  # from first to last window's corner
        missing = [max(s + k - 1 - side, 0) for s, k, side in zip(spans, self.pool_size, inputs.shape[1:3])]
        around = [(pixels // 2, pixels - pixels // 2) for pixels in missing]
        x = ops.pad(inputs, [(0, 0), *around, (0, 0)], constant_values=-float("inf")) if any(missing) else inputs
        sides = zip(self.pool_size, spans, self.strides)
        rows, columns = ([slice(i, i + span, step) for i in range(pixels)] for pixels, span, step in sides)
        return functools.reduce(ops.maximum, (x[:, i, j] for i, j in itertools.product(rows, columns)))


def pooled_size(size):
    """Pixels left of `size` by a 3/2 max pooling in ceil mode."""
    return size // 2


def ceil_pooling(height, width, name, dtype=None):
    """Layers that pool a `height` x `width` map 3/2 in ceil mode without padding, as the authors' graph does.

    On an even side that is Keras' "same", on an odd one "valid"; where only one side is odd it takes two layers,
    one for rows and one for columns.
    """
    rows, columns = ("valid" if side % 2 else "same" for side in (height, width))
    if rows == columns:
        return [MaxPooling2D(3, 2, rows, name=name, dtype=dtype)]
    return [
        MaxPooling2D((3, 1), (2, 1), rows, name=f"{name}_rows", dtype=dtype),
        MaxPooling2D((1, 3), (1, 2), columns, name=f"{name}_columns", dtype=dtype),
    ]

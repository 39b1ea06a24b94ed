"""Max pooling as in Caffe, with a gradient that is fast on JAX."""

import keras
from keras import layers, ops


@keras.saving.register_keras_serializable(package="ResidualAttention")
class MaxPooling2D(layers.MaxPooling2D):
    """Max pooling: the largest value of each window, for each channel.

    Keras' layer, except on JAX, where its gradient is a scatter that takes 9 to 30 times as long on a CPU. There this
    layer computes the maximum of shifted slices of the map. If several values of a window are equal to the maximum,
    they share the gradient.

    Args: those of `keras.layers.MaxPooling2D`; `data_format` is "channels_last" by default.

    Input shape:  `(batch, rows, columns, channels)`, rows and columns known.
    Output shape: `(batch, rows / strides, columns / strides, channels)`, rounded up with padding "same".
    """

    def __init__(
        self, pool_size=(2, 2), strides=None, padding="valid", data_format="channels_last", name=None, **kwargs
    ):
        super().__init__(pool_size, strides, padding, data_format, name, **kwargs)

    def call(self, inputs):
        if keras.backend.backend() != "jax" or self.data_format != "channels_last" or None in inputs.shape[1:3]:
            return super().call(inputs)
        sizes = self.compute_output_shape(inputs.shape)[1:3]
        spans = [(size - 1) * step + 1 for size, step in zip(sizes, self.strides)]  # from first to last window's corner
        missing = [max(s + k - 1 - side, 0) for s, k, side in zip(spans, self.pool_size, inputs.shape[1:3])]
        if any(missing):
            around = [(pixels // 2, pixels - pixels // 2) for pixels in missing]
            inputs = ops.pad(inputs, [(0, 0), *around, (0, 0)], constant_values=-float("inf"))
        (row_step, column_step), (row_span, column_span) = self.strides, spans
        largest = None
        for i in range(self.pool_size[0]):
            for j in range(self.pool_size[1]):
                values = inputs[:, i : i + row_span : row_step, j : j + column_span : column_step]
                largest = values if largest is None else ops.maximum(largest, values)
        return largest


def pooled_size(size):
    """Return the size of a side of `size` pixels after 3/2 max pooling in ceil mode."""
    return size // 2


def ceil_pooling(height, width, name, dtype=None):
    """Make the layers that pool a `height` x `width` map 3/2 in ceil mode without padding, as the authors' graph does.

    This is Keras' "same" on an even side and "valid" on an odd one. If only one side is odd, there are two layers, one
    for rows and one for columns.
    """
    rows, columns = ("valid" if side % 2 else "same" for side in (height, width))
    if rows == columns:
        return [MaxPooling2D(3, 2, rows, name=name, dtype=dtype)]
    return [
        MaxPooling2D((3, 1), (2, 1), rows, name=f"{name}_rows", dtype=dtype),
        MaxPooling2D((1, 3), (1, 2), columns, name=f"{name}_columns", dtype=dtype),
    ]

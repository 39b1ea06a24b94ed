"""Bilinear upsampling with aligned corners, as in the authors' interpolation layer."""

import keras
import numpy as np
from keras import ops

from Module.checks import check_count


def interpolation_matrix(size_in, size_out):
    """Return the `(size_out, size_in)` matrix that resamples a line of pixels with aligned corners.

    Row i interpolates at `i * (size_in - 1) / (size_out - 1)`: the first and the last pixels of both lines
    coincide. If either line has one pixel, the result is the first pixel.
    """
    matrix = np.zeros((size_out, size_in), "float32")
    position = np.arange(size_out) * ((size_in - 1) / max(size_out - 1, 1))
    low = np.minimum(position.astype(int), max(size_in - 2, 0))
    high = np.minimum(low + 1, size_in - 1)
    rows = np.arange(size_out)
    np.add.at(matrix, (rows, low), 1 - (position - low))
    np.add.at(matrix, (rows, high), position - low)
    return matrix


@keras.saving.register_keras_serializable(package="ResidualAttention")
class BilinearUpsampling(keras.layers.Layer):
    """Bilinear resizing of a map to `height` x `width` with aligned corners.

    `y = A_h x A_w^T` for each channel, with one interpolation matrix for rows and one for columns.
    Source: the interpolation layer of the authors' Caffe graph, whose second input only gives the size.
    `keras.layers.UpSampling2D` and `ops.image.resize` use half-pixel centres and give other values.

    Args:
        height: int, rows of the output, in pixels.
        width: int, columns of the output, in pixels.

    Input shape:  `(batch, rows, columns, channels)`, rows and columns known.
    Output shape: `(batch, height, width, channels)`.

    Raises:
        ValueError: `height` or `width` is not a whole number of 1 or more.
    """

    def __init__(self, height, width, **kwargs):
        super().__init__(**kwargs)
        check_count("height", height)
        check_count("width", width)
        self.height = height
        self.width = width

    def build(self, input_shape):
        self._rows = interpolation_matrix(input_shape[1], self.height)
        self._columns = interpolation_matrix(input_shape[2], self.width)

    def call(self, inputs):
        _, rows, columns, channels = inputs.shape
        a_h, a_w = (ops.cast(matrix, self.compute_dtype) for matrix in (self._rows, self._columns))
        x = ops.reshape(inputs, (-1, rows, columns * channels))
        x = ops.matmul(a_h, x)  # (B, height, columns * C)
        x = ops.reshape(x, (-1, columns, channels))
        x = ops.matmul(a_w, x)  # (B * height, width, C)
        return ops.reshape(x, (-1, self.height, self.width, channels))

    def compute_output_shape(self, input_shape):
        return (input_shape[0], self.height, self.width, input_shape[3])

    def get_config(self):
        return {**super().get_config(), "height": self.height, "width": self.width}

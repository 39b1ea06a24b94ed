"""A convolution that is faster on CPUs: the gradient of kernels in bfloat16, and kernels with groups."""

import functools

import keras
import numpy as np
from keras import layers, ops

MOST_PIXELS = 64  # of a map for which `_small_map` is faster


@functools.cache
def _pointwise():
    """Return a function of TensorFlow tensors: a 1x1 convolution whose two gradients are matrix products."""
    import tensorflow as tf  # not at the top: the module must be importable without TensorFlow

    @tf.custom_gradient
    def convolve(x, kernel):
        filters_in, filters_out = kernel.shape[2:]

        def gradient(upstream):
            rows = tf.reshape(upstream, (-1, filters_out))  # (B * H * W, out)
            by_kernel = tf.matmul(tf.reshape(x, (-1, filters_in)), rows, transpose_a=True)
            by_x = tf.matmul(rows, kernel[0, 0], transpose_b=True)
            return tf.reshape(by_x, tf.shape(x)), by_kernel[None, None]

        return tf.nn.conv2d(x, kernel, 1, "VALID"), gradient

    return convolve


@functools.cache
def _small_map():
    """Return a function of TensorFlow tensors: a convolution whose gradient for the kernel is a convolution again.

    With stride 1, an odd kernel and `p` pixels of padding on each side,
    `dW[i, j, c, o] = sum over b, y, x of X[b, y + i - p, x + j - p, c] dY[b, y, x, o]`.
    This is a convolution of the maps `X` with the kernel `dY`, in which the batch `b` takes the place of the channels,
    and the channels `c` that of the batch.
    """
    import tensorflow as tf

    @tf.custom_gradient
    def convolve(x, kernel):
        # Explicit padding is needed where the kernel `dY` is as large as the map. Elsewhere "SAME" is the same padding,
        # and the step is 5 times as fast: with explicit padding, these operations are not computed by oneDNN.
        pads = [[0, 0], *[[size // 2, size // 2] for size in kernel.shape[:2]], [0, 0]]

        def gradient(upstream):
            by_x = tf.nn.conv2d_transpose(upstream, kernel, tf.shape(x), 1, "SAME")
            maps, rows = tf.transpose(x, (3, 1, 2, 0)), tf.transpose(upstream, (1, 2, 0, 3))
            by_kernel = tf.transpose(tf.nn.conv2d(maps, rows, 1, pads), (1, 2, 0, 3))
            return by_x, by_kernel

        return tf.nn.conv2d(x, kernel, 1, "SAME"), gradient

    return convolve


def _on_cpu():
    """Return whether the backend computes on a CPU."""
    if keras.backend.backend() == "jax":
        import jax

        return jax.default_backend() == "cpu"
    import tensorflow as tf

    return not tf.config.list_physical_devices("GPU")


@keras.saving.register_keras_serializable(package="ResidualAttention")
class Conv2D(layers.Conv2D):
    """Keras' layer with the same arguments, values and weights. On a CPU, three cases are computed in a faster way.

    A kernel with groups is computed as a kernel without, in which the weights between different groups are 0. Keras
    leaves groups on a CPU to XLA, which has no fast routine for them. With 32 groups and 64 to 256 channels, such a
    convolution and its gradients take 25 to 140 times as long as those of the full kernel, which has 32 times as many
    multiply-adds (Intel Xeon, float32, TensorFlow and JAX).

    In bfloat16 on TensorFlow, oneDNN's gradient for a convolution's weights takes 1.2 to 3.5 times as long as the
    forward pass, for the same multiply-adds (AMD EPYC). With stride 1, it is computed in another way:

    - of a 1x1 kernel, as the matrix product `X^T dY` over all pixels, in 22 to 77 % of the time on an Intel Xeon with
      AMX and 90 % on an AMD EPYC (Zen 4), batches of 128;
    - of a larger kernel on a map of at most 64 pixels, as a convolution of `X` with `dY` (see `_small_map`), in 33 to
      100 % of the time on the AMD EPYC, batches of 64 to 256.
    """

    def convolution_op(self, inputs, kernel):
        if self.groups > 1 and _on_cpu():
            return super().convolution_op(inputs, self._fill_groups(kernel))
        convolve = self._choose_gradient(inputs)
        if convolve is None:
            return super().convolution_op(inputs, kernel)
        import tensorflow as tf

        # The kernel is passed as a tensor: custom gradients of variables would need another signature.
        return convolve(inputs, tf.convert_to_tensor(ops.cast(kernel, self.compute_dtype)))

    def _fill_groups(self, kernel):
        """Return `(height, width, in, out)` for a kernel `(height, width, in / groups, out)`: 0 between groups."""
        kernel = ops.cast(kernel, self.compute_dtype)
        inside, filters = kernel.shape[2:]
        same_group = np.kron(np.eye(self.groups), np.ones((inside, filters // self.groups)))  # (in, out)
        return ops.tile(kernel, (1, 1, self.groups, 1)) * ops.cast(same_group, kernel.dtype)

    def _choose_gradient(self, inputs):
        """Return the function with a faster gradient that computes this convolution, or None."""
        if keras.backend.backend() != "tensorflow" or self.compute_dtype != "bfloat16":
            return None
        plain = self.strides == (1, 1) and self.dilation_rate == (1, 1) and self.groups == 1
        channels_last = self.data_format == "channels_last" and len(inputs.shape) == 4
        if not (plain and channels_last and _on_cpu()):
            return None
        if self.kernel_size == (1, 1):
            return _pointwise()
        odd = self.padding == "same" and all(size % 2 for size in self.kernel_size)
        pixels = [size or MOST_PIXELS + 1 for size in inputs.shape[1:3]]  # None: an unknown size
        return _small_map() if odd and np.prod(pixels) <= MOST_PIXELS else None

"""A convolution that is faster on CPUs: the gradient of 1x1 kernels in bfloat16, and kernels with groups."""

import functools

import keras
import numpy as np
from keras import layers, ops


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


def _on_cpu():
    """Return whether the backend computes on a CPU."""
    if keras.backend.backend() == "jax":
        import jax

        return jax.default_backend() == "cpu"
    import tensorflow as tf

    return not tf.config.list_physical_devices("GPU")


@keras.saving.register_keras_serializable(package="ResidualAttention")
class Conv2D(layers.Conv2D):
    """Keras' layer with the same arguments, values and weights. On a CPU, two cases are computed in a faster way.

    A kernel with groups is computed as a kernel without, in which the weights between different groups are 0. Keras
    leaves groups on a CPU to XLA, which has no fast routine for them. With 32 groups and 64 to 256 channels, such a
    convolution and its gradients take 25 to 140 times as long as those of the full kernel, which has 32 times as many
    multiply-adds (Intel Xeon, float32, TensorFlow and JAX).

    In bfloat16 on TensorFlow, the gradient of a 1x1 kernel with stride 1 is a matrix product. oneDNN's gradient for a
    convolution's weights takes 1.3 to 4.5 times as long as the product `X^T dY` over all pixels, for the same
    multiply-adds (Intel Xeon with AMX, batches of 128). The product makes a step of Attention-56 13 % faster.
    """

    def convolution_op(self, inputs, kernel):
        if self.groups > 1 and _on_cpu():
            return super().convolution_op(inputs, self._fill_groups(kernel))
        if not self._is_product(inputs):
            return super().convolution_op(inputs, kernel)
        import tensorflow as tf

        # The kernel is passed as a tensor: custom gradients of variables would need another signature.
        return _pointwise()(inputs, tf.convert_to_tensor(ops.cast(kernel, self.compute_dtype)))

    def _fill_groups(self, kernel):
        """Return `(height, width, in, out)` for a kernel `(height, width, in / groups, out)`: 0 between groups."""
        kernel = ops.cast(kernel, self.compute_dtype)
        inside, filters = kernel.shape[2:]
        same_group = np.kron(np.eye(self.groups), np.ones((inside, filters // self.groups)))  # (in, out)
        return ops.tile(kernel, (1, 1, self.groups, 1)) * ops.cast(same_group, kernel.dtype)

    def _is_product(self, inputs):
        if keras.backend.backend() != "tensorflow" or self.compute_dtype != "bfloat16":
            return False
        pointwise = self.kernel_size == (1, 1) and self.strides == (1, 1) and self.groups == 1
        channels_last = self.data_format == "channels_last" and len(inputs.shape) == 4
        return pointwise and channels_last and _on_cpu()

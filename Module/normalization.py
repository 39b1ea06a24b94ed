"""Batch normalization with the authors' constants, as one operation on TensorFlow."""

import keras
from keras import ops

from Module.replicas import replicas

FUSED_DTYPES = ("float16", "bfloat16", "float32")


@keras.saving.register_keras_serializable(package="ResidualAttention")
class BatchNormalization(keras.layers.BatchNormalization):
    """`gamma * (x - mean) / sqrt(variance + epsilon) + beta` over the batch and all pixels.

    Keras' layer with the authors' epsilon (1e-5) and momentum (0.9; Keras' default of 0.99 is too slow for runs of a
    few epochs).

    In training on TensorFlow, the layer uses TensorFlow's fused operation, which is traced faster and makes fewer
    passes over the data than Keras' composed operations. The fused operation updates the moving variance with the
    unbiased estimate; this layer keeps Keras' biased estimate, so that weights mean the same on every backend.

    In training on JAX, mean and variance are computed in one pass, as `E[x - c]` and `E[(x - c)^2] - E[x - c]^2` around
    the moving mean c, which avoids cancellation. Keras makes a second pass for the variance.

    In all other cases (a mask, renormalization, another axis) Keras' implementation is used. A layer that is created
    under a TensorFlow strategy with several devices is synchronized: it normalizes over the whole batch. This is not
    saved with the model.

    Args:
        axis: int, the axis of the channels.
        momentum: float, share of the old moving statistics that each step keeps.
        epsilon: float, added to the variance.
        **kwargs: further arguments of `keras.layers.BatchNormalization`.

    Input shape:  `(batch, height, width, channels)`, or any other with the channels at `axis`.
    Output shape: the same.
    """

    def __init__(self, axis=-1, momentum=0.9, epsilon=1e-5, **kwargs):
        super().__init__(axis=axis, momentum=momentum, epsilon=epsilon, **kwargs)
        self.synchronized = self.synchronized or replicas() > 1

    def get_config(self):
        return {**super().get_config(), "synchronized": False}

    def call(self, inputs, training=None, mask=None):
        plain = mask is None and not self.renorm and self.axis in (-1, len(inputs.shape) - 1)
        if training and self.trainable and plain:
            if self._is_fusable(inputs):
                return self._train_fused(inputs)
            if keras.backend.backend() == "jax":
                return self._train_in_one_pass(inputs)
        return super().call(inputs, training=training, mask=mask)

    def _is_fusable(self, inputs):
        return (
            keras.backend.backend() == "tensorflow"
            and len(inputs.shape) == 4
            and self.scale
            and self.center
            and not self.synchronized
            and self.variable_dtype == "float32"
            and self.compute_dtype in FUSED_DTYPES
        )

    def _train_in_one_pass(self, inputs):
        x = ops.cast(inputs, keras.backend.result_type(inputs.dtype, "float32"))  # sums overflow float16
        axes = tuple(range(len(x.shape) - 1))
        centre = ops.stop_gradient(ops.cast(self.moving_mean, x.dtype))
        shifted = x - centre
        mean = ops.mean(shifted, axes)
        variance = ops.maximum(ops.mean(ops.square(shifted), axes) - ops.square(mean), 0.0)
        mean = mean + centre
        for moving, value in ((self.moving_mean, mean), (self.moving_variance, variance)):
            moving.assign(ops.cast(moving, x.dtype) * self.momentum + value * (1.0 - self.momentum))
        gamma, beta = (None if each is None else ops.cast(each, x.dtype) for each in (self.gamma, self.beta))
        outputs = ops.batch_normalization(x, mean, variance, self.axis, beta, gamma, self.epsilon)
        return ops.cast(outputs, self.compute_dtype)

    def _train_fused(self, inputs):
        import tensorflow as tf  # not at the top: the module must be importable without TensorFlow

        inputs = tf.cast(inputs, self.compute_dtype)
        size = inputs.shape.num_elements() or tf.cast(tf.size(inputs), tf.float32)
        outputs, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
            x=inputs,
            scale=self.gamma.value,
            offset=self.beta.value,
            mean=self.moving_mean.value,
            variance=self.moving_variance.value,
            epsilon=self.epsilon,
            exponential_avg_factor=1.0 - self.momentum,
        )
        self.moving_mean.assign(mean)
        kept = self.moving_variance.value * self.momentum
        n = size / inputs.shape[-1]  # values per channel; the biased estimate is (n - 1) / n of the unbiased one
        self.moving_variance.assign(variance - (variance - kept) / n)
        return outputs

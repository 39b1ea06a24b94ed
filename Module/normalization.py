"""Batch normalization with the authors' constants, in one operation on TensorFlow."""

import keras
from keras import ops

from Module.replicas import replicas


@keras.saving.register_keras_serializable(package="ResidualAttention")
class BatchNormalization(keras.layers.BatchNormalization):
    """`gamma * (x - mean) / sqrt(variance + epsilon) + beta` over the batch and all pixels.

    Keras' layer with the authors' epsilon (1e-5) and momentum (0.9, where Keras has 0.99: too slow for
    runs of a few epochs). In training on TensorFlow it is the one fused operation that TensorFlow has,
    where Keras composes it of several: fewer to trace and fewer passes over the data. It moves the
    statistics, too, but the variance with the unbiased estimate; ours stays Keras', with the biased
    one, so weights mean the same on every backend.
    On JAX mean and variance are taken in one pass, as `E[x - c]` and `E[(x - c)^2] - E[x - c]^2` around the
    moving mean c, so that they do not cancel; Keras takes the variance after the mean, in a second pass.
    Built where TensorFlow splits a batch over several devices, it normalizes over all of them, by Keras'
    synchronized operations; a saved model does not keep that.

    Args:
        momentum: float, share of the old moving statistics that each step keeps.
        epsilon: float, added to the variance.

    Input shape:  `(batch, height, width, channels)`.
    Output shape: the same.
    """

    def __init__(self, momentum=0.9, epsilon=1e-5, **kwargs):
        super().__init__(momentum=momentum, epsilon=epsilon, **kwargs)
        self.synchronized = replicas() > 1

    def get_config(self):
        return {**super().get_config(), "synchronized": False}

    def call(self, inputs, training=None, mask=None):
        if training and self.trainable and self._is_fusable(inputs):
            return self._fused_training_step(inputs)
        return super().call(inputs, training=training, mask=mask)

    def _is_fusable(self, inputs):
        return (
            keras.backend.backend() == "tensorflow"
            and len(inputs.shape) == 4
            and self.axis in (-1, 3)
            and self.scale
            and self.center
            and not self.synchronized
        )

    def _moments(self, inputs, mask):
        if keras.backend.backend() != "jax" or mask is not None or self.axis not in (-1, len(inputs.shape) - 1):
            return super()._moments(inputs, mask)
        centre = ops.stop_gradient(ops.cast(self.moving_mean, inputs.dtype))
        shifted = inputs - centre
        mean = ops.mean(shifted, self._reduction_axes)
        variance = ops.mean(ops.square(shifted), self._reduction_axes) - ops.square(mean)
        return mean + centre, ops.maximum(variance, 0.0)

    def _fused_training_step(self, inputs):
        import tensorflow as tf  # only here: the module must import where TensorFlow is not installed

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
        n = size / inputs.shape[-1]  # values of a channel; the biased estimate is (n - 1) / n of the unbiased
        self.moving_variance.assign(variance - (variance - kept) / n)
        return outputs

"""Batch normalization with the authors' constants, in one operation on TensorFlow."""

import keras


@keras.saving.register_keras_serializable(package="ResidualAttention")
class BatchNormalization(keras.layers.BatchNormalization):
    """`gamma * (x - mean) / sqrt(variance + epsilon) + beta` over the batch and all pixels.

    Keras' layer with the authors' epsilon (1e-5) and momentum (0.9, where Keras has 0.99: too slow for
    runs of a few epochs). In training on TensorFlow it is the one fused operation that TensorFlow has,
    where Keras composes it of several: fewer to trace and fewer passes over the data. The moving
    variance stays Keras' (the biased estimate), so weights mean the same on every backend.

    Args:
        momentum: float, share of the old moving statistics that each step keeps.
        epsilon: float, added to the variance.

    Input shape:  `(batch, height, width, channels)`.
    Output shape: the same.
    """

    def __init__(self, momentum=0.9, epsilon=1e-5, **kwargs):
        super().__init__(momentum=momentum, epsilon=epsilon, **kwargs)

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

    def _fused_training_step(self, inputs):
        import tensorflow as tf  # only here: the module must import where TensorFlow is not installed

        inputs = tf.cast(inputs, self.compute_dtype)
        outputs, mean, unbiased = tf.compat.v1.nn.fused_batch_norm(
            inputs, tf.convert_to_tensor(self.gamma), tf.convert_to_tensor(self.beta), epsilon=self.epsilon
        )
        count = tf.cast(tf.size(inputs) // inputs.shape[-1], unbiased.dtype)
        variance = unbiased * (count - 1.0) / count
        for moving, batch in ((self.moving_mean, mean), (self.moving_variance, variance)):
            moving.assign(moving * self.momentum + batch * (1.0 - self.momentum))
        return outputs

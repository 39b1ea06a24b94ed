"""Dropout that drops the same features on one device and on several."""

import keras
from keras import ops

from Module.replicas import draw


@keras.saving.register_keras_serializable(package="ResidualAttention")
class Dropout(keras.layers.Dropout):
    """Dropout: in training, `x / (1 - rate)` if a uniform random number is at least `rate`, and 0 otherwise.

    Keras' layer, with random numbers that do not depend on the number of devices that share a batch. Under a
    TensorFlow strategy, Keras' layer drops the same features in each replica.

    Args:
        rate: float in [0, 1).
        **kwargs: further arguments of `keras.layers.Dropout`; with a `noise_shape` the layer is Keras' own.

    Input shape:  any.
    Output shape: the same.
    """

    def call(self, inputs, training=False):
        if not training or self.rate in (0, 1) or self.noise_shape is not None:
            return super().call(inputs, training=training)
        drawn = draw(keras.random.uniform, ops.shape(inputs), 0.0, 1.0, seed=self.seed_generator)
        return ops.where(drawn >= self.rate, inputs / (1 - self.rate), ops.zeros_like(inputs))

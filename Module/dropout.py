"""Dropout that is the same on one device and on several."""

import keras
from keras import ops

from Module.replicas import draw


@keras.saving.register_keras_serializable(package="ResidualAttention")
class Dropout(keras.layers.Dropout):
    """`x / (1 - rate)` where a uniform number is at least `rate`, else 0; in training only.

    Keras' layer, with a draw that does not depend on the number of devices a batch is split over: there Keras drops
    the same features on each of TensorFlow's replicas.

    Args:
        rate: float in [0, 1).

    Input shape:  any.
    Output shape: the same.
    """

    def call(self, inputs, training=False):
        if not training or not self.rate:
            return inputs
        kept = draw(keras.random.uniform, ops.shape(inputs), 0.0, 1.0, seed=self.seed_generator) >= self.rate
        return ops.where(kept, inputs / (1 - self.rate), ops.zeros_like(inputs))

"""SGD with momentum, in one operation a variable on TensorFlow."""

import keras

from Module.replicas import replicas


class SGD(keras.optimizers.SGD):
    """`m = momentum * m - rate * g`, then `w = w + m`, or with Nesterov `w = w + momentum * m - rate * g`.

    Keras' optimizer, state and all. Where Keras composes an update of eleven operations, TensorFlow has one that does
    the same: for each of the 324 variables of Attention-56 ten fewer to trace, to optimize and to schedule.
    """

    def update_step(self, gradient, variable, learning_rate):
        if keras.backend.backend() != "tensorflow" or not self.momentum or replicas() > 1:
            super().update_step(gradient, variable, learning_rate)
            return
        import tensorflow as tf  # only here: the module must import where TensorFlow is not installed

        tf.raw_ops.ResourceApplyKerasMomentum(
            var=variable.handle,
            accum=self.momentums[self._get_variable_index(variable)].value.handle,
            lr=tf.cast(learning_rate, variable.dtype),
            grad=tf.cast(gradient, variable.dtype),
            momentum=self.momentum,
            use_nesterov=self.nesterov,
        )

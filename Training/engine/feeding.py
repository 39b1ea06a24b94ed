"""Feeds batches to Keras."""

import keras

from Module.replicas import replicas

PREFETCHED = 2  # batches that TensorFlow prepares in advance


def feed(batches):
    """Return batches in the form that `fit`, `evaluate` and `predict` take: on TensorFlow, a `tf.data.Dataset`.

    Keras also makes such a dataset, but with the autotuning of `tf.data`. In TensorFlow 2.21, its thread can miss that
    an iterator is deleted, and the end of an epoch then waits until the thread wakes up: 10, 30, 70, 150, ... ms after
    the start (10 ms * (2^k - 1)), and later once a minute. There is nothing to tune here, so autotuning is off.

    Args:
        batches: a `keras.utils.PyDataset` of at least one batch; batches may only differ in their number of images.
    """
    if keras.backend.backend() != "tensorflow" or replicas() > 1:
        return batches
    import tensorflow as tf  # not at the top: the module must be importable without TensorFlow

    def read():
        for index in range(len(batches)):
            yield batches[index]

    signature = tuple(tf.TensorSpec((None, *part.shape[1:]), part.dtype) for part in batches[0])
    options = tf.data.Options()
    options.autotune.enabled = False
    dataset = tf.data.Dataset.from_generator(read, output_signature=signature).prefetch(PREFETCHED)
    return dataset.apply(tf.data.experimental.assert_cardinality(len(batches))).with_options(options)

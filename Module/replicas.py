"""TensorFlow's replicas, among which a strategy splits each batch.

JAX has no replicas: a layer sees the whole batch, and the compiler splits it.
"""

import keras


def replicas():
    """Return the number of parts into which TensorFlow's strategy splits a batch: 1 without a strategy or on JAX."""
    if keras.backend.backend() != "tensorflow":
        return 1
    import tensorflow as tf

    return tf.distribute.get_strategy().num_replicas_in_sync


def draw(random, shape, *bounds, seed):
    """Draw random numbers for this replica's part of a batch: those that one device would draw for these images.

    Every replica draws for the whole batch, from the same state, and takes its part.

    Args:
        random: a function of `keras.random` that takes a shape, two numbers and a seed, such as `uniform`.
        shape: shape of the result; the first entry is the number of images in this replica.
        bounds: the two numbers: lowest and highest for `uniform`, mean and deviation for `normal`.
        seed: `keras.random.SeedGenerator`.

    Returns:
        A float32 tensor of `shape`.
    """
    part, count = 0, 1
    if replicas() > 1:
        import tensorflow as tf

        context = tf.distribute.get_replica_context()
        if context:  # there is none outside a step
            part, count = context.replica_id_in_sync_group, context.num_replicas_in_sync
    images = shape[0]
    drawn = random((images * count, *shape[1:]), *bounds, dtype="float32", seed=seed)
    return drawn[part * images : (part + 1) * images] if count > 1 else drawn

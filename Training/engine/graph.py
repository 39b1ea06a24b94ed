"""Training steps on TensorFlow, with as little around them as can be."""

import contextlib

from Module.replicas import replicas


def speed_up(model, function):
    """What `fit` calls for its steps, made ready in less time than Keras' own function, which it replaces.

    On a CPU in float32 TensorFlow's graph optimizer is left out: it takes as long as all of tracing and makes no step
    faster (docs/speed.md). In bfloat16 it fuses what pays, and on a GPU it chooses the layout: there it stays. Where a
    call is one step, that is one graph, `make_whole_step`, where Keras has one within another.

    Args:
        model: a compiled `TrainingModel`.
        function: Keras' own, which takes an iterator and gives a step's logs.

    Returns:
        A function of the same; `function` itself with XLA, several devices or `run_eagerly`.
    """
    if model.jit_compile or model.run_eagerly or replicas() > 1:
        return function
    import tensorflow as tf  # only here: the module must import where TensorFlow is not installed

    whole = make_whole_step(model) if model.batch_size and model.steps_per_execution == 1 else function
    on_cpu = not tf.config.list_physical_devices("GPU")
    around = skip_graph_optimizer if on_cpu and model.compute_dtype == "float32" else contextlib.nullcontext

    def call(iterator):
        with around():
            return (whole if isinstance(iterator, tf.data.Iterator) else function)(iterator)

    return call


def make_whole_step(model):
    """A step of batches of `model.batch_size`, which is part of the graph: that is smaller by a tenth so."""
    import tensorflow as tf

    @tf.function(autograph=False)
    def step(iterator):
        data = iterator.get_next()
        return model.train_step(tuple(tf.ensure_shape(part, (model.batch_size, *part.shape[1:])) for part in data))

    return step


@contextlib.contextmanager
def skip_graph_optimizer():
    """Functions that are called within run as they were traced."""
    import tensorflow as tf

    switch = "disable_meta_optimizer"
    kept = tf.config.optimizer.get_experimental_options().get(switch, False)
    tf.config.optimizer.set_experimental_options({switch: True})
    try:
        yield
    finally:
        tf.config.optimizer.set_experimental_options({switch: kept})

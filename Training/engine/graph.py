"""Training steps on TensorFlow with less overhead than those of Keras."""

import contextlib

import keras

from Module.replicas import replicas
from Training.devices import find_accelerator


def speed_up(model, function):
    """Return a replacement of the function that `fit` calls for its steps, with a faster first call.

    On a CPU in float32, it skips TensorFlow's graph optimizer, which takes as long as tracing and makes no step faster
    (docs/speed.md). In bfloat16 the optimizer fuses operations, and on a GPU it chooses the layout, so it is kept. If a
    call is one step, the step is a single graph, see `make_whole_step`; Keras nests two.

    Args:
        model: a compiled `TrainingModel`.
        function: Keras' function, which takes an iterator and returns the logs of a step.

    Returns:
        A function with the same argument and result; `function` itself with XLA, several devices or `run_eagerly`.
    """
    if model.jit_compile or model.run_eagerly or replicas() > 1:
        return function
    import tensorflow as tf  # not at the top: the module must be importable without TensorFlow

    whole = make_whole_step(model) if model.batch_size and model.steps_per_execution == 1 else function
    around = skip_graph_optimizer if is_faster_without_optimizer(model) else contextlib.nullcontext

    def call(iterator):
        with around():
            return (whole if isinstance(iterator, tf.data.Iterator) else function)(iterator)

    return call


def is_faster_without_optimizer(model):
    """Return whether a function of this model needs no graph optimizer, see `speed_up`."""
    on_tensorflow = keras.backend.backend() == "tensorflow"
    return on_tensorflow and find_accelerator() is None and model.compute_dtype == "float32"


def make_whole_step(model):
    """Make a step for batches of `model.batch_size`: the known size makes the graph a tenth smaller."""
    import tensorflow as tf

    @tf.function(autograph=False)
    def step(iterator):
        data = iterator.get_next()
        return model.train_step(tuple(tf.ensure_shape(part, (model.batch_size, *part.shape[1:])) for part in data))

    return step


@contextlib.contextmanager
def skip_graph_optimizer():
    """Run TensorFlow functions inside this context as they were traced, without the graph optimizer."""
    import tensorflow as tf

    switch = "disable_meta_optimizer"
    kept = tf.config.optimizer.get_experimental_options().get(switch, False)
    tf.config.optimizer.set_experimental_options({switch: True})
    try:
        yield
    finally:
        tf.config.optimizer.set_experimental_options({switch: kept})

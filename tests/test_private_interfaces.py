"""Interfaces of Keras, TensorFlow, JAX and TensorBoard that are private or not documented, and that the project uses.

If an upgrade breaks one of them, the test with its name fails and its docstring states which file uses it.
"""

import inspect
import json

import keras
import numpy as np
import pytest
from keras import ops

BACKEND = keras.backend.backend()
only_tensorflow = pytest.mark.skipif(BACKEND != "tensorflow", reason="an interface of TensorFlow")
only_jax = pytest.mark.skipif(BACKEND != "jax", reason="an interface of JAX")


def build_small_model():
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="inner")], name="outer")


@pytest.mark.backends
def test_flatten_layers():
    """`Layer._flatten_layers()` yields a layer and all layers inside it (Model/count.py)."""
    from Model.count import count

    inner = build_small_model()
    outer = keras.Sequential([keras.Input((4,)), inner], name="outermost")
    assert {"outermost", "outer", "inner"} <= {layer.name for layer in outer._flatten_layers()}
    assert len(list(inner.layers[0]._flatten_layers())) == 1
    assert count(outer)["kernels"] == 12


@pytest.mark.backends
def test_uninitialized_variables():
    """Variables that a stateless scope gives no values are in a global list (Training/runs/saved.py)."""
    from keras.src.backend.common import global_state

    from Training.runs.saved import _measure_description

    assert _measure_description(keras.saving.serialize_keras_object(build_small_model())) == (4 * (4 * 3 + 3), 4 * 3)
    assert global_state.get_global_attribute("uninitialized_variables") == []


@pytest.mark.backends
def test_get_variable_index():
    """`Optimizer._get_variable_index(variable)` is the position of its slot (Training/engine/optimizers.py)."""
    variables = [keras.Variable(np.zeros(n, "float32")) for n in (2, 3)]
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
    optimizer.build(variables)
    assert [optimizer._get_variable_index(each) for each in variables] == [0, 1]
    assert [tuple(each.shape) for each in optimizer.momentums] == [(2,), (3,)]


@pytest.mark.backends
def test_hooks_of_an_optimizer():
    """Keras calls `update_step` for each variable and `finalize_variable_values` (Training/engine/optimizers.py)."""
    called = []

    class Watched(keras.optimizers.SGD):
        def update_step(self, gradient, variable, learning_rate):
            called.append(variable.name.split(":")[0].split("/")[-1])
            super().update_step(gradient, variable, learning_rate)

        def finalize_variable_values(self, var_list):
            called.append(len(var_list))

    model = build_small_model()
    model.compile(Watched(0.1), "mse", run_eagerly=BACKEND == "tensorflow")
    model.fit(np.ones((2, 4)), np.ones((2, 3)), verbose=0)
    assert called == ["kernel", "bias", 2]


@only_tensorflow
def test_handle_of_a_variable():
    """`Variable.value.handle` is a resource handle (Training/engine/optimizers.py)."""
    import tensorflow as tf

    variable = keras.Variable(np.zeros(2, "float32"))
    assert variable.value.handle.dtype == tf.resource
    assert variable.handle.dtype == tf.resource


@only_tensorflow
def test_raw_op_of_momentum():
    """`tf.raw_ops.ResourceApplyKerasMomentum` is the update of SGD (Training/engine/optimizers.py)."""
    import tensorflow as tf

    weight, momentum = tf.Variable([1.0]), tf.Variable([0.5])
    given = dict(lr=0.1, grad=tf.constant([2.0]), momentum=0.9, use_nesterov=True)
    tf.raw_ops.ResourceApplyKerasMomentum(var=weight.handle, accum=momentum.handle, **given)
    new = 0.9 * 0.5 - 0.1 * 2
    np.testing.assert_allclose(momentum, [new], rtol=1e-6)
    np.testing.assert_allclose(weight, [1 + 0.9 * new - 0.1 * 2], rtol=1e-6)


@only_tensorflow
def test_raw_op_of_batch_normalization():
    """`tf.raw_ops.FusedBatchNormV3` moves the statistics, the variance unbiased (Module/normalization.py)."""
    import tensorflow as tf

    x = np.float32([[[[1.0]], [[3.0]]]])
    given = dict(scale=[1.0], offset=[0.0], mean=[4.0], variance=[8.0], epsilon=1e-5, exponential_avg_factor=0.5)
    outputs, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(x=x, **given)
    np.testing.assert_allclose(tf.reshape(outputs, -1), [-1, 1], rtol=1e-4)
    np.testing.assert_allclose([mean[0], variance[0]], [3.0, 5.0], rtol=1e-5)


@only_tensorflow
def test_disable_meta_optimizer():
    """The option is accepted and read back (Training/engine/graph.py)."""
    import tensorflow as tf

    switch = "disable_meta_optimizer"
    try:
        tf.config.optimizer.set_experimental_options({switch: True})
        assert tf.config.optimizer.get_experimental_options()[switch] is True
    finally:
        tf.config.optimizer.set_experimental_options({switch: False})


@only_tensorflow
def test_make_train_function():
    """`make_train_function` sets `train_function`, which `fit` calls with an iterator (Training/engine/graph.py)."""
    import tensorflow as tf

    class Watched(keras.Sequential):
        def make_train_function(self, force=False):
            super().make_train_function(force)
            assert self.train_function is not None
            own = self.train_function
            self.train_function = lambda iterator: seen.append(iterator) or own(iterator)

    seen = []
    model = Watched([keras.Input((4,)), keras.layers.Dense(3)])
    model.compile("sgd", "mse", jit_compile=False)
    model.fit(np.ones((2, 4)), np.ones((2, 3)), verbose=0)
    assert len(seen) == 1 and isinstance(seen[0], tf.data.Iterator)
    parameters = inspect.signature(keras.Model.make_train_function).parameters
    assert list(parameters) == ["self", "force"]


@only_jax
@pytest.mark.backends
def test_jax_state_sync():
    """Within an epoch on JAX, weights are up to date after `jax_state_sync` (Training/engine/checkpointing.py)."""
    model = build_small_model()
    model.compile(keras.optimizers.SGD(1.0), "mse")
    seen = [np.array(model.layers[0].bias)]

    def look(batch, logs=None):
        model.jax_state_sync()
        seen.append(np.array(model.layers[0].bias))

    watch = keras.callbacks.LambdaCallback(on_train_batch_end=look)
    model.fit(np.ones((2, 4)), np.ones((2, 3)), verbose=0, callbacks=[watch])
    assert not np.array_equal(*seen)


@pytest.mark.backends
@pytest.mark.parametrize(
    "kind, attributes",
    [("ReduceLROnPlateau", ("best", "wait", "cooldown_counter")), ("EarlyStopping", ("best", "wait"))],
)
def test_state_of_callbacks(kind, attributes):
    """These attributes are the whole state between epochs (Training/engine/callbacks.py)."""
    model = build_small_model()
    model.compile("sgd", "mse")
    callback = getattr(keras.callbacks, kind)(monitor="loss", patience=3)
    model.fit(np.ones((4, 4)), np.ones((4, 3)), verbose=0, callbacks=[callback])
    assert all(isinstance(getattr(callback, name), (int, float, np.number)) for name in attributes)


@pytest.mark.backends
def test_metrics_variables():
    """Sums and counts of the metrics within an epoch (Training/engine/checkpointing.py)."""
    model = build_small_model()
    model.compile("sgd", "mse", weighted_metrics=["mae"])
    model.fit(np.ones((2, 4)), np.ones((2, 3)), verbose=0)
    assert sum(tuple(variable.shape) == () for variable in model.metrics_variables) >= 4


@pytest.mark.backends
def test_limits_of_a_fit():
    """`keras.config` can limit the epochs of every `fit` and can lift the limit (Training/console.py)."""
    model = build_small_model()
    model.compile("sgd", "mse")
    try:
        keras.config.set_max_epochs(1)
        keras.config.set_max_steps_per_epoch(1)
        history = model.fit(np.ones((2, 4)), np.ones((2, 3)), epochs=2, verbose=0)
        assert len(history.epoch) == 1
    finally:
        keras.config.set_max_epochs(None)
        keras.config.set_max_steps_per_epoch(None)
    assert len(model.fit(np.ones((2, 4)), np.ones((2, 3)), epochs=2, verbose=0).epoch) == 2


@only_jax
@pytest.mark.backends
def test_multihost_utils():
    """Several processes on JAX agree through these functions (Training/devices.py)."""
    from jax.experimental import multihost_utils

    raw = np.frombuffer(b"text", np.uint8)
    assert np.asarray(multihost_utils.broadcast_one_to_all(raw)).tobytes() == b"text"
    assert list(inspect.signature(multihost_utils.reached_preemption_sync_point).parameters) == ["step_id"]


@pytest.mark.backends
def test_distribution():
    """`DataParallel` asks for layouts by path, and a distribution can be unset (Training/devices.py)."""
    if BACKEND == "jax":
        parallel = keras.distribution.DataParallel(devices=keras.distribution.list_devices(), auto_shard_dataset=False)
        assert parallel.num_model_replicas == len(keras.distribution.list_devices())
        assert callable(parallel.get_tensor_layout) and parallel.device_mesh is not None
    keras.distribution.set_distribution(None)
    assert keras.distribution.distribution() is None


@pytest.mark.backends
def test_tensorboard_writes_and_reads_events(tmp_path):
    """`tensorboard.compat`, its summaries and its writer are not documented (Training/runs/event_file.py)."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.compat.proto import event_pb2
    from tensorboard.compat.proto.graph_pb2 import GraphDef
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.graph.keras_util import keras_model_to_graph_def
    from tensorboard.plugins.histogram.summary_v2 import histogram_pb
    from tensorboard.plugins.hparams import plugin_data_pb2, summary_v2
    from tensorboard.plugins.scalar.summary_v2 import scalar_pb
    from tensorboard.plugins.text.summary_v2 import text_pb
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(str(tmp_path))
    made = (scalar_pb("scalar", 1.0), histogram_pb("histogram", np.arange(3.0)), text_pb("text", "words"))
    for summary in (*made, Summary(value=[Summary.Value(tag="image", simple_value=1.0)])):
        writer.add_event(event_pb2.Event(wall_time=1.0, step=2, summary=summary))
    writer.close()
    events = [event for path in tmp_path.iterdir() for event in EventFileLoader(str(path)).Load()]
    assert [v.tag for event in events for v in event.summary.value] == ["scalar", "histogram", "text", "image"]
    inputs = keras.Input((4,), name="start")
    model = keras.Model(inputs, keras.layers.Dense(3, name="end")(inputs))
    graph = keras_model_to_graph_def(json.loads(model.to_json()))
    assert isinstance(graph, GraphDef) and [node.name.split("/")[-1] for node in graph.node] == ["start", "end"]
    assert hasattr(plugin_data_pb2, "HParamsPluginData") and callable(summary_v2.hparams_pb)


@pytest.mark.backends
def test_registered_objects_and_their_names():
    """Layers are found by the `package>name` under which they are saved (Module/attention_block.py)."""
    from Module import ResidualUnit

    assert keras.saving.get_registered_name(ResidualUnit) == "ResidualAttention>ResidualUnit"
    assert keras.saving.get_registered_object("ResidualAttention>ResidualUnit") is ResidualUnit


@pytest.mark.backends
def test_seed_generators_are_state():
    """The state of a random layer is one of its variables (Training/engine/augmentation.py)."""
    from Training.engine.augmentation import RandomCrop

    layer = RandomCrop()
    before = [ops.convert_to_numpy(variable).copy() for variable in layer.variables]
    layer(np.zeros((2, 4, 4, 3), "uint8"), training=True)
    assert len(before) == 1 and not np.array_equal(before[0], ops.convert_to_numpy(layer.variables[0]))

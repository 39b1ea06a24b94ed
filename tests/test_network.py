"""Compares the networks with the published table, and checks saved networks."""

import copy
import pickle

import keras
import numpy as np
import pytest
from keras import ops

import training_cifar10
from Model import attention_56, attention_92, residual_attention_network
from Model.count import count
from Model.geometries import blocks_per_stage
from Module import AttentionBlock
from tests.support.backend import JIT
from tests.support.shapes import shapes_only
from tests.support.tiny import tiny_network
from Training.data import datasets
from Training.recipe import Recipe

# The compact network, row by row: kind of layer and output size. BN-ReLU before the pooling is part of the
# pre-activation form; the input layer has no row.
STEM = [("Conv2D", (32, 32, 32)), ("MaxPooling2D", (16, 16, 32))]
STAGE_1 = ("ResidualUnit", (16, 16, 128)), ("AttentionBlock", (16, 16, 128))
STAGE_2 = ("ResidualUnit", (8, 8, 256)), ("AttentionBlock", (8, 8, 256))
STAGE_3 = ("ResidualUnit", (4, 4, 512)), ("AttentionBlock", (4, 4, 512))
TAIL = [("ResidualUnit", (4, 4, 1024))] * 3 + [
    ("BatchNormalization", (4, 4, 1024)),
    ("ReLU", (4, 4, 1024)),
    ("AveragePooling2D", (1, 1, 1024)),
    ("Flatten", (1024,)),
    ("Dropout", (1024,)),
    ("Dense", (10,)),
    ("Softmax", (10,)),
]


def table(blocks):
    rows = list(STEM)
    for (unit, attention), times in zip((STAGE_1, STAGE_2, STAGE_3), blocks):
        rows += [unit] + [attention] * times
    return rows + TAIL


@pytest.mark.parametrize("build, blocks, depth", [(attention_56, (1, 1, 1), 56), (attention_92, (1, 2, 3), 92)])
def test_summary_reads_like_the_published_table(build, blocks, depth):
    with shapes_only():
        model = build()
    rows = [(type(layer).__name__, layer.output.shape[1:]) for layer in model.layers[1:]]
    assert rows == table(blocks)
    assert count(model)["trunk_depth"] == depth
    lines = []
    model.summary(print_fn=lines.append, line_length=120)
    text = "\n".join(lines)
    positions = [text.index(layer.name + " ") for layer in model.layers]
    assert positions == sorted(positions)


def arithmetic_parameters(blocks):
    """Return the kernel weights of the compact network, computed by hand from the table."""

    def unit(a, b):
        return a * (b // 4) + 9 * (b // 4) ** 2 + (b // 4) * b + (a * b if a != b else 0)

    total, channels = 5 * 5 * 3 * 32, 32
    for (filters, depth), times in zip(((128, 3), (256, 2), (512, 1)), blocks):
        units_in_mask = depth + 1 + 2 * (depth - 1)
        total += unit(channels, filters)
        total += times * ((4 + units_in_mask) * unit(filters, filters) + 2 * filters**2)
        channels = filters
    return total + unit(512, 1024) + 2 * unit(1024, 1024) + 1024 * 10


@pytest.mark.parametrize("build, blocks", [(attention_56, (1, 1, 1)), (attention_92, (1, 2, 3))])
def test_kernels_add_up_to_the_table(build, blocks):
    with shapes_only():
        model = build()
    kernels = sum(int(np.prod(w.shape)) for w in model.trainable_weights if w.name == "kernel")
    assert kernels == arithmetic_parameters(blocks)


def test_arguments_reach_the_layers():
    with shapes_only():
        model = residual_attention_network(
            depth=56, learning="nal", r=2, classes=7, input_shape=(48, 40, 1), dropout=0.3, classifier_l2=0.01
        )
        own = attention_56()
    assert model.input_shape == (None, 48, 40, 1)
    assert model.output_shape == (None, 7)
    for block in (layer for layer in model.layers if isinstance(layer, AttentionBlock)):
        assert (block.p, block.t, block.r, block.learning) == (1, 2, 2, "nal")
    assert model.get_layer("dropout").rate == 0.3
    assert model.get_layer("logits").kernel_regularizer.l2 == pytest.approx(0.01)
    assert own.name == "attention_56"


def test_depths():
    assert blocks_per_stage(56, 1, 2, rising=True) == (1, 1, 1)
    assert blocks_per_stage(92, 1, 2, rising=True) == (1, 2, 3)
    assert blocks_per_stage(92, 1, 2, rising=False) == (2, 2, 2)
    assert blocks_per_stage(128, 1, 2, rising=True) == (3, 3, 3)
    assert blocks_per_stage(452, 2, 4, rising=False) == (6, 6, 6)
    with pytest.raises(ValueError, match=r"depth must be 36 m \+ 20 .* received 57"):
        residual_attention_network(depth=57)
    with pytest.raises(ValueError, match="geometry must be one of compact"):
        residual_attention_network(geometry="huge")
    with pytest.raises(ValueError, match="mask_depth=3 needs a map of at least 8 pixels, received 4x4"):
        attention_56(input_shape=(8, 8, 3))


@pytest.mark.parametrize("value", [0, -1, 2.5, "10", True], ids=repr)
@pytest.mark.parametrize("name", ["depth", "classes", "p", "t", "r"])
def test_numbers_out_of_range_are_refused_and_not_replaced_by_the_default(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be a whole number of 1 or more, received {value!r}$"):
        residual_attention_network(**{name: value})


@pytest.mark.parametrize("shape", [32, (32, 32), (0, 32, 3), (None, None, 3), (32.0, 32, 3), ()], ids=str)
def test_image_shapes_without_height_width_and_channels_are_refused(shape):
    with pytest.raises(ValueError, match=r"^input_shape must be \(height, width, channels\), .* received "):
        tiny_network(input_shape=shape)


def test_whole_numbers_of_numpy_are_accepted():
    assert tiny_network(classes=np.array([4, 6]).max() + 1).output_shape == (None, 7)


@pytest.mark.parametrize(
    "copy_network",
    [
        keras.models.clone_model,
        copy.deepcopy,
        lambda network: keras.models.model_from_json(network.to_json()),
        lambda network: pickle.loads(pickle.dumps(network)),
    ],
    ids=["clone", "deepcopy", "json", "pickle"],
)
def test_every_way_of_copying_a_network_gives_the_same_network(copy_network):
    network = tiny_network()
    copied = copy_network(network)
    copied.set_weights(network.get_weights())
    assert [weight.path for weight in copied.weights] == [weight.path for weight in network.weights]
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3)).astype("float32")
    np.testing.assert_array_equal(copied(images), network(images))


@pytest.mark.backends
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "mixed_float16"])
def test_saved_network_is_identical_and_its_end_is_float32(policy, tmp_path):
    keras.config.set_dtype_policy(policy)
    model = tiny_network()
    x = np.random.default_rng(0).normal(size=(3, 32, 32, 3)).astype("float32")
    probabilities = ops.convert_to_numpy(model(x))
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(axis=-1), 1, rtol=1e-5)
    assert model.get_layer("logits").compute_dtype == model.get_layer("probabilities").compute_dtype == "float32"
    assert model.get_layer("stem_convolve").compute_dtype == policy.removeprefix("mixed_")
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(x), probabilities)


@pytest.mark.backends
def test_every_variable_of_a_network_learns():
    model = tiny_network()
    model.compile(keras.optimizers.SGD(1.0), "sparse_categorical_crossentropy", jit_compile=JIT)
    before = [ops.convert_to_numpy(v) for v in model.trainable_variables]
    x = np.random.default_rng(0).normal(size=(16, 32, 32, 3)).astype("float32")
    model.train_on_batch(x, np.arange(16) % 10)
    still = [
        v.path for v, old in zip(model.trainable_variables, before) if np.array_equal(ops.convert_to_numpy(v), old)
    ]
    assert not still


@pytest.mark.parametrize(
    "fields, arguments",
    [
        ({}, {"depth": 56}),
        ({"p": 2, "t": 2, "r": 2, "model": "attention_128"}, {"depth": 128, "p": 2, "t": 2, "r": 2}),
    ],
    ids=["default", "given"],
)
def test_the_script_builds_the_network_of_the_recipe(fields, arguments):
    data = datasets.load("digits", samples=50)
    with shapes_only():
        built = training_cifar10.build(Recipe(**fields), data)
        expected = residual_attention_network(**arguments)
    assert [weight.shape for weight in built.trainable_weights] == [w.shape for w in expected.trainable_weights]

"""All layers: shapes, config, saving, a compiled step, mixed precision, and the equations of the paper."""

import keras
import numpy as np
import pytest
from keras import ops

from Model import geometries
from Module import (
    AttentionBlock,
    BatchNormalization,
    BilinearUpsampling,
    Branches,
    InceptionUnit,
    ResidualUnit,
    ResNeXtUnit,
    attention_block,
)
from Module.pooling import MaxPooling2D
from Module.upsampling import interpolation_matrix
from tests.support.backend import JIT, compute

pytestmark = pytest.mark.backends

LAYERS = [
    (ResidualUnit, dict(filters=8), (8, 8, 8), (8, 8, 8)),
    (ResidualUnit, dict(filters=16, strides=2), (8, 8, 8), (4, 4, 16)),
    (ResidualUnit, dict(filters=16, strides=2), (7, 7, 8), (4, 4, 16)),
    (AttentionBlock, dict(filters=8, mask_depth=2), (8, 8, 8), (8, 8, 8)),
    (AttentionBlock, dict(filters=8, mask_depth=1, p=2, t=1, r=2, learning="nal"), (4, 6, 8), (4, 6, 8)),
    (AttentionBlock, dict(filters=8, mask_depth=2, attention="channel"), (8, 8, 8), (8, 8, 8)),
    (AttentionBlock, dict(filters=64, mask_depth=1, mask="local", unit=ResNeXtUnit), (4, 4, 64), (4, 4, 64)),
    (AttentionBlock, dict(filters=64, mask_depth=1, r=2, r_up=1, attention="spatial"), (4, 4, 64), (4, 4, 64)),
    (ResNeXtUnit, dict(filters=128, strides=2), (6, 6, 64), (3, 3, 128)),
    (InceptionUnit, dict(filters=128, strides=2), (6, 6, 64), (3, 3, 128)),
    (BilinearUpsampling, dict(height=6, width=5), (3, 2, 4), (6, 5, 4)),
    (BatchNormalization, dict(), (4, 4, 3), (4, 4, 3)),
]
NAMES = [f"{kind.__name__}-{i}" for i, (kind, *_) in enumerate(LAYERS)]


def make_model(layer, shape):
    inputs = keras.Input(shape)
    return keras.Model(inputs, layer(inputs))


def draw_images(shape, batch=4, seed=0):
    return np.random.default_rng(seed).normal(size=(batch, *shape)).astype("float32")


def randomize(layer, seed=0):
    """Give every weight a random value, also those that start at 0 or 1, so that no term of an equation vanishes."""
    generator = np.random.default_rng(seed)
    for weight in layer.weights:
        low, high = (0.5, 1.5) if weight.name in ("gamma", "moving_variance") else (-0.3, 0.3)
        weight.assign(generator.uniform(low, high, weight.shape))


@pytest.mark.parametrize("kind, config, shape, out", LAYERS, ids=NAMES)
def test_layer_shapes_and_config_round_trip(kind, config, shape, out):
    model = make_model(kind(**config), shape)
    assert model.output_shape == (None, *out)
    assert compute(model, draw_images(shape)).shape == (4, *out)
    layer = model.layers[-1]
    copy = kind.from_config(layer.get_config())
    assert copy.get_config() == layer.get_config()
    assert set(config) <= set(layer.get_config())


@pytest.mark.parametrize("kind, config, shape, out", LAYERS, ids=NAMES)
def test_layer_is_saved_and_loaded_with_identical_outputs(kind, config, shape, out, tmp_path):
    model = make_model(kind(**config), shape)
    randomize(model)
    model.save(tmp_path / "layer.keras")
    loaded = keras.models.load_model(tmp_path / "layer.keras")
    np.testing.assert_array_equal(*(compute(each, draw_images(shape)) for each in (loaded, model)))


@pytest.mark.parametrize("jit", [True] if JIT else [False, True])  # JAX always compiles
@pytest.mark.parametrize("kind, config, shape, out", LAYERS, ids=NAMES)
def test_layer_trains_one_compiled_step(kind, config, shape, out, jit):
    model = make_model(kind(**config), shape)
    model.compile("sgd", "mse", jit_compile=jit)
    loss = model.train_on_batch(draw_images(shape), draw_images(out, seed=1))
    assert np.isfinite(loss)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize("kind, config, shape, out", LAYERS, ids=NAMES)
def test_layer_in_mixed_precision_agrees_with_float32(kind, config, shape, out, policy):
    exact, mixed = make_model(kind(**config), shape), make_model(kind(**config, dtype=policy), shape)
    randomize(exact)
    mixed.set_weights(exact.get_weights())
    layer = mixed.layers[-1]
    for part in layer._flatten_layers():
        assert part.compute_dtype == policy.removeprefix("mixed_"), part.name
    assert all(weight.dtype == "float32" for weight in layer.weights)
    expected = compute(exact, draw_images(shape))
    difference = compute(mixed, draw_images(shape)).astype("float32") - expected
    limit = 0.05 if policy == "mixed_bfloat16" else 0.01
    assert np.linalg.norm(difference) < limit * np.linalg.norm(expected)


def test_every_variable_gets_a_gradient():
    for learning in ("arl", "nal"):
        model = make_model(AttentionBlock(8, mask_depth=2, learning=learning), (8, 8, 8))
        randomize(model)
        model.compile(keras.optimizers.SGD(1.0), "mse", jit_compile=JIT)
        before = [ops.convert_to_numpy(v) for v in model.trainable_variables]
        model.train_on_batch(draw_images((8, 8, 8), 8), draw_images((8, 8, 8), 8, seed=1))
        still = [
            v.path for v, old in zip(model.trainable_variables, before) if np.array_equal(ops.convert_to_numpy(v), old)
        ]
        assert not still


def test_residual_unit_is_its_formula():
    unit = ResidualUnit(8)
    x = ops.convert_to_tensor(draw_images((6, 6, 8)))
    unit(x)
    randomize(unit)
    norm_1, relu = unit.activate
    reduce, norm_2, _, convolve, norm_3, _, expand = unit.branch
    a = relu(norm_1(x))
    expected = x + expand(relu(norm_3(convolve(relu(norm_2(reduce(a)))))))
    np.testing.assert_allclose(unit(x), expected, rtol=1e-5, atol=1e-6)


def test_projection_takes_the_activated_tensor_and_only_if_the_shape_changes():
    unit = ResidualUnit(16, strides=2)
    x = ops.convert_to_tensor(draw_images((6, 6, 8)))
    unit(x)
    randomize(unit)
    unit.branch[-1].kernel.assign(np.zeros(unit.branch[-1].kernel.shape))  # only the shortcut is left
    activated = unit.activate[1](unit.activate[0](x))
    expected = ops.conv(activated, unit.projection[0].kernel, strides=2, padding="valid")
    np.testing.assert_allclose(unit(x), expected, rtol=1e-5, atol=1e-6)
    same = ResidualUnit(8)
    same.build((None, 6, 6, 8))
    assert same.projection == []


def test_strided_convolution_pads_both_sides():
    unit = ResidualUnit(4, strides=2)
    unit.build((None, 4, 4, 4))
    *_, pad, convolve, _, _, _ = unit.branch
    convolve.kernel.assign(np.ones(convolve.kernel.shape))
    counted = ops.convert_to_numpy(convolve(pad(np.ones((1, 4, 4, 1), "float32"))))[0, :, :, 0]
    # The kernel covers four pixels at the padded corner, and nine further inside.
    np.testing.assert_array_equal(counted, [[4, 6], [6, 9]])


@pytest.mark.parametrize("learning", ["arl", "nal"])
def test_block_is_its_equation(learning):
    block = AttentionBlock(8, mask_depth=2, learning=learning)
    x = ops.convert_to_tensor(draw_images((8, 8, 8)))
    block(x)
    randomize(block)
    output, mask = block(x, return_mask=True)
    mask = ops.convert_to_numpy(mask)
    assert 0 < mask.min() < mask.max() < 1
    u = block.before[0](x)
    trunk = ops.convert_to_numpy(block.trunk[1](block.trunk[0](u)))
    gain = 1 + mask if learning == "arl" else mask
    expected = block.after[0](ops.convert_to_tensor(gain * trunk))
    np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(output, block(x))


def test_mask_is_the_encoder_decoder_of_the_paper():
    block = AttentionBlock(8, mask_depth=2, r=1)
    x = ops.convert_to_tensor(draw_images((8, 8, 8)))
    block(x)
    randomize(block)
    u = block.before[0](x)
    pool, up = ops.max_pool, BilinearUpsampling
    d1 = block.down_sample[0][0](pool(u, 3, 2, "same"))  # (B, 4, 4, 8)
    bottom = pool(d1, 3, 2, "same")  # (B, 2, 2, 8)
    for unit in block.down_sample[1]:
        bottom = unit(bottom)
    assert len(block.down_sample[1]) == 2
    z = up(4, 4)(bottom) + block.skip[0](d1)
    z = up(8, 8)(block.up_sample[0][0](z))
    norm_1, relu, first, norm_2, _, second = block.weigh
    expected = ops.sigmoid(second(relu(norm_2(first(relu(norm_1(z)))))))
    np.testing.assert_allclose(block(x, return_mask=True)[1], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("height, width", [(6, 6), (7, 7), (6, 7), (7, 6), (3, 2), (2, 3)])
def test_mask_pools_in_ceil_mode(height, width):
    block = AttentionBlock(4, mask_depth=1)
    block.build((None, height, width, 4))
    x = draw_images((height, width, 4)) - 5  # all negative, so that padding with zeros would change the maximum
    pooled = ops.convert_to_tensor(x)
    for pool in block.pools[0]:
        pooled = pool(pooled)
    rows, columns = (range(0, side - 1, 2) for side in (height, width))  # Caffe drops a window that starts outside
    expected = np.array([[x[:, i : i + 3, j : j + 3].max(axis=(1, 2)) for j in columns] for i in rows])
    np.testing.assert_array_equal(pooled, expected.transpose(2, 0, 1, 3))


def test_zero_last_convolution_makes_the_mask_one_half():
    for learning, gain in (("arl", 1.5), ("nal", 0.5)):
        block = AttentionBlock(8, mask_depth=1, learning=learning)
        x = ops.convert_to_tensor(draw_images((4, 4, 8)))
        block(x)
        randomize(block)
        block.weigh[-1].kernel.assign(np.zeros(block.weigh[-1].kernel.shape))
        output, mask = block(x, return_mask=True)
        np.testing.assert_array_equal(mask, np.full((4, 4, 4, 8), 0.5, "float32"))
        trunk = block.trunk[1](block.trunk[0](block.before[0](x)))
        np.testing.assert_allclose(output, block.after[0](gain * trunk), rtol=1e-5, atol=1e-5)


def test_resnext_unit_is_its_formula():
    unit = ResNeXtUnit(128, strides=2)
    x = ops.convert_to_tensor(draw_images((6, 6, 64)))
    unit(x)
    randomize(unit)
    reduce, norm_1, relu, pad, convolve, norm_2, _, expand, norm_3 = unit.branch
    project, norm_project = unit.projection
    assert convolve.groups == 32 and convolve.kernel.shape == (3, 3, 2, 64)
    branch = norm_3(expand(relu(norm_2(convolve(pad(relu(norm_1(reduce(x)))))))))
    np.testing.assert_allclose(unit(x), ops.relu(norm_project(project(x)) + branch), rtol=1e-5, atol=1e-5)


def test_attention_types_are_their_equations():
    x = draw_images((5, 4, 6))
    mixed, channel, spatial = (
        ops.convert_to_numpy(attention_block.attend(ops.convert_to_tensor(x), kind)) for kind in geometries.ATTENTION
    )
    np.testing.assert_allclose(mixed, 1 / (1 + np.exp(-x)), rtol=1e-5)
    np.testing.assert_allclose(channel, x / np.sqrt((x**2).sum(axis=-1, keepdims=True)), rtol=1e-5)
    mean, std = x.mean(axis=(1, 2), keepdims=True), x.std(axis=(1, 2), keepdims=True)
    np.testing.assert_allclose(spatial, 1 / (1 + np.exp(-(x - mean) / std)), rtol=1e-4)


def test_tables_and_block_know_the_same_choices():
    for name in ("LEARNING", "ATTENTION", "MASKS"):
        assert getattr(geometries, name) == getattr(attention_block, name)


def test_branches_are_the_block_s_trunk_and_mask():
    inputs = keras.Input((8, 8, 8))
    block = AttentionBlock(8, mask_depth=1)
    block(inputs)
    randomize(block)
    model = keras.Model(inputs, Branches(block)(inputs))
    x = draw_images((8, 8, 8))
    given = model.predict(x, verbose=0)
    outputs, mask = block(ops.convert_to_tensor(x), return_mask=True)
    np.testing.assert_allclose(given["mask"], mask, rtol=1e-5, atol=1e-6)
    after = (1 + given["mask"]) * given["trunk"]
    for unit in block.after:
        after = unit(after)
    np.testing.assert_allclose(after, outputs, rtol=1e-4, atol=1e-5)


def test_upsampling_has_aligned_corners():
    line = np.array([0.0, 3.0], "float32")
    np.testing.assert_allclose(interpolation_matrix(2, 4) @ line, [0, 1, 2, 3], atol=1e-6)
    np.testing.assert_allclose(interpolation_matrix(1, 3), [[1], [1], [1]])
    np.testing.assert_allclose(interpolation_matrix(5, 5), np.eye(5), atol=1e-6)
    x = draw_images((3, 4, 2), batch=2)
    y = ops.convert_to_numpy(BilinearUpsampling(7, 9)(x))
    for corner in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        np.testing.assert_allclose(y[:, *corner], x[:, *corner], rtol=1e-5)
    rows, columns = np.linspace(0, 2, 7), np.linspace(0, 3, 9)
    for b, c in np.ndindex(2, 2):
        across = np.stack([np.interp(columns, range(4), x[b, i, :, c]) for i in range(3)])
        both = np.stack([np.interp(rows, range(3), across[:, j]) for j in range(9)], axis=1)
        np.testing.assert_allclose(y[b, ..., c], both, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(8, 8, 2), (7, 9, 2), (2, 3, 2)], ids=str)
@pytest.mark.parametrize(
    "pool, strides, padding", [(2, 2, "valid"), (3, 2, "same"), (3, 1, "same"), ((1, 2), 1, "valid")]
)
def test_pooling_and_its_gradient_equal_those_of_keras(shape, pool, strides, padding):
    x = draw_images(shape, batch=2)
    weights = draw_images(MaxPooling2D(pool, strides, padding).compute_output_shape((2, *shape))[1:], batch=2, seed=1)
    came = []
    for kind in (MaxPooling2D, keras.layers.MaxPooling2D):
        scale = keras.layers.Dense(2, use_bias=False, kernel_initializer="identity")
        model = keras.Sequential([keras.Input(shape), scale, kind(pool, strides, padding)])
        model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=JIT)
        model.train_on_batch(x, weights)
        came.append((kind(pool, strides, padding)(x), scale.kernel))
    for ours, theirs in zip(*came, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
def test_normalization_trains_like_keras_layer(known):
    """This also holds if the batch size is unknown while the step is traced, as in `fit`."""
    ours = make_model(BatchNormalization(), (4, 4, 3))
    theirs = make_model(keras.layers.BatchNormalization(momentum=0.9, epsilon=1e-5), (4, 4, 3))
    for model in (ours, theirs):
        randomize(model)
        model.compile(keras.optimizers.SGD(0.5), "mse", jit_compile=JIT)
    for step in range(3):
        x, y = 3 * draw_images((4, 4, 3), 8, seed=step) + 1, draw_images((4, 4, 3), 8, seed=10 + step)
        if known:
            losses = [model.train_on_batch(x, y) for model in (ours, theirs)]
        else:
            losses = [model.fit(x, y, verbose=0).history["loss"] for model in (ours, theirs)]
        np.testing.assert_allclose(*losses, rtol=1e-5)
    for a, b in zip(ours.weights, theirs.weights):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5, err_msg=a.path)


@pytest.mark.parametrize("groups, strides", [(1, 1), (2, 2), (4, 1), (8, 1)])
def test_convolution_with_groups_and_its_gradients_equal_those_of_keras(groups, strides):
    from Module.convolution import Conv2D

    known = keras.layers.Conv2D(8, 3, strides, padding="same", groups=groups)
    ours = Conv2D(8, 3, strides, padding="same", groups=groups)
    models = [make_model(layer, (6, 5, 16)) for layer in (known, ours)]
    randomize(models[0])
    models[1].set_weights(models[0].get_weights())
    x, y = draw_images((6, 5, 16)), draw_images(known.output.shape[1:], seed=1)
    np.testing.assert_allclose(*(model.predict(x, verbose=0) for model in models), rtol=1e-5, atol=1e-5)
    for model in models:
        model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=JIT)
        model.train_on_batch(x, y)
    for a, b in zip(*(model.get_weights() for model in models), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernel, strides, size, padding", [
    (1, 1, (6, 5), "valid"), (1, 2, (6, 5), "valid"), (3, 1, (6, 5), "valid"), (3, 1, (6, 5), "same"),
    ((5, 3), 1, (2, 1), "same"), (2, 1, (6, 5), "same"), (3, 2, (6, 5), "same"), (3, 1, (8, 9), "same"),
])  # fmt: skip
def test_convolution_in_bfloat16_and_its_gradients_equal_those_of_keras(kernel, strides, size, padding):
    """They are equal up to the rounding of bfloat16: sums may be computed in another order."""
    from Module import convolution
    from Module.convolution import Conv2D

    x = keras.random.normal((4, *size, 16), seed=0)
    known = keras.layers.Conv2D(24, kernel, strides, padding, dtype="mixed_bfloat16", use_bias=False)
    ours = Conv2D(24, kernel, strides, padding, dtype="mixed_bfloat16", use_bias=False)
    results = []
    for layer in (known, ours):
        layer.build(x.shape)
        layer.set_weights(known.get_weights())
        if keras.backend.backend() == "tensorflow":
            import tensorflow as tf

            with tf.GradientTape() as tape:
                tape.watch(x)
                y = layer(x)
                loss = tf.reduce_mean(tf.square(tf.cast(y, "float32")))
            results.append([y, *tape.gradient(loss, [x, layer.kernel.value])])
        else:
            results.append([layer(x)])
    if keras.backend.backend() == "tensorflow" and strides == 1:
        small = padding == "same" and np.prod(size) <= 64 and kernel != 2
        expected = convolution._pointwise() if kernel == 1 else convolution._small_map() if small else None
        assert ours._choose_gradient(x) is expected
    for expected, given in zip(*results):
        expected, given = (np.asarray(keras.ops.cast(each, "float32")) for each in (expected, given))
        np.testing.assert_allclose(given, expected, rtol=0.02, atol=0.01 * np.abs(expected).max())


def test_normalization_of_values_far_from_zero():
    """Sums of squares must not cancel once the moving mean is close to the mean."""
    layer = BatchNormalization()
    x = 1_000 + draw_images((16, 16, 2), batch=8)
    layer.build(x.shape)
    layer.moving_mean.assign([1_000.0, 999.0])
    outputs = ops.convert_to_numpy(layer(x, training=True))
    exact = x.astype("float64")
    expected = (exact - exact.mean((0, 1, 2))) / np.sqrt(exact.var((0, 1, 2)) + 1e-5)
    np.testing.assert_allclose(outputs, expected, atol=5e-3)


def test_normalization_takes_a_single_value():
    """Its variance is 0 by either estimate."""
    layer = BatchNormalization()
    outputs = layer(np.full((1, 1, 1, 2), 5.0, "float32"), training=True)
    np.testing.assert_array_equal(outputs, np.zeros((1, 1, 1, 2)))
    np.testing.assert_allclose(layer.moving_mean, [0.5, 0.5], rtol=1e-6)
    np.testing.assert_allclose(layer.moving_variance, [0.9, 0.9], rtol=1e-6)


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: ResidualUnit(6), "multiple of 4, received 6"),
        (lambda: ResidualUnit(8, strides=3), "strides must be 1 or 2, received 3"),
        (lambda: AttentionBlock(8, mask_depth=0), "mask_depth must be a whole number of 1 or more, received 0"),
        (lambda: AttentionBlock(8, mask_depth=1, t=0), "t must be a whole number of 1 or more, received 0"),
        (lambda: AttentionBlock(8, mask_depth=1, learning="both"), "one of arl, nal, received 'both'"),
        (lambda: AttentionBlock(8, mask_depth=1, attention="all"), "one of mixed, channel, spatial, received 'all'"),
        (lambda: AttentionBlock(8, mask_depth=1, mask="none"), "one of encoder_decoder, local, received 'none'"),
        (lambda: ResNeXtUnit(96), "multiple of 64, received 96"),
        (lambda: ResNeXtUnit(256, width=6), "width must be a positive multiple of 4, received 6"),
        (
            lambda: AttentionBlock(8, mask_depth=4).build((None, 8, 8, 8)),
            "mask_depth=4 needs a map of at least 16 pixels, received 8x8",
        ),
        (
            lambda: AttentionBlock(8, mask_depth=1).build((None, 8, 8, 4)),
            "filters=8 needs an input with as many channels",
        ),
        (lambda: AttentionBlock(8, mask_depth=1).build((None, None, 8, 8)), "height and width must be known"),
    ],
)
def test_impossible_arguments_are_named(make, said):
    with pytest.raises(ValueError, match=said):
        make()

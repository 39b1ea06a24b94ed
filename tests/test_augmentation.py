"""Augmentation: what each change does to pixels, and that it is compiled, repeatable and off outside training."""

import keras
import numpy as np
import pytest
from keras import ops

from Training.augmentation import RandomAffine, RandomCrop, augmentation

pytestmark = pytest.mark.backends

BOTH = [RandomAffine(seed=3), RandomCrop(seed=3)]


def images(count=16, size=8):
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3)).astype("uint8")


def augmented(layer, x):
    return ops.convert_to_numpy(layer(ops.convert_to_tensor(x), training=True))


@pytest.mark.parametrize("layer", [RandomAffine(0.0, 0.0, False), RandomCrop(0, False)])
def test_nothing_to_do_changes_nothing(layer):
    np.testing.assert_array_equal(augmented(layer, images()), images())


@pytest.mark.parametrize("make", [lambda: RandomAffine(0.0, 0.0, True), lambda: RandomCrop(0, True)])
def test_flip_mirrors_about_half(make):
    x, y = images(400), augmented(make(), images(400))
    mirrored = [np.array_equal(b, a[:, ::-1]) for a, b in zip(x, y)]
    assert all(m or np.array_equal(b, a) for m, a, b in zip(mirrored, x, y))
    assert 150 < sum(mirrored) < 250


def test_crop_is_a_window_of_the_padded_image():
    x = images(200)
    y = augmented(RandomCrop(4, False), x)
    padded = np.pad(x, ((0, 0), (4, 4), (4, 4), (0, 0)))
    seen = set()
    for a, b in zip(padded, y):
        at = [(i, j) for i in range(9) for j in range(9) if np.array_equal(a[i : i + 8, j : j + 8], b)]
        assert at
        seen.update(at)
    assert {i for i, _ in seen} == {j for _, j in seen} == set(range(9))


def test_affine_is_keras_own_affine_transform():
    """The same matrix through `keras.ops.image.affine_transform`, which XLA cannot compile on TensorFlow."""
    x = images(6).astype("float32")
    layer, size = RandomAffine(30.0, 0.2, True, seed=5), 8
    y = augmented(layer, x)
    drawing = RandomAffine(30.0, 0.2, True, seed=5)
    angle = ops.convert_to_numpy(drawing.uniform(x, -1.0, 1.0)) * np.pi / 6
    down, right = (ops.convert_to_numpy(drawing.uniform(x, -1.0, 1.0)) * 0.2 * size for _ in range(2))
    mirror = np.where(ops.convert_to_numpy(drawing.uniform(x, 0.0, 1.0)) < 0.5, -1, 1)
    cos, sin, c = np.cos(angle), np.sin(angle), (size - 1) / 2
    rows = [mirror * cos, -mirror * sin, c + right - mirror * (cos - sin) * c]
    rows += [sin, cos, c + down - (sin + cos) * c, 0 * sin, 0 * sin]
    expected = ops.image.affine_transform(x, np.stack(rows, axis=1).astype("float32"), "bilinear", "nearest")
    np.testing.assert_allclose(y, expected, atol=0.02)
    assert np.abs(y - x).mean() > 5


@pytest.mark.parametrize("layer", BOTH)
def test_is_off_outside_training_and_round_trips(layer):
    x = images()
    np.testing.assert_array_equal(layer(x), x)
    np.testing.assert_array_equal(layer(x, training=False), x)
    copy = type(layer).from_config(layer.get_config())
    assert copy.get_config() == layer.get_config()
    fresh = type(layer).from_config(layer.get_config())
    np.testing.assert_array_equal(augmented(copy, x), augmented(fresh, x))
    assert not np.array_equal(augmented(copy, x), augmented(type(layer)(seed=4), x))


@pytest.mark.parametrize("layer", BOTH)
@pytest.mark.parametrize("jit", [False, True], ids=["graph", "jit"])
def test_compiles_in_the_training_step(layer, jit):
    layer = type(layer).from_config(layer.get_config())
    inputs = keras.Input((8, 8, 3))
    outputs = keras.layers.Dense(2)(keras.layers.GlobalAveragePooling2D()(layer(inputs)))
    model = keras.Model(inputs, outputs)
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile=jit)
    losses = [float(model.train_on_batch(images() / 255, np.arange(16) % 2)) for _ in range(2)]
    assert np.isfinite(losses).all()


def test_recipe_s_choices():
    given = dict(rotation=1.0, shift=0.1, flip=True, seed=0)
    assert isinstance(augmentation("affine", **given), RandomAffine)
    assert isinstance(augmentation("crop", **given), RandomCrop)
    assert augmentation("none", **given) is None

"""Augmentation: effects on pixels, compilation, reproducibility, and no effect outside training."""

import keras
import numpy as np
import pytest
from keras import ops

from Training.engine.augmentation import (
    COLOUR_COMPONENTS,
    COLOUR_EIGENVALUES,
    Cutout,
    Mix,
    RandomAffine,
    RandomCrop,
    RandomLighting,
    make_augmentations,
)
from Training.recipe import Recipe

pytestmark = pytest.mark.backends

EACH = [RandomAffine(seed=3), RandomCrop(seed=3), RandomLighting(seed=3)]


def draw_images(count=16, size=8):
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3)).astype("uint8")


def augment(layer, x):
    return ops.convert_to_numpy(layer(ops.convert_to_tensor(x), training=True))


@pytest.mark.parametrize("layer", [RandomAffine(0.0, 0.0, False), RandomCrop(0, False)])
def test_no_augmentation_changes_nothing(layer):
    np.testing.assert_array_equal(augment(layer, draw_images()), draw_images())


@pytest.mark.parametrize("make", [lambda: RandomAffine(0.0, 0.0, True), lambda: RandomCrop(0, True)])
def test_flip_mirrors_about_half(make):
    x, y = draw_images(400), augment(make(), draw_images(400))
    mirrored = [np.array_equal(b, a[:, ::-1]) for a, b in zip(x, y)]
    assert all(m or np.array_equal(b, a) for m, a, b in zip(mirrored, x, y))
    assert 150 < sum(mirrored) < 250


def test_crop_is_a_window_of_the_padded_image():
    x = draw_images(200)
    y = augment(RandomCrop(4, False), x)
    padded = np.pad(x, ((0, 0), (4, 4), (4, 4), (0, 0)))
    seen = set()
    for a, b in zip(padded, y):
        at = [(i, j) for i in range(9) for j in range(9) if np.array_equal(a[i : i + 8, j : j + 8], b)]
        assert at
        seen.update(at)
    assert {i for i, _ in seen} == {j for _, j in seen} == set(range(9))


def test_affine_equals_keras_affine_transform():
    """Compare with `keras.ops.image.affine_transform`, which XLA cannot compile on TensorFlow."""
    x = draw_images(6).astype("float32")
    layer, size = RandomAffine(30.0, 0.2, True, seed=5), 8
    y = augment(layer, x)
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


@pytest.mark.parametrize("layer", EACH)
def test_is_off_outside_training_and_round_trips(layer):
    x = draw_images()
    np.testing.assert_array_equal(layer(x), x)
    np.testing.assert_array_equal(layer(x, training=False), x)
    copy = type(layer).from_config(layer.get_config())
    assert copy.get_config() == layer.get_config()
    fresh = type(layer).from_config(layer.get_config())
    np.testing.assert_array_equal(augment(copy, x), augment(fresh, x))
    assert not np.array_equal(augment(copy, x), augment(type(layer)(seed=4), x))


@pytest.mark.parametrize("layer", [*EACH, Cutout(2), Mix("mixup"), Mix("cutmix")])
@pytest.mark.parametrize("jit", [False, True], ids=["graph", "jit"])
def test_compiles_in_the_training_step(layer, jit):
    layer = type(layer).from_config(layer.get_config())
    inputs = keras.Input((8, 8, 3))
    changed = layer(inputs)
    changed = changed[0] if isinstance(layer, Mix) else changed
    outputs = keras.layers.Dense(2)(keras.layers.GlobalAveragePooling2D()(changed))
    model = keras.Model(inputs, outputs)
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile=jit)
    losses = [float(model.train_on_batch(draw_images() / 255, np.arange(16) % 2)) for _ in range(2)]
    assert np.isfinite(losses).all()


def test_layers_of_a_recipe():
    def list_kinds(name, **changes):
        return [type(layer) for layer in make_augmentations(name, Recipe(**changes), True, 0.0)]

    assert list_kinds("affine") == [RandomAffine]
    assert list_kinds("crop", cutout=2) == [RandomCrop, Cutout]
    assert list_kinds("imagenet") == [RandomLighting]
    assert list_kinds("none", mix="cutmix") == [Mix]
    assert list_kinds("none") == []


def test_lighting_shifts_images_along_the_principal_colours_of_imagenet():
    x = draw_images(3000, 2).astype("float32")
    moved = augment(RandomLighting(False, seed=1), x) - x
    shift = moved[:, 0, 0]
    np.testing.assert_allclose(moved, np.broadcast_to(shift[:, None, None], moved.shape), atol=1e-3)
    scaled = COLOUR_COMPONENTS * (25.5 * COLOUR_EIGENVALUES)  # a tenth of 255 times P l
    np.testing.assert_allclose(np.cov(shift.T), scaled @ scaled.T, rtol=0.1)
    np.testing.assert_allclose(COLOUR_COMPONENTS.T @ COLOUR_COMPONENTS, np.eye(3), atol=2e-4)
    flipped = augment(RandomLighting(True, seed=1), x)
    mirrored = [np.ptp(b - a[:, ::-1], axis=(0, 1)).max() < 1e-3 for a, b in zip(x, flipped)]
    assert 1300 < sum(mirrored) < 1700


def test_cutout_blanks_one_square():
    x = draw_images(300) | 1  # no pixel is 0
    blank = (augment(Cutout(4), x) == 0).all(axis=-1)
    assert (augment(Cutout(4), x)[~blank] != 0).all()
    inside = 0
    for each in blank:
        rows, columns = each.any(axis=1), each.any(axis=0)
        assert each.sum() == rows.sum() * columns.sum()  # one rectangle
        assert 2 <= rows.sum() <= 4 and 2 <= columns.sum() <= 4  # a square, possibly cut off by the border
        inside += each.sum() == 16
    assert 0.25 < inside / 300 < 0.55  # expected 39 %: it is whole for 5 of 8 centres in each direction


def test_mixup_is_equation_1():
    x = draw_images(8).astype("float32")
    mixed, share = map(ops.convert_to_numpy, Mix("mixup")(x, training=True))
    own = share[:, None, None, None]
    np.testing.assert_allclose(mixed, own * x + (1 - own) * np.roll(x, 1, axis=0), rtol=1e-5)
    assert len(set(share)) == 8 and share.min() >= 0 and share.max() < 1


def test_cutmix_shares_are_the_areas():
    x = np.zeros((200, 16, 16, 3), "float32")
    x[::2] = 1  # neighbours differ everywhere
    mixed, share = map(ops.convert_to_numpy, Mix("cutmix")(x, training=True))
    np.testing.assert_allclose((mixed == x).all(axis=-1).mean(axis=(1, 2)), share, atol=1e-6)
    assert 0.4 < share.mean() < 0.8  # one half, or more if the border cuts off the window


@pytest.mark.parametrize("layer", [Cutout(4, 3.0), Mix("mixup")])
def test_cutout_and_mix_do_nothing_outside_training(layer):
    y = layer(draw_images())
    y, share = y if isinstance(y, tuple) else (y, ops.ones(16))
    np.testing.assert_array_equal(ops.convert_to_numpy(y), draw_images())
    np.testing.assert_array_equal(ops.convert_to_numpy(share), np.ones(16))

"""Statistics of the normalizations, recomputed before a network is evaluated."""

import dataclasses
import json
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from keras import ops

from Model.preprocessing import mean_subtraction
from tests.support import plain
from tests.support.tiny import tiny_network
from Training.data import datasets
from Training.data.datasets import Examples
from Training.engine.augmentation import Augmentation, Mix
from Training.engine.averaging import average_weights, recompute_statistics
from Training.engine.callbacks import EvaluatedNetwork
from Training.engine.evaluation import score
from Training.engine.fit import fit
from Training.engine.statistics import (
    Statistics,
    choose_examples,
    copy_values,
    find_normalizations,
    make_statistics,
    restore_values,
)
from Training.engine.training_model import make_logits_model
from Training.errors import InputError
from Training.recipe import Recipe
from Training.runs.checkpoint import list_checkpoints, unpack
from Training.runs.history import read_history

pytestmark = pytest.mark.backends
RECIPE = Recipe(
    dataset="digits", samples=64, epochs=2, batch_size=16, warmup_epochs=1.0, masks_every=0, learning_rate=0.02,
    statistics_share=0.5, dropout=0.3, ema=0.5,
)  # fmt: skip


@pytest.fixture(scope="module")
def digits():
    return datasets.load("digits", samples=64)


def build(digits, recipe=RECIPE):
    keras.utils.set_random_seed(1)
    return plain.build(recipe, digits)


class Darken(Augmentation):
    """Halves the images at random: their statistics differ from those of images without augmentation."""

    def augment(self, images):
        return images * ops.reshape(ops.where(self.uniform(images, 0.0, 1.0) < 0.9, 0.5, 1.0), (-1, 1, 1, 1))


@pytest.mark.parametrize(
    "mean, std, said",
    [
        (np.full((32, 32, 3), 101.0), 255, None),  # of other images of the same data set
        (np.full((32, 32, 3), 120.0), 255, "the mean that it subtracts differs by up to 20"),
        (np.full((32, 32, 3), 100.0), 60, "the number by which it divides differs by up to 195"),
        (np.full(3, 100.0), 255, r"it subtracts a mean of shape \(3,\), here \(32, 32, 3\)"),
    ],
)
def test_networks_with_another_preprocessing_are_not_averaged(mean, std, said):
    def make(mean, std):
        return tiny_network(preprocessing=mean_subtraction(mean.astype("float32"), std))

    both = make(np.full((32, 32, 3), 100.0), 255), {"other": make(mean, std)}
    if said is None:
        return average_weights(*both)
    with pytest.raises(InputError, match=f"^other cannot be averaged with this network: {said}$"):
        average_weights(*both)


def test_an_average_gets_statistics_of_all_images(digits):
    """Also if the runs kept the moving averages: these belong to other weights."""
    recipe = dataclasses.replace(RECIPE, statistics_share=0.0, augmentation="none", flip=False, mix="none")
    network, expected = build(digits, recipe), build(digits, recipe)
    expected.set_weights(network.get_weights())
    recompute_statistics(network, digits, recipe)
    Statistics(expected, choose_examples(digits.train, 64, 16), 16).recompute()
    assert not np.allclose(copy_moving_statistics(network)[0][0], 0)
    for a, b in zip(sum(copy_moving_statistics(network), []), sum(copy_moving_statistics(expected), []), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_images_are_augmented_as_in_training(digits):
    """And the random states of the augmentation are restored, so that training draws the same numbers."""
    network = build(digits)
    layers = [Darken(seed=3), Mix("mixup", 4)]
    examples = choose_examples(digits.train, 32, 16)
    before = copy_values([v for layer in layers for v in layer.variables])
    statistics = Statistics(network, examples, 16, changes=layers)
    moving = copy_values(network.variables)
    statistics.recompute()
    found = copy_moving_statistics(network)
    restore_values(network.variables, moving)
    statistics.recompute()
    for a, b in zip(sum(found, []), sum(copy_moving_statistics(network), []), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(before, copy_values([v for layer in layers for v in layer.variables]), strict=True):
        np.testing.assert_array_equal(a, b)
    # The same batches, augmented by copies of the layers, without augmentation inside.
    changed = []
    copies = [type(layer).from_config(layer.get_config()) for layer in layers]
    for start in (0, 16):
        images = copies[0](examples.images[start : start + 16], training=True)
        changed.append(keras.ops.convert_to_numpy(copies[1](images, training=True)[0]))
    changed = Examples(np.concatenate(changed), examples.labels)
    Statistics(network, changed, 16).recompute()
    for a, b in zip(sum(found, []), sum(copy_moving_statistics(network), []), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    Statistics(network, examples, 16).recompute()
    assert not np.allclose(found[0][0], copy_moving_statistics(network)[0][0], rtol=0.05)


def copy_moving_statistics(network):
    return [copy_values((layer.moving_mean, layer.moving_variance)) for layer in find_normalizations(network)]


def measure_batch_statistics(network, images):
    """Return the statistics of one batch at each normalization in training, measured with momentum 0."""
    layers = find_normalizations(network)
    for layer in layers:
        layer.momentum = 0.0
    network(images, training=True)
    return copy_moving_statistics(network)


def test_statistics_are_the_moments_over_all_batches(digits):
    network = build(digits)
    images = digits.train.images[:48].copy()
    images[:16] //= 4  # the batches differ in their means
    examples = Examples(images, digits.train.labels[:48])
    Statistics(network, examples, 16).recompute()
    recomputed = copy_moving_statistics(network)
    assert {layer.momentum for layer in find_normalizations(network)} == {0.9}

    reference = build(digits)
    batches, gained = [measure_batch_statistics(reference, images[i : i + 16]) for i in (0, 16, 32)], []
    for i, (mean, variance) in enumerate(recomputed):
        means, variances = (np.stack([batch[i][j] for batch in batches]).astype("float64") for j in (0, 1))
        squares = variances + means**2
        np.testing.assert_allclose(mean, means.mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(variance, squares.mean(0) - means.mean(0) ** 2, rtol=1e-3, atol=1e-5)
        gained.append(np.abs(variance - variances.mean(0)).max())
    assert max(gained) > 1e-2, "the mean of the batches' variances is another value"


def test_nothing_else_changes_and_the_result_repeats(digits):
    network = build(digits)
    moving = {id(v) for layer in find_normalizations(network) for v in (layer.moving_mean, layer.moving_variance)}
    before = copy_values(network.variables)
    statistics = make_statistics(network, digits.train, RECIPE)
    statistics.recompute()
    once = copy_values(network.variables)
    restore_values(network.variables, before)
    statistics.recompute()
    for variable, old, new, again in zip(network.variables, before, once, copy_values(network.variables)):
        assert np.array_equal(old, new) == (id(variable) not in moving), variable.path
        np.testing.assert_array_equal(new, again)


def test_frozen_normalizations_keep_their_statistics(digits):
    network = build(digits)
    network.get_layer("norm_tail").trainable = False
    before = copy_values(network.get_layer("norm_tail").variables)
    make_statistics(network, digits.train, RECIPE).recompute()
    for old, new in zip(before, copy_values(network.get_layer("norm_tail").variables)):
        np.testing.assert_array_equal(old, new)
    network.trainable = False
    assert make_statistics(network, digits.train, RECIPE).recompute() is None


def test_examples_are_whole_batches(digits):
    for count, batch_size, expected in ((3, 16, 16), (25, 16, 32), (24, 10, 20), (999, 10, 60), (5, 100, 64)):
        chosen = choose_examples(digits.train, count, batch_size)
        assert len(chosen.labels) == len(chosen.images) == expected
        assert len({image.tobytes() for image in chosen.images}) == expected
    assert make_statistics(None, digits.train, dataclasses.replace(RECIPE, statistics_share=0.0)) is None


@pytest.fixture(scope="module")
def runs(digits, tmp_path_factory):
    """The same run with and without recomputed statistics."""
    made = {}
    for share in (0.5, 0.0):
        folder, recipe = tmp_path_factory.mktemp("run"), dataclasses.replace(RECIPE, statistics_share=share)
        fit(build(digits), digits, recipe, folder)
        made[share] = SimpleNamespace(
            folder=folder,
            history=read_history(folder / "history.csv"),
            checkpoint=unpack(list_checkpoints(folder)[0].read_bytes())[1],
        )
    return made


def test_training_is_the_same_bit_for_bit(runs):
    with_it, without = runs[0.5], runs[0.0]
    assert with_it.history["loss"] == without.history["loss"]
    assert with_it.history["val_loss"] != without.history["val_loss"]
    assert with_it.checkpoint.keys() == without.checkpoint.keys()
    for name, values in with_it.checkpoint.items():
        np.testing.assert_array_equal(values, without.checkpoint[name], err_msg=name)


def test_saved_networks_are_the_validated_ones(runs, digits):
    run = runs[0.5]
    best = int(np.argmax(run.history["val_accuracy"]))
    for name, epoch in (("best", best), ("last", 1)):  # the average of the weights, in both
        network = keras.models.load_model(run.folder / f"{name}.keras")
        loss, accuracy, _ = score(make_logits_model(network), digits.validation)
        assert accuracy == pytest.approx(run.history["val_accuracy"][epoch], abs=1e-6)
        penalty = float(keras.ops.convert_to_numpy(sum(network.losses))) if network.losses else 0.0
        assert loss + penalty == pytest.approx(run.history["val_loss"][epoch], rel=1e-4)


def test_an_epoch_without_validation_restores_nothing(digits):
    EvaluatedNetwork(None, None, averaged=True).on_epoch_end(0)


def test_recipes_older_than_the_field_keep_the_moving_statistics(tmp_path):
    values = json.loads(Recipe().to_json())
    assert values.pop("statistics_share") == 0.05
    assert Recipe.from_json(json.dumps(values)).statistics_share == 0.0

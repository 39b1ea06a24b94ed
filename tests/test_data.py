"""Splits, limits and batches."""

import numpy as np
import pytest

from Training.data import datasets
from Training.data.batches import Batches, find_even_batch
from Training.data.datasets import Examples
from Training.errors import InputError
from Training.recipe import Recipe


def test_digits_are_real_and_split_by_class():
    digits = datasets.load("digits")
    sizes = [len(part.labels) for part in (digits.train, digits.validation, digits.test)]
    assert sizes == [1293, 144, 360]
    assert digits.train.images.shape == (1293, 32, 32, 3) and digits.train.images.dtype == np.uint8
    assert digits.train.images.max() == 255
    for part in (digits.validation, digits.test):
        counts = np.bincount(part.labels, minlength=10)
        assert counts.max() - counts.min() <= 2
    assert digits.classes == tuple("0123456789")


def test_split_is_fixed_and_complete():
    one, two = datasets.load("digits"), datasets.load("digits")
    np.testing.assert_array_equal(one.held_out, two.held_out)
    everything = datasets.load("digits", validation_split=0)
    assert len(everything.train.labels) == 1437 and len(everything.validation.labels) == 0
    np.testing.assert_array_equal(everything.train.images[one.held_out], one.validation.images)


def test_samples_limit_training_images_by_class():
    limited = datasets.load("digits", samples=100)
    assert len(limited.train.labels) == 100 and len(limited.validation.labels) == 144
    assert set(np.bincount(limited.train.labels)) <= {9, 10, 11}
    assert len(datasets.load("digits", samples=1290).train.labels) == 1290
    assert len(datasets.load("digits", samples=10_000).train.labels) == 1293


def test_eval_samples_limit_validation_and_test_by_class_alone():
    limited, whole = datasets.load("digits", eval_samples=50), datasets.load("digits")
    assert [len(part.labels) for part in limited[:3]] == [1293, 50, 50] and len(limited.held_out) == 50
    np.testing.assert_array_equal(limited.train.images, whole.train.images)
    assert set(limited.held_out) < set(whole.held_out)
    for part in (limited.validation, limited.test):
        assert set(np.bincount(part.labels)) <= {4, 5, 6}
    assert [len(part.labels) for part in datasets.load("digits", eval_samples=200)[:3]] == [1293, 144, 200]
    recipe = Recipe(dataset="digits", eval_samples=20, samples=30)
    assert [len(part.labels) for part in datasets.load_for_recipe(recipe)[:3]] == [30, 20, 20]
    with pytest.raises(InputError, match="3 of 144 images cannot be split off by class"):
        datasets.load("digits", eval_samples=3)


def test_impossible_split_is_named():
    with pytest.raises(InputError, match="3 of 1293 images cannot be split off by class"):
        datasets.load("digits", samples=3)
    with pytest.raises(InputError, match="9 of 10 images cannot be split off by class"):
        datasets._split(np.arange(10) % 5, 0.9, 0)  # would leave one training image of five classes


def test_mean_is_per_pixel():
    digits = datasets.load("digits")
    assert digits.mean.shape == (32, 32, 3)
    np.testing.assert_allclose(digits.mean, digits.train.images.astype("float64").mean(axis=0), rtol=1e-6)


def make_examples(count):
    return Examples(np.arange(count, dtype="uint8").reshape(-1, 1, 1, 1), np.arange(count, dtype="int32"))


def test_order_is_a_function_of_seed_and_epoch():
    def read_order(seed, epoch):
        batches = Batches(make_examples(103), 10, seed)
        batches.set_epoch(epoch)
        assert len(batches) == 10
        seen = np.concatenate([batches[i][1] for i in range(len(batches))])
        assert len(set(seen)) == 100
        return seen.tolist()

    assert read_order(1, 4) == read_order(1, 4)
    assert read_order(1, 4) != read_order(1, 5) != read_order(2, 5)


def test_batches_are_bytes_and_without_a_seed_in_order():
    batches = Batches(make_examples(23), 10)
    assert len(batches) == 3 and batches[2][0].shape == (3, 1, 1, 1) and batches[0][0].dtype == np.uint8
    np.testing.assert_array_equal(np.concatenate([batches[i][1] for i in range(3)]), np.arange(23))


def test_even_batches_divide_the_images_if_possible():
    assert [find_even_batch(n) for n in (10_000, 5_000, 144, 360, 7, 257)] == [250, 250, 144, 180, 7, 129]
    assert find_even_batch(45_000, 5_000, 10_000) == 250
    assert find_even_batch(1_293, 144, 360) == 72  # pads 3 images
    assert [find_even_batch(50, devices=n) for n in (2, 7, 64)] == [50, 35, 64]


def test_a_padded_last_batch_repeats_images_with_weight_0():
    images, labels, weights = Batches(make_examples(23), 10, padded=True)[2]
    assert images.shape[0] == 10 and labels.tolist() == [20, 21, 22, 0, 1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose(weights, [30 / 23] * 3 + [0] * 7, rtol=1e-6)


def test_label_noise_has_the_paper_s_confusion_matrix():
    """Wang et al. 2017, section 4.1: r on the diagonal, (1 - r) / 9 elsewhere, for as many labels as in CIFAR-10."""
    from sklearn.metrics import confusion_matrix

    labels = np.repeat(np.arange(10, dtype="int32"), 5000)
    for share in (0.1, 0.3, 0.5, 0.7):
        matrix = confusion_matrix(labels, datasets.add_label_noise(labels, 10, share)) / 5000
        expected = np.full((10, 10), share / 9)
        np.fill_diagonal(expected, 1 - share)
        error = 5 * np.sqrt(expected * (1 - expected) / 5000)  # five standard deviations
        assert (np.abs(matrix - expected) < error).all()
    assert np.array_equal(datasets.add_label_noise(labels, 10, 0.0), labels)
    assert np.array_equal(datasets.add_label_noise(labels[:5000], 1, 0.0), labels[:5000])


def test_label_noise_does_not_affect_validation_and_test_labels():
    clean, noisy = datasets.load("digits"), datasets.load("digits", label_noise=0.5)
    assert 0.4 < np.mean(clean.train.labels != noisy.train.labels) < 0.6
    assert np.array_equal(clean.validation.labels, noisy.validation.labels)
    assert np.array_equal(clean.test.labels, noisy.test.labels)

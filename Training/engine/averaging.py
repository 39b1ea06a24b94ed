"""Averages the weights of several trained networks."""

import keras
import numpy as np

from Training.engine.fine_tuning import find_difference, find_weighted_layers
from Training.engine.fit import compute_fill, make_changes
from Training.engine.statistics import Statistics, choose_examples
from Training.errors import InputError

MOST_IMAGES = 50_000  # all of CIFAR; more would only cost time
LARGEST_SHIFT = 5.0  # of 255, by which the means and deviations of two preprocessings may differ


def average_weights(network, others):
    """Replace a network's weights by the mean of its own and those of other networks, `{name: network}`.

    This is stochastic weight averaging over the ends of several cycles of the learning rate. It helps if the networks
    come from the same training: runs that started from the weights of each other, or from the same weights. The
    statistics of the normalizations must be recomputed afterwards, see `recompute_statistics`.
    Source: Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima and Better Generalization",
    https://arxiv.org/abs/1803.05407, section 3.

    Raises:
        InputError: a network has other layers, shapes, kinds of attention or preprocessing; the message names the
            first difference.
    """
    own = find_weighted_layers(network)
    found = {name: find_weighted_layers(other) for name, other in others.items()}
    for name, layers in found.items():
        difference = find_difference(own, layers, same_classes=True) or compare_preprocessing(network, others[name])
        if difference:
            raise InputError(f"{name} cannot be averaged with this network: {difference}")
    for name, layer in own.items():
        values = zip(layer.get_weights(), *(layers[name].get_weights() for layers in found.values()))
        layer.set_weights([np.mean(each, axis=0, dtype="float64") for each in values])


def read_preprocessing(network):
    """Return the mean that a network subtracts and the number by which it divides, two arrays, or None."""
    layers = [layer.get_config() for layer in network.layers if isinstance(layer, keras.layers.Normalization)]
    if len(layers) != 1:
        return None
    return np.asarray(layers[0]["mean"], "float32"), np.sqrt(np.asarray(layers[0]["variance"], "float32"))


def compare_preprocessing(network, other):
    """Return a text if the preprocessing of two networks clearly differs, or None.

    A mean over other images of the same data set differs slightly, which is no obstacle.
    """
    ours, theirs = read_preprocessing(network), read_preprocessing(other)
    if ours is None or theirs is None:
        return None if ours is theirs else "only one of them has a preprocessing"
    if ours[0].shape != theirs[0].shape:
        return f"it subtracts a mean of shape {theirs[0].shape}, here {ours[0].shape}"
    for what, a, b in zip(("the mean that it subtracts", "the number by which it divides"), ours, theirs):
        difference = float(np.abs(a - b).max())
        if difference > LARGEST_SHIFT:
            return f"{what} differs by up to {difference:.4g}"
    return None


def recompute_statistics(network, data, recipe):
    """Recompute a network's normalization statistics in one pass over the training images, augmented as in training.

    The average has never been trained, so it has no statistics of its own, whatever `recipe.statistics_share` is. Of a
    large training set, 50,000 images are used.
    Source: Izmailov et al. 2018, algorithm 1.
    """
    changes = make_changes(recipe, compute_fill(recipe, data))
    chosen = choose_examples(data.train, MOST_IMAGES, recipe.batch_size)
    Statistics(network, chosen, recipe.batch_size, changes=changes, random_crops=recipe.random_crops).recompute()

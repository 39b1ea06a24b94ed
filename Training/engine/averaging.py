"""Averages the weights of several trained networks."""

import numpy as np

from Model.preprocessing import read_mean_and_std
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
        difference = find_difference(own, layers, same_classes=True) or find_preprocessing_difference(
            network, others[name]
        )
        if difference:
            raise InputError(f"{name} cannot be averaged with this network: {difference}")
    for name, layer in own.items():
        values = zip(layer.get_weights(), *(layers[name].get_weights() for layers in found.values()))
        layer.set_weights([np.mean(each, axis=0, dtype="float64") for each in values])


def find_preprocessing_difference(network, other):
    """Describe the first clear difference between the preprocessing of two networks, or return None.

    A mean over other images of the same data set differs slightly, which is no obstacle.
    """
    try:
        ours, theirs = read_mean_and_std(network), read_mean_and_std(other)
    except ValueError as error:
        return str(error)
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

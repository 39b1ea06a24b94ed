"""Recomputes the statistics of normalizations over training images before a network is evaluated."""

import contextlib

import keras
import numpy as np
from keras import ops

from Module import BatchNormalization
from Training.data.batches import Batches
from Training.data.datasets import Examples
from Training.devices import ONE
from Training.engine.feeding import feed
from Training.engine.graph import is_faster_without_optimizer, skip_graph_optimizer
from Training.engine.optimizers import copy_values, restore_values
from Training.engine.training_model import make_logits_model, split_output

SEED = 0  # draws the images: the same ones in every epoch and every run
MOST_IMAGES = 10_000  # more would only cost time


def find_normalizations(network):
    """Return the network's batch normalizations without frozen ones, whose statistics do not change."""
    found = [layer for layer in network._flatten_layers() if isinstance(layer, BatchNormalization)]
    return [layer for layer in found if layer.trainable]


def choose_examples(examples, count, batch_size):
    """Draw whole batches of examples without replacement: about `count` images, but at least one batch.

    Args:
        examples: `datasets.Examples`.
        count: int or float, number of images.
        batch_size: int, images per batch.

    Returns:
        `datasets.Examples`.
    """
    available = len(examples.labels)
    batch_size = min(batch_size, available)
    batches = min(max(round(count / batch_size), 1), available // batch_size)
    chosen = np.random.default_rng(SEED).permutation(available)[: batches * batch_size]
    return Examples(examples.images.take(chosen, axis=0), examples.labels[chosen])


class StatisticsModel(keras.Model):
    """Runs a network as in training and combines the batch statistics of its normalizations.

    With the mean `m` and the biased variance `v` of batch `k = 1, 2, ...` and `d = m - mean`:
    `mean += d / k` and `variance += (v - variance) / k + d^2 (k - 1) / k^2`. After the last batch, these are `E[x]` and
    `E[x^2] - E[x]^2` over all batches, computed without cancellation.

    Args:
        network: a functional model of `Model`. Its moving statistics and random states change in each call.
        changes: layers that augment the images first, as in training; their random states change too.

    Input shape:  `(batch, height, width, channels)`; every batch has the same size.
    Output shape: `(batch, classes)`, logits.
    """

    def __init__(self, network, changes=()):
        super().__init__(dtype="float32", name=f"{network.name}_statistics")
        self.changes = list(changes)
        self.logits_model = make_logits_model(network)
        self.normalizations = find_normalizations(network)
        self.batches_seen = self._add_zeros((), "batches_seen")
        self.means = [self._add_zeros(layer.moving_mean.shape, "mean") for layer in self.normalizations]
        self.variances = [self._add_zeros(layer.moving_variance.shape, "variance") for layer in self.normalizations]
        self.built = True

    def _add_zeros(self, shape, name):
        return self.add_weight(shape=shape, initializer="zeros", trainable=False, autocast=False, name=name)

    def call(self, images):
        for layer in self.changes:
            images, _ = split_output(layer(images, training=True))
        logits = self.logits_model(images, training=True)
        self.batches_seen.assign(self.batches_seen + 1.0)
        k = ops.convert_to_tensor(self.batches_seen)
        for layer, mean, variance in zip(self.normalizations, self.means, self.variances):
            difference = layer.moving_mean - mean
            gained = (layer.moving_variance - variance) / k + ops.square(difference) * (k - 1.0) / ops.square(k)
            mean.assign(mean + difference / k)
            variance.assign(variance + gained)
        return logits

    def reset(self):
        """Forget all batches."""
        for variable in (self.batches_seen, *self.means, *self.variances):
            variable.assign(np.zeros(variable.shape, "float32"))


@contextlib.contextmanager
def show_batch_statistics(normalizations):
    """Inside this context, the moving statistics after a training step are those of its batch."""
    kept = [layer.momentum for layer in normalizations]
    try:
        for layer in normalizations:
            layer.momentum = 0.0
        yield
    finally:
        for layer, momentum in zip(normalizations, kept):
            layer.momentum = momentum


class Statistics:
    """Recomputes the statistics of a network's normalizations over training images.

    The network runs as in training: images are augmented, and each batch is normalized by its own mean and variance.
    Statistics of images without augmentation differ from those to which the weights are adapted, and raise the error
    (docs/report.md). This is the "precise batch normalization" of Wu and Johnson 2021, https://arxiv.org/abs/2105.07576,
    section 3, but with the variance over all batches instead of the mean of their variances.

    Args:
        network: a functional model of `Model`.
        examples: `datasets.Examples`, whole batches, see `choose_examples`.
        batch_size: int, images per batch.
        devices: `devices.Devices`, over which each batch is split.
        changes: layers that augment the images, those of the training model.
        random_crops: bool, whether random crops of streamed pictures are read, as in training.
    """

    def __init__(self, network, examples, batch_size, devices=ONE, changes=(), random_crops=False):
        self.network = network
        self.changes = changes
        cropped = {"seed": SEED, "random_crops": True} if random_crops else {}
        self.batches = Batches(examples, min(batch_size, len(examples.labels)), devices=devices, **cropped)
        self.normalizations = find_normalizations(network)
        self.model = StatisticsModel(network, changes) if self.normalizations else None

    def recompute(self):
        """Replace the moving statistics; weights and random states stay as they are."""
        if not self.normalizations:
            return
        moving = {id(v) for layer in self.normalizations for v in (layer.moving_mean, layer.moving_variance)}
        others = [v for v in self.network.non_trainable_variables if id(v) not in moving]  # states of dropout
        others += [v for layer in self.changes for v in layer.variables]  # and of the augmentation
        kept = copy_values(others)
        self.model.reset()
        faster = skip_graph_optimizer if is_faster_without_optimizer(self.network) else contextlib.nullcontext
        with show_batch_statistics(self.normalizations), faster():
            self.model.predict(feed(self.batches), verbose=0)
        restore_values(others, kept)
        for name in ("mean", "variance"):
            found = copy_values(getattr(self.model, f"{name}s"))
            restore_values([getattr(layer, f"moving_{name}") for layer in self.normalizations], found)


def make_statistics(network, examples, recipe, devices=ONE, changes=()):
    """Return the `Statistics` of a run, or None if its recipe keeps the moving statistics.

    Args:
        network: a functional model of `Model`.
        examples: `datasets.Examples`, the training examples.
        recipe: `recipe.Recipe`.
        devices: `devices.Devices`.
        changes: layers that augment the images, those of the training model.
    """
    if not recipe.statistics_share:
        return None
    count = min(recipe.statistics_share * len(examples.labels), MOST_IMAGES)
    chosen = choose_examples(examples, count, recipe.batch_size)
    return Statistics(network, chosen, recipe.batch_size, devices, changes, recipe.random_crops)

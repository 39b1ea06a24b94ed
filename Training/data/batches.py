"""Batches of raw images for training and evaluation, in an order given by the seed and the epoch."""

import math

import keras
import numpy as np

from Training.data.stream import ReadAhead, shuffle_locally
from Training.devices import ONE

SMALLEST_PREDICTED_BATCH, LARGEST_PREDICTED_BATCH = 32, 256


class Batches(keras.utils.PyDataset):
    """Batches of raw images, in an order that depends only on the seed and the epoch.

    A batch is a tuple of images, uint8 `(batch, height, width, channels)`, or their positions on the device, int32
    `(batch,)`; labels, int `(batch,)`; and, if the last batch is padded, float32 weights `(batch,)`.

    Args:
        examples: `datasets.Examples`.
        batch_size: int, images per batch.
        seed: int, or None for the given order with a shorter last batch. With a seed, each epoch is shuffled, and the
            images that do not fill a batch are left out of that epoch, so that all steps have the same shape.
        stored_from: int, or None. With a number, batches contain the positions of the images on the device instead of
            the images. The first example is stored at this position.
        random_crops: bool, whether a stream returns random crops of its pictures, drawn from the seed and the epoch.
        shards_at_once: int, see `stream.shuffle_locally`; 0 shuffles over all shards.
        devices: `devices.Devices`. This process reads only its part of each batch. Without a seed, the last batch is
            padded with images of weight 0 until the devices can share it, or to the full size with `padded`. The
            weights of the other images are then slightly above 1, so that means over all batches equal means over the
            examples.
        alternate: bool, whether to mirror each image in every second epoch. Half of the images, drawn from the seed,
            are mirrored in even epochs, the others in odd ones (Jordan 2024, https://arxiv.org/abs/2404.00498,
            "alternating flip"). A mirrored image on the device is sent as the complement `-1 - position`.
        mirrored: bool, whether to mirror every image.
        padded: bool, whether the last batch is padded to the full size. All batches then have weights. Only without a
            seed.
    """

    def __init__(
        self,
        examples,
        batch_size,
        seed=None,
        stored_from=None,
        random_crops=False,
        shards_at_once=0,
        devices=ONE,
        alternate=False,
        mirrored=False,
        padded=False,
    ):
        super().__init__()
        self.examples = examples
        self.batch_size = batch_size
        self.seed = seed
        self.stored_from = stored_from
        self.devices = devices
        self.random_crops = random_crops
        self.shards_at_once = shards_at_once
        self.mirrored = np.full(len(examples.labels), mirrored)
        if alternate:
            self.mirrored = np.random.default_rng((seed, 0, 0)).random(len(self.mirrored)) < 0.5
        self.alternate = alternate
        self.padded = padded
        self.ahead = ReadAhead(self._read, getattr(examples.images, "workers", 0))
        self.set_epoch(0)

    def set_epoch(self, epoch, first_step=0):
        """Use the order of this epoch, starting at step `first_step`."""
        self.ahead.clear()
        self.first_step = first_step
        self.epoch = epoch
        count = len(self.examples.labels)
        if self.seed is None:
            self.order = np.arange(count + -count % (self.batch_size if self.padded else self.devices.count))
            return
        rng = np.random.default_rng((self.seed, epoch))
        if self.shards_at_once:
            self.order = shuffle_locally(rng, self.examples.images.shard, self.shards_at_once)
        else:
            self.order = rng.permutation(count)

    @property
    def steps_per_epoch(self):
        count = len(self.examples.labels) / self.batch_size
        return math.ceil(count) if self.seed is None else math.floor(count)

    def __len__(self):
        return self.steps_per_epoch - self.first_step

    def __getitem__(self, index):
        index += self.first_step
        chosen = self._choose(index)
        count = len(self.examples.labels)
        weighted = self.padded or len(self.order) > count
        weights = () if not weighted else ((chosen < count).astype("float32") * len(self.order) / count,)
        labels = self.examples.labels[chosen % count]
        if self.stored_from is not None:
            position = (chosen % count + self.stored_from).astype("int32")
            return np.where(self._mirror(chosen % count), -1 - position, position), labels, *weights
        return self.ahead.get(index, self.steps_per_epoch), labels, *weights

    def _choose(self, index):
        """Return the positions of the images that this process reads in a step; those of padding are past the end."""
        chosen = self.order[index * self.batch_size : (index + 1) * self.batch_size]
        return chosen[self.devices.part(len(chosen))]

    def _mirror(self, chosen):
        """Return whether each of these examples is mirrored in this epoch, bool `(n,)`."""
        return self.mirrored[chosen] ^ (self.alternate and self.epoch % 2 == 1)

    def _read(self, index):
        """Return the images of a step."""
        chosen = self._choose(index) % len(self.examples.labels)
        images = self.examples.images
        if self.random_crops:
            return images.crop_randomly(chosen, (self.seed, self.epoch))
        read = images[chosen]
        mirror = self._mirror(chosen)
        read[mirror] = read[mirror, :, ::-1]
        return read


def find_even_batch(*counts, devices=1):
    """Return the batch size that needs the fewest images of padding, so that a compiled function sees only one shape.

    It is between 32 and 256, or less if there are fewer images, and a multiple of the number of devices. If several
    sizes need equally many, it is the largest of them.

    Args:
        counts: numbers of images of one data set or more.
        devices: int, number of devices that share each batch.
    """
    largest = min(max(counts), LARGEST_PREDICTED_BATCH)
    least = -(-min(largest, SMALLEST_PREDICTED_BATCH) // devices) * devices
    sizes = range(least, max(largest, least) + 1, devices)
    return min(sizes, key=lambda size: (sum(-count % size for count in counts), -size))

"""What a training step is sent: batches of raw images, in an order that a seed and an epoch decide."""

import math

import keras
import numpy as np

from Training.data.stream import ReadAhead, shuffle_locally
from Training.devices import ONE

LARGEST_PREDICTED_BATCH = 256


class Batches(keras.utils.PyDataset):
    """Batches of raw images, in an order that is a function of the seed and the epoch alone.

    A batch is a tuple: images, uint8 `(batch, height, width, channels)`, or their positions on the device, int32
    `(batch,)`; labels, int `(batch,)`; and where a last batch had to be filled, float32 weights `(batch,)`.

    Args:
        examples: `datasets.Examples`.
        batch_size: int, images a batch.
        seed: int, or None for the given order with a shorter last batch. With a seed each epoch is shuffled, and
            what does not fill a batch is left out of that epoch, so that every step has one shape.
        stored_from: int, or None. With a number the batches hold no images but their positions on the device, where
            these examples begin at this one.
        random_crops: bool, whether a stream gives random parts of its pictures, a function of seed and epoch too.
        shards_at_once: int, see `stream.shuffle_locally`; 0 is one order over all.
        devices: `devices.Devices`. Of each batch this process reads its part alone. Without a seed, the last batch is
            filled with further images of weight 0 until the devices can share it; the weights of the others are then
            a little over 1, so that means over all batches are those over the examples.
        alternate: bool. Mirrors each image in every second epoch, half of them, drawn from the seed, in the even ones
            (Jordan 2024, https://arxiv.org/abs/2404.00498, "alternating flip"). A position on the device is then
            sent as its complement, `-1 - position`.
        mirrored: bool, whether every image is mirrored.
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
        self.ahead = ReadAhead(self._read, getattr(examples.images, "workers", 0))
        self.set_epoch(0)

    def set_epoch(self, epoch, first_step=0):
        """Take the order of this epoch, from its step `first_step` on."""
        self.ahead.clear()
        self.first_step = first_step
        self.epoch = epoch
        count = len(self.examples.labels)
        if self.seed is None:
            self.order = np.arange(-(-count // self.devices.count) * self.devices.count)
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
        chosen = self._chosen(index)
        count = len(self.examples.labels)
        weights = () if len(self.order) <= count else ((chosen < count).astype("float32") * len(self.order) / count,)
        labels = self.examples.labels[chosen % count]
        if self.stored_from is not None:
            position = (chosen % count + self.stored_from).astype("int32")
            return np.where(self._mirror(chosen % count), -1 - position, position), labels, *weights
        return self.ahead.get(index, self.steps_per_epoch), labels, *weights

    def _chosen(self, index):
        """Positions of the images of a step that this process reads; what fills up lies behind the last of them."""
        chosen = self.order[index * self.batch_size : (index + 1) * self.batch_size]
        return chosen[self.devices.part(len(chosen))]

    def _mirror(self, chosen):
        """Which of these examples are mirrored in this epoch."""
        return self.mirrored[chosen] ^ (self.alternate and self.epoch % 2 == 1)

    def _read(self, index):
        """The images of a step."""
        chosen = self._chosen(index) % len(self.examples.labels)
        images = self.examples.images
        if self.random_crops:
            return images.crops(chosen, (self.seed, self.epoch))
        read = images[chosen]
        mirror = self._mirror(chosen)
        read[mirror] = read[mirror, :, ::-1]
        return read


def find_even_batch(count, devices=1):
    """The largest batch up to 256 that divides `count`, so that a compiled function sees one shape.

    Where the largest divisor is under 32, 256, with a shorter last batch. With several devices all of this holds for
    the images of one device, of 256 for all of them together.
    """
    count, largest = -(-count // devices), max(LARGEST_PREDICTED_BATCH // devices, 1)
    divisor = max(d for d in range(1, largest + 1) if count % d == 0)
    return devices * (divisor if divisor >= min(32 // devices, count) else largest)

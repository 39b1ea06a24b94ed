"""Pictures that are decoded when they are asked for, in place of an array that holds them all."""

import errno
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from Training.console import warn
from Training.data import decoding
from Training.data.listing import digest
from Training.devices import count_cores
from Training.errors import InputError
from Training.files import open_own

TRIES = 10  # pictures of a class that are tried in the place of a broken one
AREA = (0.08, 1.0)  # of a picture that a random crop takes
ASPECT = (3 / 4, 4 / 3)  # width to height of a random crop


def draw_crop(rng, height, width):
    """A random part of a picture, as `(left, top, right, bottom)` in pixels.

    Its area is uniform in 8 to 100 % of the picture, its aspect ratio log-uniform in 3:4 to 4:3; where ten draws do
    not fit into the picture, it is the middle square. Source: Szegedy et al. 2015, https://arxiv.org/abs/1409.4842,
    section 6, the scale and aspect ratio augmentation that Wang et al. 2017 name.
    """
    for _ in range(10):
        area = height * width * rng.uniform(*AREA)
        aspect = np.exp(rng.uniform(*np.log(ASPECT)))
        wide, high = np.sqrt(area * aspect), np.sqrt(area / aspect)
        if wide <= width and high <= height:
            left, top = rng.uniform(0, width - wide), rng.uniform(0, height - high)
            return left, top, left + wide, top + high
    side = min(height, width)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


class Stream:
    """Pictures behind the face of an array: `stream[positions]` decodes them to uint8 `(n, size, size, 3)`.

    A picture is scaled until it just covers the square, and its middle is taken. One that cannot be decoded is named
    once, and the next of its class takes its place: the same one in every epoch and in a resumed run. It may be read
    from several threads.

    Args:
        listing: `Listing`.
        size: int, height and width in pixels.
        margin: float, size of the square that a picture covers over the size of the middle that is taken.
        workers: int, threads that should read batches; 0 is one a core, but at least 2.
        positions: those of the listing that belong to this stream; None is all.
        broken: set that gets the listing's positions of pictures that cannot be decoded, or None for one of its own.
    """

    dtype = np.dtype("uint8")

    def __init__(self, listing, size, margin=1.0, workers=0, positions=None, broken=None):
        self.listing = listing
        self.size = size
        self.margin = margin
        self.workers = workers or max(count_cores(), 2)
        self.positions = np.arange(len(listing.labels)) if positions is None else np.asarray(positions)
        self.labels = listing.labels[self.positions]
        self.shape = (len(self.positions), size, size, 3)
        self.broken = set() if broken is None else broken
        self.failure = None
        self.lock = threading.Lock()
        self.pixels = self.done = None

    def __len__(self):
        return len(self.positions)

    def take(self, positions, axis=0):
        """A part of the stream, itself a stream, as `ndarray.take` gives a part of an array."""
        return Stream(self.listing, self.size, self.margin, self.workers, self.positions[positions], self.broken)

    @property
    def shard(self):
        """The file that holds each picture, or None where each has its own."""
        return None if self.listing.shard is None else self.listing.shard[self.positions]

    def __getitem__(self, index):
        positions = np.arange(len(self))[index]
        if positions.ndim == 0:
            return self[positions[None]][0]
        if self.pixels is None:
            return self._stacked([self._middle(i) for i in positions])
        missing = positions[~self.done[positions].astype(bool)]
        for i in missing:
            self.pixels[i] = self._middle(i)
            self.done[i] = self.positions[i] not in self.broken  # a broken one is to be named in the next run too
        return np.array(self.pixels[positions])

    def crops(self, positions, key):
        """The same pictures, but of each a random part (see `draw_crop`), a function of `key` and position alone.

        Args:
            positions: ints.
            key: tuple of ints, the seed and the epoch.
        """
        return self._stacked([self._crop(i, np.random.default_rng((*key, i))) for i in positions])

    def _stacked(self, images):
        return np.stack(images) if images else np.zeros((0, *self.shape[1:]), self.dtype)

    def _middle(self, i):
        side = round(self.size * self.margin)
        image = self._decoded(i, (side, side))
        start = (side - self.size) // 2
        return image[start : start + self.size, start : start + self.size]

    def _crop(self, i, rng):
        image = self._decoded(i, None)
        box = draw_crop(rng, *image.shape[:2])
        part = Image.fromarray(image).resize((self.size, self.size), Image.Resampling.BILINEAR, box, reducing_gap=3.0)
        return np.asarray(part)

    def _decoded(self, i, size):
        reason = None
        for j in self._candidates(i):
            try:
                name, raw = self.listing.fetch(self.positions[j])
                return decoding.read(name, size, raw)
            except (InputError, OSError) as error:
                reason = str(error)
                self._name(j, reason)
        with self.lock:
            self.failure = self.failure or f"no picture of a class can be read any more: {reason}"
        raise InputError(self.failure)

    def _candidates(self, i):
        """The picture itself and then the next ones of its class, round the end."""
        yield i
        same = np.flatnonzero(self.labels == self.labels[i])
        yield from np.roll(same, -np.searchsorted(same, i))[1 : TRIES + 1]

    def _name(self, i, reason):
        with self.lock:
            new = self.positions[i] not in self.broken
            self.broken.add(self.positions[i])
        if new:
            warn(f"skipped: {reason}")

    def cache_in(self, folder):
        """Keep what is decoded in a file of this folder from now on, `len * size * size * 3` bytes, mapped to memory.

        The file is named after the pictures, their place and the size: a later run uses it again; another set,
        or one that was written again, gets another file.
        A killed process leaves it usable; after a power cut it should be deleted.

        Raises:
            InputError: the folder cannot be written, or the disk is too full.
        """
        positions = digest(self.positions.tobytes())
        what = (self.listing.identity, self.listing.place, self.size, self.margin, len(self), positions)
        path = Path(folder) / f"{digest(repr(what).encode())[:16]}.pixels"
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.pixels = _map_file(path, self.shape)
            self.done = _map_file(path.with_suffix(".done"), (len(self),))
        except OSError as error:
            raise InputError(f"--cache {folder} cannot be written: {error.strerror or error}") from None


def _map_file(path, shape):
    """A uint8 array in a file, zeros if it is new; its space is reserved at once: the disk cannot be full later."""
    with open_own(path) as file:
        size = int(np.prod(shape))
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except (AttributeError, OSError) as error:  # not on this system, or not on this file system
            if getattr(error, "errno", errno.EINVAL) not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            file.truncate(size)
        return np.memmap(file, "uint8", "r+", shape=shape)


class ReadAhead:
    """Gives `read(index)` for rising indices, which threads make before they are asked for.

    Keras' own threads are not used: what they have ready when a pass is left early, as its trainer on JAX leaves the
    pass by which it sees what the data looks like, they give first in the next one, and the order is lost.

    Args:
        read: function of an index.
        workers: int, threads; 0 reads when it is asked for.
    """

    def __init__(self, read, workers):
        self.read = read
        self.depth = workers + 2
        self.pool = ThreadPoolExecutor(workers) if workers else None
        self.pending = {}
        self.lock = threading.Lock()

    def clear(self):
        """Forget what was read for another order."""
        with self.lock:
            for future in self.pending.values():
                future.cancel()
            self.pending = {}

    def get(self, index, end):
        """The value at `index`, while those behind it, up to `end`, are being read."""
        if self.pool is None:
            return self.read(index)
        with self.lock:
            self.pending = {i: future for i, future in self.pending.items() if i >= index}
            for i in range(index, min(index + self.depth, end)):
                if i not in self.pending:
                    self.pending[i] = self.pool.submit(self.read, i)
            future = self.pending.pop(index)
        return future.result()


def shuffle_locally(rng, shard, at_once):
    """A random order that keeps reads together: shards in random order, and so many at a time read in random order.

    Args:
        rng: `np.random.Generator`.
        shard: ints `(n,)`, the shard of each picture.
        at_once: int, shards whose pictures are mixed.
    """
    groups = np.array_split(rng.permutation(shard.max() + 1), -(-(shard.max() + 1) // at_once))
    return np.concatenate([rng.permutation(np.flatnonzero(np.isin(shard, group))) for group in groups])


def sum_over_chunks(function, images, positions):
    """The sum of `function(pixels)` over images in chunks of 32; a stream's chunks are decoded in parallel."""
    chunks = np.array_split(positions, max(len(positions) // 32, 1))
    with ThreadPoolExecutor(getattr(images, "workers", 1)) as pool:
        return sum(pool.map(lambda chosen: function(images[chosen]), chunks))


def compute_mean_image(images):
    """Mean of each pixel and channel over all images, float32 `(height, width, channels)`, from exact sums.

    Args:
        images: array or `Stream`, uint8 `(n, height, width, channels)`.
    """
    total = sum_over_chunks(lambda pixels: pixels.sum(axis=0, dtype="int64"), images, np.arange(len(images)))
    return (total / len(images)).astype("float32")


def compute_channel_statistics(images, positions):
    """Mean and standard deviation of each channel over some images, float32 `(channels,)`, from exact counts."""

    def histograms(pixels):
        return np.stack([np.bincount(pixels[..., c].ravel(), minlength=256) for c in range(pixels.shape[-1])])

    counts = sum_over_chunks(histograms, images, positions)  # (C, 256)
    values = np.arange(256)
    mean = counts @ values / counts.sum(axis=1)
    variance = counts @ values**2 / counts.sum(axis=1) - mean**2
    return mean.astype("float32"), np.sqrt(np.maximum(variance, 0)).astype("float32")

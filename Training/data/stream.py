"""Streams of pictures that are decoded on demand, instead of an array of all pictures."""

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

TRIES = 10  # other pictures of the class that are tried in place of a broken one
AREA = (0.08, 1.0)  # share of a picture's area in a random crop
ASPECT = (3 / 4, 4 / 3)  # ratio of width to height of a random crop


def draw_crop(rng, height, width):
    """Draw a random crop of a picture, `(left, top, right, bottom)` in pixels.

    Its area is uniform between 8 and 100 % of the picture, its aspect ratio log-uniform between 3:4 and 4:3. If ten
    draws do not fit into the picture, the crop is the center square. Source: Szegedy et al. 2015,
    https://arxiv.org/abs/1409.4842, section 6, the scale and aspect ratio augmentation that Wang et al. 2017 use.
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
    """Pictures with the interface of an array: `stream[positions]` decodes them to uint8 `(n, size, size, 3)`.

    A picture is scaled until it just covers the square, and its center is cropped. If a picture cannot be decoded, a
    warning is printed once, and the next one of its class is used instead: the same one in every epoch and in a resumed
    run. A stream is thread-safe.

    Args:
        listing: `Listing`.
        size: int, height and width in pixels.
        margin: float, pictures are scaled to cover `margin * size` pixels before their center is cropped.
        workers: int, number of threads that should read batches; 0 for one per core, but at least 2.
        positions: positions in the listing that belong to this stream; None for all.
        broken: set to which the listing's positions of undecodable pictures are added; None for a new one.
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

    def split(self, positions):
        """Return a part of the stream as a stream, whose broken pictures are replaced only by others of that part."""
        return Stream(self.listing, self.size, self.margin, self.workers, self.positions[positions], self.broken)

    def take(self, positions, axis=0):
        """Return some of the pictures like `ndarray.take`, as a `View`."""
        return View(self, np.asarray(positions))

    @property
    def shard(self):
        """The number of each picture's shard, or None if each picture is a file of its own."""
        return None if self.listing.shard is None else self.listing.shard[self.positions]

    def __getitem__(self, index):
        positions = np.arange(len(self))[index]
        if positions.ndim == 0:
            return self[positions[None]][0]
        if self.pixels is None:
            return self._stack([self._crop_center(i) for i in positions])
        missing = positions[~self.done[positions].astype(bool)]
        for i in missing:
            self.pixels[i] = self._crop_center(i)
            self.done[i] = self.positions[i] not in self.broken  # the next run must warn about a broken one too
        return np.array(self.pixels[positions])

    def crop_randomly(self, positions, key):
        """Return random crops of pictures (see `draw_crop`), which depend only on `key` and the position.

        Args:
            positions: ints.
            key: tuple of ints, the seed and the epoch.

        Returns:
            uint8 `(n, size, size, 3)`.
        """
        return self._stack([self._crop(i, np.random.default_rng((*key, i))) for i in positions])

    def _stack(self, images):
        return np.stack(images) if images else np.zeros((0, *self.shape[1:]), self.dtype)

    def _crop_center(self, i):
        side = round(self.size * self.margin)
        image = self._decode(i, (side, side))
        start = (side - self.size) // 2
        return image[start : start + self.size, start : start + self.size]

    def _crop(self, i, rng):
        image = self._decode(i, None)
        box = draw_crop(rng, *image.shape[:2])
        part = Image.fromarray(image).resize((self.size, self.size), Image.Resampling.BILINEAR, box, reducing_gap=3.0)
        return np.asarray(part)

    def _decode(self, i, size):
        reason = None
        for j in self._list_candidates(i):
            try:
                name, raw = self.listing.fetch(self.positions[j])
                return decoding.read(name, size, raw)
            except (InputError, OSError) as error:
                reason = str(error)
                self._report_broken(j, reason)
        with self.lock:
            self.failure = self.failure or f"no more pictures of a class can be read: {reason}"
        raise InputError(self.failure)

    def _list_candidates(self, i):
        """Yield the position of the picture, then those of the next ones of its class, cyclically."""
        yield i
        same = np.flatnonzero(self.labels == self.labels[i])
        yield from np.roll(same, -np.searchsorted(same, i))[1 : TRIES + 1]

    def _report_broken(self, i, reason):
        with self.lock:
            new = self.positions[i] not in self.broken
            self.broken.add(self.positions[i])
        if new:
            warn(f"skipped: {reason}")

    def cache_in(self, folder):
        """Keep decoded pictures in a memory-mapped file of `len * size * size * 3` bytes in this folder.

        The name of the file depends on the pictures, their location and the size, so later runs use it again, and a set
        of pictures that was changed gets a new file. The file stays usable if the process is killed; delete it after a
        power failure.

        Raises:
            InputError: the folder cannot be written, or the disk is too full.
        """
        positions = digest(self.positions.tobytes())
        key = (self.listing.identity, self.listing.place, self.size, self.margin, len(self), positions)
        path = Path(folder) / f"{digest(repr(key).encode())[:16]}.pixels"
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.pixels = _map_file(path, self.shape)
            self.done = _map_file(path.with_suffix(".done"), (len(self),))
        except OSError as error:
            raise InputError(f"--cache {folder} cannot be written: {error.strerror or error}") from None


class View:
    """Some of a stream's pictures, with the same interface.

    They are read by the stream: broken ones are replaced by others of the stream, it keeps them in its cache, and it
    has the reason if no picture of a class can be read.

    Args:
        stream: `Stream`.
        chosen: ints, positions in the stream.
    """

    dtype = Stream.dtype

    def __init__(self, stream, chosen):
        self.stream = stream
        self.chosen = chosen
        self.workers = stream.workers
        self.shape = (len(chosen), *stream.shape[1:])

    def __len__(self):
        return len(self.chosen)

    def __getitem__(self, index):
        return self.stream[self.chosen[index]]

    def crop_randomly(self, positions, key):
        """Return random crops, see `Stream.crop_randomly`."""
        return self.stream.crop_randomly(self.chosen[positions], key)


def _map_file(path, shape):
    """Map a file to a uint8 array, zeros if it is new. Its space is reserved now, so the disk cannot fill up later."""
    with open_own(path) as file:
        size = int(np.prod(shape))
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except (AttributeError, OSError) as error:  # not supported by this system or this file system
            if getattr(error, "errno", errno.EINVAL) not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            file.truncate(size)
        return np.memmap(file, "uint8", "r+", shape=shape)


class ReadAhead:
    """Returns `read(index)` for increasing indices, computed ahead of time in threads.

    Keras' own threads are not used. If a pass over the data is left early, as by its JAX trainer when it looks at the
    first batch, they return the batches that were ready at the start of the next pass, and the order is lost.

    Args:
        read: function of an index.
        workers: int, number of threads; 0 to read on demand.
    """

    def __init__(self, read, workers):
        self.read = read
        self.depth = workers + 2
        self.pool = ThreadPoolExecutor(workers) if workers else None
        self.pending = {}
        self.lock = threading.Lock()

    def clear(self):
        """Discard values that were read ahead for another order."""
        with self.lock:
            for future in self.pending.values():
                future.cancel()
            self.pending = {}

    def get(self, index, end):
        """Return the value at `index`, and start reading the following ones, up to `end`."""
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
    """Draw an order that reads few shards at a time: shards in random order, and pictures mixed over groups of shards.

    Args:
        rng: `np.random.Generator`.
        shard: ints `(n,)`, the shard of each picture.
        at_once: int, number of shards in a group.

    Returns:
        ints `(n,)`, a permutation of the pictures.
    """
    groups = np.array_split(rng.permutation(shard.max() + 1), -(-(shard.max() + 1) // at_once))
    return np.concatenate([rng.permutation(np.flatnonzero(np.isin(shard, group))) for group in groups])


def sum_over_chunks(function, images, positions):
    """Return the sum of `function(pixels)` over images in chunks of 32; a stream's chunks are decoded in parallel."""
    chunks = np.array_split(positions, max(len(positions) // 32, 1))
    with ThreadPoolExecutor(getattr(images, "workers", 1)) as pool:
        return sum(pool.map(lambda chosen: function(images[chosen]), chunks))


def compute_mean_image(images):
    """Return the mean of each pixel and channel over all images, float32 `(height, width, channels)`, from exact sums.

    Args:
        images: array or `Stream`, uint8 `(n, height, width, channels)`.
    """
    total = sum_over_chunks(lambda pixels: pixels.sum(axis=0, dtype="int64"), images, np.arange(len(images)))
    return (total / len(images)).astype("float32")


def compute_channel_statistics(images, positions):
    """Return mean and standard deviation of each channel over images, float32 `(channels,)`, from exact counts."""

    def histograms(pixels):
        return np.stack([np.bincount(pixels[..., c].ravel(), minlength=256) for c in range(pixels.shape[-1])])

    counts = sum_over_chunks(histograms, images, positions)  # (C, 256)
    values = np.arange(256)
    mean = counts @ values / counts.sum(axis=1)
    variance = counts @ values**2 / counts.sum(axis=1) - mean**2
    return mean.astype("float32"), np.sqrt(np.maximum(variance, 0)).astype("float32")

"""Data sets, and their fixed split into examples to train on, to validate with and to test with."""

import contextlib
from typing import NamedTuple

import numpy as np

from Model.geometries import GEOMETRIES
from Training.errors import InputError, RunError, format_path
from Training.recipe import find_dataset, is_streamed
from Training.recipe.choices import load_object

SPLIT_SEED = 0  # of the held-out images: the same for every run, so that runs compare
NOISE_SEED = 1
LONGEST_NAME = 60  # letters of a class name in a message
MEASURED = 256  # training images over which the mean of a channel is taken
# ImageNet's mean and standard deviation of red, green and blue, as everyone takes them.
IMAGENET = (np.float32([0.485, 0.456, 0.406]) * 255, np.float32([0.229, 0.224, 0.225]) * 255)
CROP_MARGIN = 256 / 224  # where training crops at random: size that a picture is scaled to over the size of its middle


class Examples(NamedTuple):
    """Images uint8 `(n, height, width, channels)`, an array or a `stream.Stream`, and labels int32 `(n,)`."""

    images: np.ndarray
    labels: np.ndarray


class Data(NamedTuple):
    """A data set, split: what is trained on, held out, and tested once at the end."""

    train: Examples
    validation: Examples
    test: Examples
    classes: tuple[str, ...]
    held_out: np.ndarray  # positions of the validation images in the official training set
    identity: str = ""  # of streamed pictures: changes when a file is added, removed or changes its size

    @property
    def mean(self):
        """Per-pixel mean of the training images, float32 `(height, width, channels)`."""
        return self.mean_and_std("pixel")[0]

    def mean_and_std(self, kind):
        """What is subtracted from raw images, and what they are divided by.

        Args:
            kind: "pixel" is the mean of each pixel and channel over all training images, and 255; "channel" the mean
                and the standard deviation of each channel over at most 256 training images, spread evenly;
                "imagenet" ImageNet's own; "auto" "pixel" for images in memory and "channel" for streamed ones.

        Returns:
            Mean float32 `(height, width, channels)` or `(channels,)`; 255.0, or the deviation `(channels,)`.
        """
        from Training.data.stream import compute_channel_statistics, compute_mean_image

        images, count = self.train.images, len(self.train.labels)
        if kind == "imagenet":
            return IMAGENET
        if kind == "pixel" or (kind == "auto" and isinstance(images, np.ndarray)):
            return compute_mean_image(images), 255.0
        mean, std = compute_channel_statistics(images, spread_evenly(count, MEASURED))
        return mean, np.maximum(std, 1.0)

    @contextlib.contextmanager
    def reading(self):
        """Tell in one line, as a `RunError`, when streamed pictures vanish: frameworks bury what a reader raises."""
        try:
            yield
        except Exception:
            failures = [f for part in self[:3] if (f := getattr(part.images, "failure", None))]
            if failures:
                raise RunError(failures[0]) from None
            raise

    @property
    def broken(self):
        """How many streamed pictures could not be decoded so far; the next of its class took the place of each."""
        found = [getattr(part.images, "broken", set()) for part in self[:3]]
        return sum(len(each) for each in {id(each): each for each in found}.values())

    def refuse_batch(self, batch_size):
        """Raise `InputError` where the training images do not fill one batch."""
        count = len(self.train.labels)
        if batch_size > count:
            raise InputError(f"batch_size={batch_size} needs as many images to train on, received {count}")


def read_digits(name="digits", data_dir=""):
    """scikit-learn's handwritten digits: 1,797 real images of 8x8, enlarged to 32x32 in three channels."""
    from sklearn.datasets import load_digits

    source = load_digits()
    pixels = np.kron(source.images, np.ones((1, 4, 4))) * (255 / 16)
    images = np.repeat(pixels[..., None], 3, axis=-1).round().astype("uint8")  # (1797, 32, 32, 3)
    labels = source.target.astype("int32")
    rest, test = _split_stratified(labels, 360)
    return images[rest], labels[rest], images[test], labels[test], tuple(str(n) for n in source.target_names)


def load_photographs(size=32):
    """Four squares of the two photographs that come with scikit-learn, to show where a data set's images may not be.

    By danielbuechele (a temple) and vultilion (a flower), both CC BY 2.0.

    Returns:
        uint8 `(4, size, size, 3)`.
    """
    from PIL import Image
    from sklearn.datasets import load_sample_image

    squares = (("china", (106, 0, 533, 427)), ("china", (200, 20, 440, 260)),
               ("flower", (140, 0, 567, 427)), ("flower", (230, 60, 470, 300)))  # fmt: skip
    images = [Image.fromarray(load_sample_image(f"{name}.jpg")).crop(box) for name, box in squares]
    return np.stack([np.asarray(each.resize((size, size), Image.Resampling.LANCZOS)) for each in images])


def _split_stratified(labels, count):
    """Positions of the others and of `count` examples, with the same share of each class, both sorted."""
    from sklearn.model_selection import train_test_split

    positions = np.arange(len(labels))
    if count == 0:
        return positions, positions[:0]
    try:
        rest, chosen = train_test_split(positions, test_size=count, stratify=labels, random_state=SPLIT_SEED)
    except ValueError as error:
        raise InputError(f"{count} of {len(labels)} images cannot be split off by class: {error}") from None
    return np.sort(rest), np.sort(chosen)


def add_label_noise(labels, classes, share):
    """Labels of which a `share`, drawn at random, is replaced by one of the other classes, each as likely.

    The confusion matrix of Wang et al. 2017, section 4.1: r = 1 - share on its diagonal, (1 - r) / (classes - 1)
    beside it. Every run draws the same, so that networks compare.

    Args:
        labels: int32 `(n,)`.
        classes: int.
        share: float in [0, 1].
    """
    if not share:
        return labels
    draw = np.random.default_rng(NOISE_SEED)
    replaced = draw.random(len(labels)) < share
    other = (labels + draw.integers(1, classes, len(labels))) % classes
    return np.where(replaced, other, labels).astype(labels.dtype)


def spread_evenly(count, limit):
    """Positions of all of `count` examples, or of `limit` spread evenly over them."""
    return np.linspace(0, count - 1, min(count, limit)).astype("int64")


def load(name, data_dir="", validation_split=0.1, samples=0, label_noise=0.0, **reading):
    """Read a data set and hold out a fixed, stratified part of its training set.

    Args:
        name: "cifar10", "cifar100", "digits"; "folder", "shards" or "tfds:NAME", whose pictures are streamed.
        data_dir: see `archives.read`, `folder.read`, `shards.read` and `tfds.read`; not used for the digits.
        validation_split: share of the training set that is held out; 0 holds out nothing.
        samples: limit of images trained on, the same share of each class; 0 is no limit.
        label_noise: share of the labels trained on that `add_label_noise` replaces; those held out and tested stay.
        reading: of streamed pictures alone, see `load_streamed`.

    Raises:
        InputError: the data cannot be had or is not what it should be, or the split leaves a class empty.
    """
    row = find_dataset(name)
    if row.streamed:
        return load_streamed(name, data_dir, validation_split, samples, label_noise, **reading)
    images, labels, test_images, test_labels, classes = load_object(row.reader)(name, data_dir)
    kept, held_out = _split(labels, validation_split, samples)
    return Data(
        train=Examples(images[kept], add_label_noise(labels[kept], len(classes), label_noise)),
        validation=Examples(images[held_out], labels[held_out]),
        test=Examples(test_images, test_labels),
        classes=classes,
        held_out=held_out,
    )


def load_for_recipe(recipe):
    """The data of a run, as its recipe reads it.

    Raises:
        InputError: see `load`.
    """
    what = (recipe.dataset, recipe.data_dir, recipe.validation_split, recipe.samples, recipe.label_noise)
    if not is_streamed(recipe.dataset):
        return load(*what)
    return load(
        *what,
        size=recipe.image_size or GEOMETRIES[recipe.geometry].pixels,
        random_crops=recipe.random_crops,
        broken=recipe.broken,
        cache=recipe.cache,
        workers=recipe.workers,
    )


def _split(labels, validation_split, samples):
    """Positions of what is trained on and of what is held out."""
    kept, held_out = _split_stratified(labels, round(validation_split * len(labels)))
    if samples and samples < len(kept):
        if len(kept) - samples < len(np.unique(labels)):  # left out are too few for one of each class: any will do
            chosen = np.sort(np.random.default_rng(SPLIT_SEED).permutation(len(kept))[:samples])
        else:
            _, chosen = _split_stratified(labels[kept], samples)
        kept = kept[chosen]
    return kept, held_out


def load_streamed(
    name,
    data_dir,
    validation_split,
    samples,
    label_noise,
    *,
    size=224,
    random_crops=False,
    broken="skip",
    cache="",
    workers=0,
):
    """A data set whose pictures are decoded when they are asked for.

    The validation set is the source's own, or else held out of its training set. Where there is no test set, the
    validation set plays it.

    Args:
        size: int, height and width to which pictures are scaled and cut.
        random_crops: bool, whether training cuts random parts (`Stream.crops`); others are then scaled to 256 / 224
            of the size first.
        broken: see `folder.listing`.
        cache: folder that keeps what is decoded (see `Stream.cache_in`), but for random crops; "" keeps nothing.
        workers: see `Stream`.

    Raises:
        InputError: see `load`; or there are fewer than two classes, or neither a test set nor a validation set.
    """
    from Training.data.listing import digest
    from Training.data.stream import Stream

    parts, classes = load_object(find_dataset(name).reader)(name, data_dir, broken)
    if len(classes) < 2:
        raise InputError(f"dataset={name} must have two classes or more, it has {len(classes)}")
    streams = {
        part: Stream(listing, size, CROP_MARGIN if random_crops else 1.0, workers) for part, listing in parts.items()
    }
    whole = streams["train"]
    kept, held_out = _split(whole.labels, 0 if "val" in parts else validation_split, samples)
    train = whole.take(kept)
    validation = streams.get("val") or whole.take(held_out)
    test = streams.get("test") or validation
    if not len(test):
        raise InputError(f"{name} has no test pictures: add test/ or val/, or give a --validation-split above 0")
    for stream in {id(each): each for each in (validation, test, *(() if random_crops else (train,)))}.values():
        if cache and len(stream):
            stream.cache_in(cache)
    examples = Examples(train, add_label_noise(train.labels, len(classes), label_noise))
    others = (Examples(stream, stream.labels) for stream in (validation, test))
    return Data(examples, *others, classes, held_out, digest(repr([part.identity for part in parts.values()]).encode()))


def _shorten_name(name):
    name = format_path(name)
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 3]}..."


def describe_streams(data):
    """What a person should know of streamed data, in a line or two: sizes, balance, and which set plays which."""
    counts = np.bincount(data.train.labels, minlength=len(data.classes))
    few, many = counts.argmin(), counts.argmax()
    smallest, largest = (_shorten_name(data.classes[i]) for i in (few, many))
    lines = [
        f"{len(data.classes):,} classes; smallest {smallest} with {counts[few]:,} training pictures, "
        f"largest {largest} with {counts[many]:,} ({counts[many] / counts[few]:.1f} times as many)"
    ]
    if data.test.images is data.validation.images:
        lines.append(f"no test set: the validation set, {len(data.test.labels):,} pictures, plays it")
    return lines

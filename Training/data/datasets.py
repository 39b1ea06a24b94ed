"""Reads data sets and splits them into training, validation and test examples."""

import contextlib
from typing import NamedTuple

import numpy as np

from Model.geometries import GEOMETRIES
from Training.console import format_count
from Training.errors import InputError, RunError, format_path
from Training.recipe import find_dataset, is_streamed
from Training.recipe.choices import load_object

SPLIT_SEED = 0  # draws the validation images: the same ones for every run, so that runs can be compared
NOISE_SEED = 1
LONGEST_NAME = 60  # characters of a class name in a message
MEASURED = 256  # training images over which channel statistics are computed
# ImageNet's usual mean and standard deviation of red, green and blue.
IMAGENET = (np.float32([0.485, 0.456, 0.406]) * 255, np.float32([0.229, 0.224, 0.225]) * 255)
CROP_MARGIN = 256 / 224  # with random crops in training, other pictures are scaled to this multiple of the center crop


class Examples(NamedTuple):
    """Images uint8 `(n, height, width, channels)`, an array or a `stream.Stream`, and labels int32 `(n,)`."""

    images: np.ndarray
    labels: np.ndarray


class Data(NamedTuple):
    """A data set, split into training, validation and test examples."""

    train: Examples
    validation: Examples
    test: Examples
    classes: tuple[str, ...]
    held_out: np.ndarray  # positions of the validation images in the official training set
    identity: str = ""  # for streamed pictures: changes if a file is added, removed or resized

    @property
    def mean(self):
        """The mean of each pixel over the training images, float32 `(height, width, channels)`."""
        return self.mean_and_std("pixel")[0]

    def mean_and_std(self, kind):
        """Return the mean that is subtracted from raw images, and the number or deviation that divides them.

        Args:
            kind: str. "pixel": the mean of each pixel and channel over all training images, and 255. "channel": the
                mean and standard deviation of each channel over at most 256 evenly spaced training images.
                "imagenet": those of ImageNet. "auto": "pixel" for images in memory, "channel" for streamed ones.

        Returns:
            The mean, float32 `(height, width, channels)` or `(channels,)`, and 255.0 or the deviation `(channels,)`.
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
        """Raise a one-line `RunError` if streamed pictures vanish: frameworks hide the exceptions of a reader."""
        try:
            yield
        except Exception:
            failures = [f for part in self[:3] if (f := getattr(part.images, "failure", None))]
            if failures:
                raise RunError(failures[0]) from None
            raise

    @property
    def broken(self):
        """The number of streamed pictures that could not be decoded so far, and were replaced by others."""
        found = [getattr(part.images, "broken", set()) for part in self[:3]]
        return sum(len(each) for each in {id(each): each for each in found}.values())

    def refuse_batch(self, batch_size):
        """Raise `InputError` if the training images do not fill one batch."""
        count = len(self.train.labels)
        if batch_size > count:
            raise InputError(f"batch_size={batch_size} needs at least as many training images, received {count}")


def read_digits(name="digits", data_dir=""):
    """Read scikit-learn's handwritten digits: 1,797 images of 8x8 pixels, enlarged to 32x32 with three channels."""
    from sklearn.datasets import load_digits

    source = load_digits()
    pixels = np.kron(source.images, np.ones((1, 4, 4))) * (255 / 16)
    images = np.repeat(pixels[..., None], 3, axis=-1).round().astype("uint8")  # (1797, 32, 32, 3)
    labels = source.target.astype("int32")
    rest, test = _split_stratified(labels, 360)
    return images[rest], labels[rest], images[test], labels[test], tuple(str(n) for n in source.target_names)


def load_photographs(height=32, width=None):
    """Return four squares of the two photographs that come with scikit-learn, which may be published.

    The photographs are by danielbuechele (a temple) and vultilion (a flower), both CC BY 2.0.

    Args:
        height, width: int, pixels; None is the height.

    Returns:
        uint8 `(4, height, height, 3)`.

    Raises:
        InputError: height and width differ.
    """
    if width not in (None, height):
        raise InputError(f"the photographs are squares, but the network takes images of {height}x{width}")
    from PIL import Image
    from sklearn.datasets import load_sample_image

    squares = (("china", (106, 0, 533, 427)), ("china", (200, 20, 440, 260)),
               ("flower", (140, 0, 567, 427)), ("flower", (230, 60, 470, 300)))  # fmt: skip
    images = [Image.fromarray(load_sample_image(f"{name}.jpg")).crop(box) for name, box in squares]
    return np.stack([np.asarray(each.resize((height, height), Image.Resampling.LANCZOS)) for each in images])


def _split_stratified(labels, count):
    """Split off `count` examples with the same share of each class; return sorted positions of the rest and of them."""
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
    """Return labels of which a random `share` is replaced by one of the other classes, each with equal probability.

    This is the confusion matrix of Wang et al. 2017, section 4.1: r = 1 - share on the diagonal, and
    (1 - r) / (classes - 1) elsewhere. All runs draw the same labels, so that networks can be compared.

    Args:
        labels: int32 `(n,)`.
        classes: int, number of classes.
        share: float in [0, 1].
    """
    if not share:
        return labels
    draw = np.random.default_rng(NOISE_SEED)
    replaced = draw.random(len(labels)) < share
    other = (labels + draw.integers(1, classes, len(labels))) % classes
    return np.where(replaced, other, labels).astype(labels.dtype)


def spread_evenly(count, limit):
    """Return the positions of all of `count` examples, or of `limit` evenly spaced ones."""
    return np.linspace(0, count - 1, min(count, limit)).astype("int64")


def load(name, data_dir="", validation_split=0.1, samples=0, label_noise=0.0, eval_samples=0, **reading):
    """Read a data set and hold out a fixed, stratified part of its training set.

    Args:
        name: "cifar10", "cifar100", "digits"; "folder", "shards" or "tfds:NAME", whose pictures are streamed.
        data_dir: see `archives.read`, `folder.read`, `shards.read` and `tfds.read`; not used for the digits.
        validation_split: float, share of the training set that is held out; 0 for none.
        samples: int, limit of training images, with the same share of each class; 0 for no limit.
        label_noise: float, share of the training labels that `add_label_noise` replaces; validation and test labels
            are kept.
        eval_samples: int, limit of validation images and of test images, with the same share of each class; 0 for no
            limit. The other images are not used.
        reading: arguments for streamed pictures only, see `load_streamed`.

    Raises:
        InputError: the data cannot be read or is invalid, or the split leaves a class empty.
    """
    row = find_dataset(name)
    if row.streamed:
        return load_streamed(name, data_dir, validation_split, samples, label_noise, eval_samples, **reading)
    images, labels, test_images, test_labels, classes = load_object(row.reader)(name, data_dir)
    kept, held_out = _split(labels, validation_split, samples)
    held_out = held_out[_limit_stratified(labels[held_out], eval_samples)]
    tested = _limit_stratified(test_labels, eval_samples)
    _refuse_empty_classes(labels[kept], classes)
    return Data(
        train=Examples(images[kept], add_label_noise(labels[kept], len(classes), label_noise)),
        validation=Examples(images[held_out], labels[held_out]),
        test=Examples(test_images[tested], test_labels[tested]),
        classes=classes,
        held_out=held_out,
    )


def load_for_recipe(recipe):
    """Read the data of a run as its recipe says.

    Raises:
        InputError: see `load`.
    """
    what = dict(
        validation_split=recipe.validation_split,
        samples=recipe.samples,
        label_noise=recipe.label_noise,
        eval_samples=recipe.eval_samples,
    )
    if not is_streamed(recipe.dataset):
        return load(recipe.dataset, recipe.data_dir, **what)
    return load(
        recipe.dataset,
        recipe.data_dir,
        **what,
        size=recipe.image_size or GEOMETRIES[recipe.geometry].pixels,
        random_crops=recipe.random_crops,
        broken=recipe.broken,
        cache=recipe.cache,
        workers=recipe.workers,
    )


def _split(labels, validation_split, samples):
    """Return the positions of the training and of the validation images."""
    kept, held_out = _split_stratified(labels, round(validation_split * len(labels)))
    return kept[_limit_stratified(labels[kept], samples)], held_out


def _limit_stratified(labels, limit):
    """Return the sorted positions of all examples, or of `limit` of them with the same share of each class."""
    count = len(labels)
    if not limit or limit >= count:
        return np.arange(count)
    if count - limit < len(np.unique(labels)):  # too few are left out to have one of each class
        return np.sort(np.random.default_rng(SPLIT_SEED).permutation(count)[:limit])
    return _split_stratified(labels, limit)[1]


def _refuse_empty_classes(labels, classes):
    """Raise `InputError` if the training images lack a class; a stratified split can leave none of a rare one."""
    empty = np.flatnonzero(np.bincount(labels, minlength=len(classes)) == 0)
    if len(empty):
        raise InputError(
            f"no training image of {_shorten_name(classes[empty[0]])} is left, and {len(empty)} of {len(classes)} "
            "classes have none: give more --samples, or a smaller --validation-split"
        )


def load_streamed(
    name,
    data_dir,
    validation_split,
    samples,
    label_noise,
    eval_samples=0,
    *,
    size=224,
    random_crops=False,
    broken="skip",
    cache="",
    workers=0,
):
    """Read a data set whose pictures are decoded on demand.

    The validation set is the one of the source, or else is held out of its training set. Without a test set, the
    validation set is also used for testing.

    Args:
        size: int, height and width in pixels to which pictures are scaled and cropped.
        random_crops: bool, whether training uses random crops (see `Stream.crop_randomly`). All other pictures are then
            scaled to 256 / 224 of the size before their center is cropped.
        broken: see `folder.list_part`.
        cache: folder in which decoded pictures are kept (see `Stream.cache_in`), except random crops; "" for none.
        workers: see `Stream`.

    Raises:
        InputError: see `load`; or there are fewer than two classes, or neither a test set nor a validation set.
    """
    from Training.data.listing import digest
    from Training.data.stream import Stream

    parts, classes = load_object(find_dataset(name).reader)(name, data_dir, broken)
    if len(classes) < 2:
        raise InputError(f"dataset={name} must have two classes or more, but has {len(classes)}")
    streams = {
        part: Stream(listing, size, CROP_MARGIN if random_crops else 1.0, workers) for part, listing in parts.items()
    }
    whole = streams["train"]
    kept, held_out = _split(whole.labels, 0 if "val" in parts else validation_split, samples)
    train = whole.split(kept)
    _refuse_empty_classes(train.labels, classes)
    if "val" not in parts:
        streams["val"] = whole.split(held_out)
    limited = {
        part: _limit_stratified(stream.labels, eval_samples) for part, stream in streams.items() if part != "train"
    }
    if "val" not in parts:
        held_out = held_out[limited["val"]]
    validation = streams["val"].split(limited["val"])
    test = streams["test"].split(limited["test"]) if "test" in streams else validation
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
    """Return one or two lines about streamed data: number of classes, balance, and a missing test set."""
    counts = np.bincount(data.train.labels, minlength=len(data.classes))
    few, many = counts.argmin(), counts.argmax()
    smallest, largest = (_shorten_name(data.classes[i]) for i in (few, many))
    lines = [
        f"{len(data.classes):,} classes; smallest {smallest} with {format_count(counts[few], 'training picture')}, "
        f"largest {largest} with {counts[many]:,} ({counts[many] / counts[few]:.1f} times as many)"
    ]
    if data.test.images is data.validation.images:
        tested = format_count(len(data.test.labels), "picture")
        lines.append(f"no test set: the validation set ({tested}) is also used for testing")
    return lines

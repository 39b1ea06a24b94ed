"""Augmentation layers that run inside the compiled training step.

Keras' own random layers cannot be compiled by XLA on TensorFlow, or are slow on JAX. These layers can be compiled on
both. They take raw images of any dtype; outside training, they only change the dtype.
"""

import math

import keras
import numpy as np
from keras import layers, ops

from Module.replicas import draw
from Training.recipe.choices import AUGMENTATIONS, load_object

# Eigenvalues and eigenvectors (as columns) of the covariance of ImageNet's colours, for pixels from 0 to 1.
COLOUR_EIGENVALUES = np.float32([0.2175, 0.0188, 0.0045])
COLOUR_COMPONENTS = np.float32(
    [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]],
)


class Augmentation(layers.Layer):
    """Base class of augmentation layers: `augment` changes images in training; otherwise only the dtype changes.

    Random numbers come from a seed generator whose state is saved with the weights, so that a resumed run draws the
    same numbers. `augment` always computes in float32.

    Args:
        seed: int.
        dtype: dtype or policy of the output, float32 by default.
        trainable: bool; there are no trainable weights.
    """

    def __init__(self, seed=0, *, dtype="float32", trainable=False, **kwargs):
        super().__init__(dtype=dtype, trainable=trainable, **kwargs)
        self.seed = seed
        self.seed_generator = keras.random.SeedGenerator(seed)

    def call(self, images, training=None):
        if not training:
            return ops.cast(images, self.compute_dtype)
        return ops.cast(self.augment(ops.cast(images, "float32")), self.compute_dtype)

    def augment(self, images):
        """Return augmented images of the same shape; `images` is float32 `(batch, height, width, channels)`."""
        raise NotImplementedError(f"{type(self).__name__} must implement augment(images)")

    def compute_output_shape(self, input_shape):
        return tuple(input_shape)

    def uniform(self, images, low, high):
        """Draw one number per image, uniform in [low, high)."""
        return draw(keras.random.uniform, (ops.shape(images)[0],), low, high, seed=self.seed_generator)

    def get_config(self):
        return {**super().get_config(), "seed": self.seed}


def _draw_mirrors(drawn, flip):
    """Return -1 for half of the images and 1 for the others; 1 for all without `flip`."""
    return ops.where(drawn < 0.5, -1.0, 1.0) if flip else ops.ones_like(drawn)


@keras.saving.register_keras_serializable(package="ResidualAttention")
class RandomAffine(Augmentation):
    """Rotation about the centre, shift, and horizontal flip, as one bilinear resampling.

    Output pixel `o` has the value of the image at `c + F R(a) (o - c) + s`: centre `c`, angle `a` uniform in
    +-`rotation` degrees, `s` uniform in +-`shift` of height and width; `F` mirrors half of the images. Pixels at the
    border are repeated outwards. Source: the augmentation of the reference re-implementation.

    Args:
        rotation: float, degrees.
        shift: float, share of height and width.
        flip: bool.
        seed: int.

    Input shape:  `(batch, height, width, channels)`, pixels 0 to 255.
    Output shape: the same, float32.
    """

    def __init__(self, rotation=15.0, shift=0.1, flip=True, seed=0, **kwargs):
        super().__init__(seed, **kwargs)
        self.rotation = rotation
        self.shift = shift
        self.flip = flip

    def augment(self, images):
        height, width = images.shape[1:3]
        angle = self.uniform(images, -1.0, 1.0) * math.radians(self.rotation)
        down = self.uniform(images, -1.0, 1.0) * (self.shift * height)
        right = self.uniform(images, -1.0, 1.0) * (self.shift * width)
        mirror = _draw_mirrors(self.uniform(images, 0.0, 1.0), self.flip)
        cos, sin, down, right, mirror = (
            ops.reshape(v, (-1, 1)) for v in (ops.cos(angle), ops.sin(angle), down, right, mirror)
        )
        grid = np.mgrid[:height, :width].reshape(2, 1, height * width).astype("float32")
        centre_y, centre_x = (height - 1) / 2, (width - 1) / 2
        y, x = grid[0] - centre_y, grid[1] - centre_x  # (1, H * W)
        source_y = sin * x + cos * y + down + centre_y  # (B, H * W)
        source_x = mirror * (cos * x - sin * y) + right + centre_x
        return _bilinear(images, source_y, source_x)

    def get_config(self):
        own = {"rotation": self.rotation, "shift": self.shift, "flip": self.flip}
        return {**super().get_config(), **own}


def _bilinear(images, y, x):
    """Return the images' values at `(y, x)`, both `(B, H * W)` in pixels; the border is repeated outwards."""
    _, height, width, channels = images.shape
    pixels = ops.reshape(images, (-1, channels))  # (B * H * W, C): one flat take is fast everywhere
    start = ops.expand_dims(ops.arange(ops.shape(images)[0], dtype="int32") * (height * width), 1)
    y, x = ops.clip(y, 0.0, height - 1.0), ops.clip(x, 0.0, width - 1.0)
    top, left = ops.floor(y), ops.floor(x)
    wy, wx = ops.expand_dims(y - top, -1), ops.expand_dims(x - left, -1)
    top, left = ops.cast(top, "int32"), ops.cast(left, "int32")
    bottom, right = ops.minimum(top + 1, height - 1), ops.minimum(left + 1, width - 1)

    def take(row, column):
        return ops.take(pixels, start + row * width + column, axis=0)  # (B, H * W, C)

    upper = take(top, left) * (1 - wx) + take(top, right) * wx
    lower = take(bottom, left) * (1 - wx) + take(bottom, right) * wx
    return ops.reshape(upper * (1 - wy) + lower * wy, (-1, height, width, channels))


@keras.saving.register_keras_serializable(package="ResidualAttention")
class RandomCrop(Augmentation):
    """Padding with zeros, a random crop of the original size, and a horizontal flip of half of the images.

    Source: Wang et al. 2017, https://arxiv.org/abs/1704.06904, section 4.1 (4 pixels).

    Args:
        padding: int, pixels on each side.
        flip: bool.
        seed: int.

    Input shape:  `(batch, height, width, channels)`, pixels 0 to 255.
    Output shape: the same, float32.
    """

    def __init__(self, padding=4, flip=True, seed=0, **kwargs):
        super().__init__(seed, **kwargs)
        self.padding = padding
        self.flip = flip

    def augment(self, images):
        height, width = images.shape[1:3]
        pad = self.padding
        top = self._offset(images)
        left = self._offset(images)
        mirror = ops.reshape(_draw_mirrors(self.uniform(images, 0.0, 1.0), self.flip), (-1, 1))
        columns = ops.arange(width, dtype="int32")[None]
        columns = ops.where(mirror < 0, width - 1 - columns, columns)  # the flip needs no further pass
        rows = top + ops.arange(height, dtype="int32")[None]  # (B, H)
        padded = ops.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        cropped = ops.take_along_axis(padded, rows[:, :, None, None], axis=1)
        return ops.take_along_axis(cropped, (left + columns)[:, None, :, None], axis=2)

    def _offset(self, images):
        drawn = self.uniform(images, 0.0, 2 * self.padding + 1.0)
        return ops.reshape(ops.cast(ops.floor(drawn), "int32"), (-1, 1))

    def get_config(self):
        return {**super().get_config(), "padding": self.padding, "flip": self.flip}


@keras.saving.register_keras_serializable(package="ResidualAttention")
class RandomLighting(Augmentation):
    """Adds `255 P (a * l)` to all pixels of an image, and flips half of the images.

    `P` and `l` are eigenvectors and eigenvalues of ImageNet's colours; `a` are three normal numbers per image with
    standard deviation 0.1. Source: Krizhevsky et al. 2012, section 4.1; Wang et al. 2017, section 4.2, mention the
    standard colour augmentation. Crops of random scale and aspect ratio are cut when the pictures are decoded.

    Args:
        flip: bool.
        seed: int.

    Input shape:  `(batch, height, width, 3)`, pixels 0 to 255.
    Output shape: the same, float32.
    """

    def __init__(self, flip=True, seed=0, **kwargs):
        super().__init__(seed, **kwargs)
        self.flip = flip

    def augment(self, images):
        drawn = draw(keras.random.normal, (ops.shape(images)[0], 3), 0.0, 0.1, seed=self.seed_generator)
        colour = ops.matmul(drawn * (255 * COLOUR_EIGENVALUES), COLOUR_COMPONENTS.T)  # (B, 3)
        mirror = ops.reshape(_draw_mirrors(self.uniform(images, 0.0, 1.0), self.flip), (-1, 1, 1, 1))
        return ops.where(mirror < 0, ops.flip(images, axis=2), images) + ops.reshape(colour, (-1, 1, 1, 3))

    def get_config(self):
        return {**super().get_config(), "flip": self.flip}


def _windows(images, down, right, height, width):
    """Return masks with 1 inside a window of each image and 0 outside, `(batch, h, w, 1)`, clipped at the border.

    Args:
        images: `(batch, h, w, channels)`.
        down, right: centres, `(batch,)`, in pixels.
        height, width: sides, `(batch,)` or numbers, in pixels.
    """

    def inside(side, centre, length):
        start = ops.reshape(ops.floor(centre - length / 2 + 0.5), (-1, 1))
        at = ops.arange(side, dtype="float32")[None]
        return ops.cast((at >= start) & (at < start + ops.reshape(ops.round(length), (-1, 1))), "float32")

    rows, columns = inside(images.shape[1], down, height), inside(images.shape[2], right, width)
    return rows[:, :, None, None] * columns[:, None, :, None]


@keras.saving.register_keras_serializable(package="ResidualAttention")
class Cutout(Augmentation):
    """Replaces a square in each image by a constant; its centre is anywhere in the image.

    Source: DeVries and Taylor 2017, https://arxiv.org/abs/1708.04552, section 3.

    Args:
        size: int, side of the square in pixels.
        fill: float, value of the pixels in the square, such as the mean of the data.
        seed: int.

    Input shape:  `(batch, height, width, channels)`, pixels 0 to 255.
    Output shape: the same, float32.
    """

    def __init__(self, size, fill=0.0, seed=0, **kwargs):
        super().__init__(seed, **kwargs)
        self.size = size
        self.fill = fill

    def augment(self, images):
        height, width = images.shape[1:3]
        side = ops.full((1,), float(self.size))
        down, right = self.uniform(images, 0.0, height), self.uniform(images, 0.0, width)
        return ops.where(_windows(images, ops.floor(down), ops.floor(right), side, side) > 0, self.fill, images)

    def get_config(self):
        return {**super().get_config(), "size": self.size, "fill": self.fill}


@keras.saving.register_keras_serializable(package="ResidualAttention")
class Mix(Augmentation):
    """Mixes each image with the previous one in the batch; returns the images and the share of each in its mixture.

    - mixup: `s x + (1 - s) x'`, Zhang et al. 2018, https://arxiv.org/abs/1710.09412, equation 1;
    - cutmix: a window of about `1 - s` of the area is copied from `x'`, Yun et al. 2019,
      https://arxiv.org/abs/1905.04899, section 3.1; `s` is then the share of the area that is left of `x`.

    `s` is uniform in [0, 1) and drawn for each image, like the Beta(1, 1) of both papers on CIFAR.

    Args:
        kind: "mixup" or "cutmix".
        seed: int.
        until: float, share of the epochs in which images are mixed. If it is below 1, the layer counts its training
            steps and mixes in the first `last` of them, see `set_last`.

    Input shape:  `(batch, height, width, channels)`, pixels 0 to 255.
    Output shape: a pair: images of the same shape; shares, float32 `(batch,)`, 1 outside training.
    """

    def __init__(self, kind, seed=0, until=1.0, **kwargs):
        super().__init__(seed, **kwargs)
        self.kind = kind
        self.until = until
        if until < 1:
            how = {"dtype": "int32", "trainable": False, "aggregation": "only_first_replica"}
            self.step = self.add_weight(shape=(), initializer="zeros", name="step", **how)
            self.last = self.add_weight(shape=(), initializer="zeros", name="last", **how)

    def set_last(self, epochs, steps_per_epoch):
        """Mix images in the first `until * epochs` epochs, rounded to a whole number."""
        if self.until < 1:
            self.last.assign(round(self.until * epochs) * steps_per_epoch)

    def call(self, images, training=None):
        shares = ops.ones((ops.shape(images)[0],), dtype="float32")
        images = ops.cast(images, "float32")
        if training:
            images, shares = self.augment(images)
        return ops.cast(images, self.compute_dtype), shares

    def compute_output_shape(self, input_shape):
        return tuple(input_shape), (input_shape[0],)

    def compute_output_spec(self, images, training=None):
        shares = keras.KerasTensor((images.shape[0],), dtype="float32")
        return keras.KerasTensor(images.shape, dtype=self.compute_dtype), shares

    def augment(self, images):
        share = self.uniform(images, 0.0, 1.0)
        other = ops.roll(images, 1, axis=0)
        if self.kind == "mixup":
            own = ops.reshape(self._end(share), (-1, 1, 1, 1))
            share = own[:, 0, 0, 0]
        else:
            height, width = images.shape[1:3]
            side = ops.sqrt(1 - share)
            down, right = self.uniform(images, 0.0, height), self.uniform(images, 0.0, width)
            window = _windows(images, ops.floor(down), ops.floor(right), side * height, side * width)
            own = self._end(1 - window)
            share = ops.mean(own, axis=(1, 2, 3))
        return own * images + (1 - own) * other, share

    def _end(self, own):
        """Return `own`, or ones after the last step in which images are mixed."""
        if self.until == 1:
            return own
        mixes = self.step < self.last
        self.step.assign(self.step + 1)
        return ops.where(mixes, own, ops.ones_like(own))

    def get_config(self):
        return {**super().get_config(), "kind": self.kind, "until": self.until}


def make_augmentations(kind, recipe, flip, fill):
    """Make the layers of a recipe's augmentation; `Mix`, which returns a pair, is the last one.

    Args:
        kind: str, a name in `choices.AUGMENTATIONS`.
        recipe: `recipe.Recipe`, whose fields are the arguments of the layers.
        flip: bool, whether the layer mirrors images at random.
        fill: float, value of the pixels that cutout replaces.

    Returns:
        A list of layers.
    """
    chosen, row = [], AUGMENTATIONS[kind]
    if row.layer:
        given = {name: flip if name == "flip" else getattr(recipe, name) for name in row.fields}
        chosen.append(load_object(row.layer)(**given, seed=recipe.seed, name="augmentation"))
    if recipe.cutout:
        chosen.append(Cutout(recipe.cutout, fill, recipe.seed + 1, name="cutout"))
    if recipe.mix != "none":
        chosen.append(Mix(recipe.mix, recipe.seed + 2, recipe.mix_until, name="mix"))
    return chosen

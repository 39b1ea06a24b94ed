"""Random changes of training images, made in the compiled step, on the device that trains.

Keras' own random layers cannot be compiled by XLA on TensorFlow, or are slow on JAX; these compile on both. They
take raw images of any dtype, give float32, and change nothing outside training.
"""

import math

import keras
import numpy as np
from keras import layers, ops


class _Augmentation(layers.Layer):
    """Draws from its own seed, whose state is saved with the weights, so that a resumed run goes on exactly."""

    def __init__(self, seed=0, **kwargs):
        super().__init__(dtype="float32", trainable=False, **kwargs)
        self.seed = seed
        self.seed_generator = keras.random.SeedGenerator(seed)

    def call(self, images, training=None):
        images = ops.cast(images, self.compute_dtype)
        return self.augment(images) if training else images

    def compute_output_shape(self, input_shape):
        return input_shape

    def uniform(self, images, low, high):
        """One number an image, uniform in [low, high)."""
        return keras.random.uniform((ops.shape(images)[0],), low, high, seed=self.seed_generator)

    def get_config(self):
        config = super().get_config()
        return {"name": config["name"], "seed": self.seed}


def _mirrored(drawn, flip):
    """-1 for half of the images, 1 for the others; 1 for all without `flip`."""
    return ops.where(drawn < 0.5, -1.0, 1.0) if flip else ops.ones_like(drawn)


@keras.saving.register_keras_serializable(package="ResidualAttention")
class RandomAffine(_Augmentation):
    """Rotation about the centre, shift, and horizontal flip, as one bilinear resampling.

    Output pixel `o` takes the value at `c + F R(a) (o - c) + s`: centre `c`, angle `a` uniform in +-`rotation`
    degrees, `s` uniform in +-`shift` of height and width, `F` mirrors half of the images. Beyond the border the
    nearest pixel is repeated. Source: the augmentation of the reference re-implementation.

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
        mirror = _mirrored(self.uniform(images, 0.0, 1.0), self.flip)
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
    """The images' values at `(y, x)`, both `(B, H * W)` in pixels; the border is repeated outwards."""
    _, height, width, channels = images.shape
    pixels = ops.reshape(images, (-1, channels))  # (B * H * W, C): one flat take is fast everywhere
    start = ops.expand_dims(ops.arange(ops.shape(images)[0], dtype="int32") * (height * width), 1)
    y, x = ops.clip(y, 0.0, height - 1.0), ops.clip(x, 0.0, width - 1.0)
    top, left = ops.floor(y), ops.floor(x)
    wy, wx = ops.expand_dims(y - top, -1), ops.expand_dims(x - left, -1)
    top, left = ops.cast(top, "int32"), ops.cast(left, "int32")
    bottom, right = ops.minimum(top + 1, height - 1), ops.minimum(left + 1, width - 1)

    def at(row, column):
        return ops.take(pixels, start + row * width + column, axis=0)  # (B, H * W, C)

    upper = at(top, left) * (1 - wx) + at(top, right) * wx
    lower = at(bottom, left) * (1 - wx) + at(bottom, right) * wx
    return ops.reshape(upper * (1 - wy) + lower * wy, (-1, height, width, channels))


@keras.saving.register_keras_serializable(package="ResidualAttention")
class RandomCrop(_Augmentation):
    """Zeros added on every side, a random crop of the old size, and a horizontal flip of half of the images.

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
        mirror = ops.reshape(_mirrored(self.uniform(images, 0.0, 1.0), self.flip), (-1, 1))
        columns = ops.arange(width, dtype="int32")[None]
        columns = ops.where(mirror < 0, width - 1 - columns, columns)  # the flip costs no pass of its own
        rows = top + ops.arange(height, dtype="int32")[None]  # (B, H)
        padded = ops.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        cropped = ops.take_along_axis(padded, rows[:, :, None, None], axis=1)
        return ops.take_along_axis(cropped, (left + columns)[:, None, :, None], axis=2)

    def _offset(self, images):
        drawn = self.uniform(images, 0.0, 2 * self.padding + 1.0)
        return ops.reshape(ops.cast(ops.floor(drawn), "int32"), (-1, 1))

    def get_config(self):
        return {**super().get_config(), "padding": self.padding, "flip": self.flip}


def augmentation(kind, *, rotation, shift, flip, seed):
    """The layer for a recipe's `augmentation`, or None for "none"."""
    if kind == "affine":
        return RandomAffine(rotation, shift, flip, seed, name="augmentation")
    if kind == "crop":
        return RandomCrop(4, flip, seed, name="augmentation")
    return None

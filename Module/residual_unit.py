"""Residual units: the pre-activation bottleneck, and what all units share."""

import keras
from keras import layers

from Module.convolution import Conv2D
from Module.normalization import BatchNormalization


def convolution(filters, kernel_size, strides=1, **kwargs):
    """Make a convolution as in the authors' networks: no bias, He initialization."""
    return Conv2D(
        filters,
        kernel_size,
        strides=strides,
        use_bias=False,
        kernel_initializer="he_normal",
        data_format="channels_last",
        **kwargs,
    )


def strided_convolution(filters, kernel_size, strides, name, dtype, **kwargs):
    """Make the layers of a convolution that is padded by the same number of pixels on every side, as in Caffe.

    Keras' padding "same" pads strided convolutions on one side only.
    """
    if strides == 1:
        return [convolution(filters, kernel_size, padding="same", name=name, dtype=dtype, **kwargs)]
    return [
        layers.ZeroPadding2D(kernel_size // 2, data_format="channels_last", name=f"{name}_pad", dtype=dtype),
        convolution(filters, kernel_size, strides, padding="valid", name=name, dtype=dtype, **kwargs),
    ]


def norm_relu(name, dtype):
    """Make the layers of batch normalization, then ReLU."""
    return [BatchNormalization(name=f"norm_{name}", dtype=dtype), layers.ReLU(name=f"relu_{name}", dtype=dtype)]


def build_chain(chain, shape):
    """Build consecutive layers, and return the output shape of the last."""
    for layer in chain:
        layer.build(shape)
        shape = layer.compute_output_shape(shape)
    return shape


def run_chain(chain, x):
    """Apply consecutive layers; they inherit `training` from the layer that calls this."""
    for layer in chain:
        x = layer(x)
    return x


class Unit(layers.Layer):
    """Base of all residual units: `filters` channels out, a stride of 1 or 2, a bottleneck of `width` channels.

    A subclass creates its layers in `build`. Its attribute `pre_activation` states whether it normalizes its input
    (and returns a sum without activation) or returns an activated sum.

    Args:
        filters: int, channels out; a multiple of the unit's `multiple`.
        strides: int, 1 or 2; 2 halves height and width.
        width: int, channels of the bottleneck, or None for the unit's default.

    Input shape:  `(batch, height, width, channels)`.
    Output shape: `(batch, ceil(height / strides), ceil(width / strides), filters)`.

    Raises:
        ValueError: an argument out of range.
    """

    pre_activation = True
    multiple = 4

    def __init__(self, filters, strides=1, width=None, **kwargs):
        super().__init__(**kwargs)
        if filters < self.multiple or filters % self.multiple:
            raise ValueError(f"filters must be a positive multiple of {self.multiple}, received {filters}")
        if strides not in (1, 2):
            raise ValueError(f"strides must be 1 or 2, received {strides}")
        step = self.width_step(filters)
        if width is not None and (width < step or width % step):
            raise ValueError(f"width must be a positive multiple of {step}, received {width}")
        self.filters = filters
        self.strides = strides
        self.width = width or self.own_width(filters)

    @classmethod
    def own_width(cls, filters):
        """Return the default number of channels of the bottleneck."""
        return filters // 4

    @classmethod
    def width_step(cls, filters):
        """Return the number of which the channels of a bottleneck must be a multiple."""
        return 1

    @classmethod
    def kernels(cls, filters, width):
        """Return the weights in the convolutions of a unit that keeps the shape: its multiply-adds per pixel."""
        raise NotImplementedError(f"{cls.__name__} must implement kernels(filters, width)")

    def projects(self, input_shape):
        """Return whether the shortcut needs a convolution."""
        return self.strides > 1 or input_shape[-1] != self.filters

    def compute_output_shape(self, input_shape):
        batch, height, width, _ = input_shape
        height, width = (None if n is None else -(-n // self.strides) for n in (height, width))
        return (batch, height, width, self.filters)

    def get_config(self):
        return {**super().get_config(), "filters": self.filters, "strides": self.strides, "width": self.width}


@keras.saving.register_keras_serializable(package="ResidualAttention")
class ResidualUnit(Unit):
    """Pre-activation bottleneck unit: `y = s(x) + conv1x1(act(conv3x3(act(conv1x1(a)))))`, `a = act(x)`.

    `act` is batch normalization, then ReLU. The bottleneck has `filters / 4` channels. The 3x3 convolution has the
    stride, and one pixel of padding on each side. The shortcut `s` is `x` itself or, if the unit changes the shape, a
    1x1 convolution of `a` (the pre-activated tensor) with the unit's stride and no normalization.
    Source: He et al. 2016, "Identity Mappings in Deep Residual Networks", https://arxiv.org/abs/1603.05027,
    figure 4(e), as in the authors' graph of Wang et al. 2017 (https://arxiv.org/abs/1704.06904).
    Arguments, shapes and errors: see `Unit`; `filters` is a multiple of 4.
    """

    @classmethod
    def kernels(cls, filters, width):
        return 2 * filters * width + 9 * width**2

    def build(self, input_shape):
        dtype = self.dtype_policy
        self.activate = norm_relu("1", dtype)
        self.branch = [
            convolution(self.width, 1, name="reduce", dtype=dtype),
            *norm_relu("2", dtype),
            *strided_convolution(self.width, 3, self.strides, "convolve", dtype),
            *norm_relu("3", dtype),
            convolution(self.filters, 1, name="expand", dtype=dtype),
        ]
        self.projection = []
        if self.projects(input_shape):
            self.projection = [convolution(self.filters, 1, self.strides, name="project", dtype=dtype)]
        for chain in (self.activate, self.branch, self.projection):
            build_chain(chain, input_shape)

    def call(self, inputs):
        activated = run_chain(self.activate, inputs)
        shortcut = run_chain(self.projection, activated) if self.projection else inputs
        return shortcut + run_chain(self.branch, activated)

    @property
    def paths(self):
        """Chains of layers from input to sum, for counting depth."""
        return [self.branch]

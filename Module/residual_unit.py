"""The pre-activation bottleneck residual unit that the whole network is made of."""

import keras
from keras import layers

from Module.normalization import BatchNormalization


def convolution(filters, kernel_size, strides=1, **kwargs):
    """A convolution as the authors have them: no bias, He initialization, no padding of its own."""
    return layers.Conv2D(
        filters, kernel_size, strides=strides, use_bias=False, kernel_initializer="he_normal", **kwargs
    )


@keras.saving.register_keras_serializable(package="ResidualAttention")
class ResidualUnit(layers.Layer):
    """Pre-activation bottleneck unit: `y = s(x) + conv1x1(act(conv3x3(act(conv1x1(a)))))`, `a = act(x)`.

    `act` is batch normalization, then ReLU; the bottleneck has `filters / 4` channels; the stride sits on the
    3x3. The shortcut `s` is `x` itself, or, where the unit changes the shape, a 1x1 convolution of `a`
    (the pre-activated tensor) with the unit's stride and no normalization.
    Source: He et al. 2016, "Identity Mappings in Deep Residual Networks", https://arxiv.org/abs/1603.05027,
    figure 4(e), as the authors' graph of Wang et al. 2017 (https://arxiv.org/abs/1704.06904) has it.

    Args:
        filters: int, channels out; a multiple of 4.
        strides: int, 1 or 2; 2 halves height and width (padded by one pixel on each side, as in Caffe).

    Input shape:  `(batch, height, width, channels)`.
    Output shape: `(batch, ceil(height / strides), ceil(width / strides), filters)`.

    Raises:
        ValueError: `filters` is not a positive multiple of 4, or `strides` is neither 1 nor 2.
    """

    def __init__(self, filters, strides=1, **kwargs):
        super().__init__(**kwargs)
        if filters < 4 or filters % 4:
            raise ValueError(f"filters must be a positive multiple of 4, received {filters}")
        if strides not in (1, 2):
            raise ValueError(f"strides must be 1 or 2, received {strides}")
        self.filters = filters
        self.strides = strides

    def build(self, input_shape):
        dtype = self.dtype_policy
        narrow = self.filters // 4
        padding = "valid" if self.strides > 1 else "same"
        self.branch = [
            BatchNormalization(name="norm_1", dtype=dtype),
            layers.ReLU(name="relu_1", dtype=dtype),
            convolution(narrow, 1, name="reduce", dtype=dtype),
            BatchNormalization(name="norm_2", dtype=dtype),
            layers.ReLU(name="relu_2", dtype=dtype),
            # "same" with stride 2 would pad on one side only, where the authors' graph pads on both.
            *([layers.ZeroPadding2D(1, name="pad", dtype=dtype)] if self.strides > 1 else []),
            convolution(narrow, 3, self.strides, padding=padding, name="convolve", dtype=dtype),
            BatchNormalization(name="norm_3", dtype=dtype),
            layers.ReLU(name="relu_3", dtype=dtype),
            convolution(self.filters, 1, name="expand", dtype=dtype),
        ]
        self.projection = None
        if self.strides > 1 or input_shape[-1] != self.filters:
            self.projection = convolution(self.filters, 1, self.strides, name="project", dtype=dtype)
            self.projection.build(input_shape)
        shape = input_shape
        for layer in self.branch:
            layer.build(shape)
            shape = layer.compute_output_shape(shape)

    def call(self, inputs, training=None):
        norm, relu, *rest = self.branch
        activated = relu(norm(inputs, training=training))
        shortcut = self.projection(activated) if self.projection else inputs
        x = activated
        for layer in rest:
            x = layer(x, training=training) if isinstance(layer, BatchNormalization) else layer(x)
        return shortcut + x

    def compute_output_shape(self, input_shape):
        batch, height, width, _ = input_shape
        height, width = (None if n is None else -(-n // self.strides) for n in (height, width))
        return (batch, height, width, self.filters)

    def get_config(self):
        return {**super().get_config(), "filters": self.filters, "strides": self.strides}

"""The post-activation ResNeXt unit of AttentionNeXt."""

import keras
from keras import ops

from Module.normalization import BatchNormalization
from Module.residual_unit import Unit, build_chain, convolution, norm_relu, run_chain, strided_convolution

CARDINALITY = 32


@keras.saving.register_keras_serializable(package="ResidualAttention")
class ResNeXtUnit(Unit):
    """Post-activation ResNeXt unit: `y = ReLU(s(x) + BN(conv1x1(act(conv3x3(act(conv1x1(x)))))))`.

    `act` is batch normalization, then ReLU. The 3x3 convolution has the stride and 32 groups of `filters / 64`
    channels. The shortcut `s` is `x` or, if the unit changes the shape, BN of a 1x1 convolution of `x`. A bottleneck
    of another `width` keeps the channels per group and changes the number of groups.
    Source: Xie et al. 2017, "Aggregated Residual Transformations", https://arxiv.org/abs/1611.05431, figure 3(c), as in
    the authors' graph of AttentionNeXt (Wang et al. 2017, https://arxiv.org/abs/1704.06904).
    Arguments, shapes and errors: see `Unit`; `filters` is a multiple of 64.
    """

    pre_activation = False
    multiple = 2 * CARDINALITY

    @classmethod
    def own_width(cls, filters):
        return filters // 2

    @classmethod
    def width_step(cls, filters):
        return filters // cls.multiple

    @classmethod
    def kernels(cls, filters, width):
        return 2 * filters * width + 9 * width * cls.width_step(filters)

    def build(self, input_shape):
        dtype = self.dtype_policy
        groups = self.width // self.width_step(self.filters)
        self.branch = [
            convolution(self.width, 1, name="reduce", dtype=dtype),
            *norm_relu("1", dtype),
            *strided_convolution(self.width, 3, self.strides, "convolve", dtype, groups=groups),
            *norm_relu("2", dtype),
            convolution(self.filters, 1, name="expand", dtype=dtype),
            BatchNormalization(name="norm_3", dtype=dtype),
        ]
        self.projection = []
        if self.projects(input_shape):
            self.projection = [
                convolution(self.filters, 1, self.strides, name="project", dtype=dtype),
                BatchNormalization(name="norm_project", dtype=dtype),
            ]
        for chain in (self.branch, self.projection):
            build_chain(chain, input_shape)

    def call(self, inputs):
        shortcut = run_chain(self.projection, inputs)
        return ops.relu(shortcut + run_chain(self.branch, inputs))

    @property
    def paths(self):
        """Chains of layers from input to sum, for counting depth."""
        return [self.branch]

"""The inception unit of AttentionInception, designed for this project: the authors did not publish theirs."""

import keras
from keras import ops

from Module.pooling import MaxPooling2D
from Module.residual_unit import Unit, build_chain, convolution, norm_relu, run_chain, strided_convolution


@keras.saving.register_keras_serializable(package="ResidualAttention")
class InceptionUnit(Unit):
    """Pre-activation unit with four branches: `y = s(x) + conv1x1(act(concat(b1(a), b2(a), b3(a), b4(a))))`.

    `a = act(x)`, `act` is batch normalization, then ReLU. With `n = filters / 4`: `b1` is a 1x1 convolution to 5/16 n
    channels, `b2` a 1x1 and a 3x3 of 10/16 n, `b3` a 1x1 and a 5x5 of 4/16 n, `b4` a 3x3 max pooling and a 1x1 to
    5/16 n. The last layer of `b1`, `b2` and `b3` and the pooling have the stride. With these widths, the multiply-adds
    are within half a per cent of those of `ResidualUnit`. The shortcut `s` is that of `ResidualUnit`.
    Sources: the module of Szegedy et al. 2015, https://arxiv.org/abs/1409.4842, figure 2(b), in the pre-activation form
    of Wang et al. 2017, https://arxiv.org/abs/1704.06904, who mention AttentionInception without details.
    Arguments, shapes and errors: see `Unit`; `filters` is a multiple of 64.
    """

    multiple = 64

    @staticmethod
    def branch_widths(width):
        """Return the channels of the four branches for a bottleneck of `width`."""
        return tuple(max(1, round(width * share / 16)) for share in (5, 10, 4, 5))

    @classmethod
    def kernels(cls, filters, width):
        widths = cls.branch_widths(width)
        return 2 * filters * sum(widths) + 9 * widths[1] ** 2 + 25 * widths[2] ** 2

    def build(self, input_shape):
        dtype = self.dtype_policy
        point, three, five, pooled = self.branch_widths(self.width)
        self.activate = norm_relu("in", dtype)
        self.branches = [
            [convolution(point, 1, self.strides, name="point", dtype=dtype)],
            [
                convolution(three, 1, name="three_reduce", dtype=dtype),
                *norm_relu("three", dtype),
                *strided_convolution(three, 3, self.strides, "three_convolve", dtype),
            ],
            [
                convolution(five, 1, name="five_reduce", dtype=dtype),
                *norm_relu("five", dtype),
                *strided_convolution(five, 5, self.strides, "five_convolve", dtype),
            ],
            [
                MaxPooling2D(3, self.strides, "same", name="pool", dtype=dtype),
                convolution(pooled, 1, name="pool_reduce", dtype=dtype),
            ],
        ]
        self.merge = [*norm_relu("out", dtype), convolution(self.filters, 1, name="expand", dtype=dtype)]
        self.projection = []
        if self.projects(input_shape):
            self.projection = [convolution(self.filters, 1, self.strides, name="project", dtype=dtype)]
        shapes = [build_chain(chain, input_shape) for chain in (self.activate, self.projection, *self.branches)]
        build_chain(self.merge, (*shapes[-1][:3], sum(self.branch_widths(self.width))))

    def call(self, inputs):
        activated = run_chain(self.activate, inputs)
        shortcut = run_chain(self.projection, activated) if self.projection else inputs
        merged = ops.concatenate([run_chain(chain, activated) for chain in self.branches], axis=-1)
        return shortcut + run_chain(self.merge, merged)

    @property
    def paths(self):
        """Chains of layers from input to sum, for counting depth."""
        return [[*chain, *self.merge] for chain in self.branches]

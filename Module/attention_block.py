"""The attention module: a trunk of residual units, weighted by a soft mask from an encoder-decoder."""

import keras
from keras import layers, ops

from Module.normalization import BatchNormalization
from Module.residual_unit import ResidualUnit, convolution
from Module.upsampling import BilinearUpsampling

LEARNING = ("arl", "nal")


def ceil_mode(size):
    """Padding of a 3/2 max pooling, in Keras' words, that equals Caffe's ceil mode on `size` pixels."""
    return "same" if size % 2 == 0 else "valid"


def pooled_size(size):
    """Pixels left of `size` by a 3/2 max pooling in ceil mode."""
    return size // 2


def mask_sizes(height, width, mask_depth):
    """Sizes of the maps in the mask branch: full resolution first, then one a pooling.

    Raises:
        ValueError: the map is too small for so many poolings.
    """
    sizes = [(height, width)]
    for _ in range(mask_depth):
        if min(sizes[-1]) < 2:
            raise ValueError(
                f"mask_depth={mask_depth} needs a map of at least {2**mask_depth} pixels, received {height}x{width}"
            )
        sizes.append(tuple(pooled_size(side) for side in sizes[-1]))
    return sizes


def run(units, x, training):
    for unit in units:
        x = unit(x, training=training)
    return x


@keras.saving.register_keras_serializable(package="ResidualAttention")
class AttentionBlock(layers.Layer):
    """Attention module: `y = unit^p((1 + M(u)) * T(u))`, `u = unit^p(x)`, or `M * T` with naive learning.

    `T` is `unit^t`, the trunk. `M` is the soft mask, in (0, 1), one weight for each pixel and channel:
    `mask_depth` times pool (3/2) and `unit^r` (one `unit^r` more at the bottom), then as often upsample
    (bilinear), add a skip unit of the same size and `unit^r`, but plain upsampling back to the full size; two
    1x1 convolutions with BN-ReLU before each; sigmoid.
    Source: Wang et al. 2017, https://arxiv.org/abs/1704.06904, figures 2 and 3, equations 1 and 3, and the
    authors' Caffe graph, where the upsampling takes the trunk as a size reference only and adds nothing.

    Args:
        filters: int, channels in and out; a multiple of 4.
        mask_depth: int, poolings in the mask branch, at least 1; 3, 2, 1 in stages one, two, three.
        p: int, units before the branches part and after they meet.
        t: int, units in the trunk.
        r: int, units between neighbouring poolings of the mask.
        learning: "arl" for attention residual learning, `(1 + M) * T`, or "nal" for naive, `M * T`.

    Input shape:  `(batch, height, width, filters)`, height and width known and at least `2**mask_depth`.
    Output shape: the same; with `return_mask=True` a pair of tensors of that shape, the output and the mask.

    Raises:
        ValueError: an argument out of range, or a map too small for `mask_depth` (names both).
    """

    def __init__(self, filters, *, mask_depth, p=1, t=2, r=1, learning="arl", **kwargs):
        super().__init__(**kwargs)
        for name, value in (("mask_depth", mask_depth), ("p", p), ("t", t), ("r", r)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of 1 or more, received {value!r}")
        if learning not in LEARNING:
            raise ValueError(f"learning must be one of {', '.join(LEARNING)}, received {learning!r}")
        self.filters = filters
        self.mask_depth = mask_depth
        self.p = p
        self.t = t
        self.r = r
        self.learning = learning

    def build(self, input_shape):
        if input_shape[-1] != self.filters:
            raise ValueError(f"filters={self.filters} needs as many channels in, received {input_shape[-1]}")
        if None in input_shape[1:]:
            raise ValueError(f"height and width must be known, received shape {tuple(input_shape)}")
        self.before = self._units("before", self.p, input_shape)
        self.trunk = self._units("trunk", self.t, input_shape)
        self.after = self._units("after", self.p, input_shape)
        self._build_mask(tuple(input_shape))

    def _build_mask(self, shape):
        batch, height, width, channels = shape
        sizes = mask_sizes(height, width, self.mask_depth)
        shapes = [(batch, h, w, channels) for h, w in sizes]
        bottom = self.mask_depth
        self.pools, self.down_sample, self.skip, self.up_sample, self.upsampling = [], [], [], [], []
        for level in range(1, bottom + 1):
            self.pools.append(self._pooling(level, shapes[level - 1], shapes[level]))
            count = self.r if level < bottom else 2 * self.r
            self.down_sample.append(self._units(f"down_sample_{level}", count, shapes[level]))
        for level in range(bottom - 1, -1, -1):
            self.upsampling.append(
                self._part(BilinearUpsampling, shapes[level + 1], f"upsampling_{level}", *sizes[level])
            )
            if level:  # no unit and no skip at full resolution
                self.skip.extend(self._units(f"skip_{level}", 1, shapes[level]))
                self.up_sample.append(self._units(f"up_sample_{level}", self.r, shapes[level]))
        self.weigh = []
        for i in (1, 2):
            self.weigh.append(self._part(BatchNormalization, shape, f"mask_norm_{i}"))
            self.weigh.append(self._part(layers.ReLU, shape, f"mask_relu_{i}"))
            self.weigh.append(self._part(convolution, shape, f"mask_convolve_{i}", self.filters, 1))

    def _pooling(self, level, shape, pooled):
        """3/2 max pooling in ceil mode: two layers, rows and columns, where only one side is odd."""
        rows, columns = ceil_mode(shape[1]), ceil_mode(shape[2])
        if rows == columns:
            return [self._part(layers.MaxPooling2D, shape, f"pool_{level}", 3, 2, rows)]
        half = (shape[0], pooled[1], *shape[2:])
        return [
            self._part(layers.MaxPooling2D, shape, f"pool_{level}_rows", (3, 1), (2, 1), rows),
            self._part(layers.MaxPooling2D, half, f"pool_{level}_columns", (1, 3), (1, 2), columns),
        ]

    def _part(self, layer, shape, name, *args):
        part = layer(*args, name=name, dtype=self.dtype_policy)
        part.build(shape)
        return part

    def _units(self, name, count, shape):
        return [self._part(ResidualUnit, shape, f"{name}_unit_{i}", self.filters) for i in range(1, count + 1)]

    def call(self, inputs, training=None, return_mask=False):
        x = run(self.before, inputs, training)
        trunk = run(self.trunk, x, training)
        mask = self._soft_mask(x, training)
        gain = mask + 1 if self.learning == "arl" else mask
        outputs = run(self.after, gain * trunk, training)
        return (outputs, mask) if return_mask else outputs

    def _soft_mask(self, x, training):
        levels = []
        for pooling, units in zip(self.pools, self.down_sample):
            for pool in pooling:
                x = pool(x)
            x = run(units, x, training)
            levels.append(x)
        x = levels.pop()  # the bottom itself is no skip
        for upsampling, skip, units in zip(self.upsampling, self.skip, self.up_sample):
            x = upsampling(x) + skip(levels.pop(), training=training)
            x = run(units, x, training)
        x = self.upsampling[-1](x)  # (B, height, width, filters) again
        for layer in self.weigh:
            x = layer(x, training=training) if isinstance(layer, BatchNormalization) else layer(x)
        return ops.sigmoid(x)

    def compute_output_shape(self, input_shape):
        return tuple(input_shape)

    def compute_output_spec(self, inputs, training=None, return_mask=False):
        output = keras.KerasTensor(inputs.shape, dtype=self.compute_dtype)
        return (output, keras.KerasTensor(inputs.shape, dtype=self.compute_dtype)) if return_mask else output

    def get_config(self):
        own = ("filters", "mask_depth", "p", "t", "r", "learning")
        return {**super().get_config(), **{name: getattr(self, name) for name in own}}


class SoftMask(layers.Layer):
    """The soft mask `M` of an attention block, as a layer of its own that shares the block's weights.

    Args:
        block: a built `AttentionBlock`.

    Input shape:  the block's.
    Output shape: the same; values in (0, 1).
    """

    def __init__(self, block, **kwargs):
        super().__init__(dtype=block.dtype_policy, **kwargs)
        self.block = block

    def call(self, inputs):
        _, mask = self.block(inputs, training=False, return_mask=True)
        return mask

    def compute_output_shape(self, input_shape):
        return tuple(input_shape)

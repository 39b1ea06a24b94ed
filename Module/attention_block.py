"""The attention module: a trunk of residual units, weighted by a soft mask."""

import keras
from keras import layers, ops

from Module.checks import check_choice, check_count
from Module.pooling import ceil_pooling, pooled_size
from Module.residual_unit import ResidualUnit, build_chain, convolution, norm_relu, run_chain
from Module.upsampling import BilinearUpsampling

LEARNING = ("arl", "nal")
ATTENTION = ("mixed", "channel", "spatial")
MASKS = ("encoder_decoder", "local")
LOCAL_UNITS = 3
SPATIAL_EPSILON = 1e-5  # added to the variance of a map, which is 0 for a constant map; not in the paper


def attend(x, attention):
    """Apply the last step of a mask, its attention type (Wang et al. 2017, section 3.3).

    - mixed: `sigmoid(x)`, f1 in the paper;
    - channel: `x / ||x_i||`, the L2 norm over the channels at each position, f2;
    - spatial: `sigmoid((x - mean_c) / std_c)`, over each channel's map, f3.

    Args:
        x: tensor `(batch, height, width, channels)`.
        attention: "mixed", "channel" or "spatial".

    Returns:
        A tensor of the same shape and dtype.

    Raises:
        ValueError: an unknown attention type.
    """
    check_choice("attention", attention, ATTENTION)
    if attention == "mixed":
        return ops.sigmoid(x)
    exact = ops.cast(x, "float32")  # sums over a map or all channels overflow float16
    if attention == "channel":
        weights = ops.normalize(exact, axis=-1, order=2, epsilon=1e-12)
    else:
        mean, variance = ops.moments(exact, axes=(1, 2), keepdims=True)
        weights = ops.sigmoid((exact - mean) * ops.rsqrt(variance + SPATIAL_EPSILON))
    return ops.cast(weights, x.dtype)


def mask_sizes(height, width, mask_depth):
    """Return the sizes of the maps in the mask branch: full resolution first, then one for each pooling.

    Raises:
        ValueError: the map is too small for `mask_depth` poolings.
    """
    sizes = [(height, width)]
    for _ in range(mask_depth):
        if min(sizes[-1]) < 2:
            raise ValueError(
                f"mask_depth={mask_depth} needs a map of at least {2**mask_depth} pixels, received {height}x{width}"
            )
        sizes.append(tuple(pooled_size(side) for side in sizes[-1]))
    return sizes


def local_widths(unit, filters, sizes, r, r_up):
    """Return the bottleneck widths of three units at full resolution that cost as much as the encoder-decoder's units.

    The paper (table 4) only states that the cost is equal. These are the widths with the nearest multiply-adds.

    Args:
        unit: a subclass of `Unit`.
        filters: int, channels in and out.
        sizes: list of `(height, width)`, see `mask_sizes`.
        r, r_up: ints, see `AttentionBlock`.

    Returns:
        A list of three ints, channels.
    """
    pixels = [height * width for height, width in sizes]
    units = [r + 1 + r_up] * (len(sizes) - 2) + [r + r_up]  # down, skip and up on each level; the bottom
    own = unit.kernels(filters, unit.own_width(filters))
    budget = own * sum(n * count for n, count in zip(pixels[1:], units)) / pixels[0]
    step = unit.width_step(filters)
    narrow = step
    while LOCAL_UNITS * unit.kernels(filters, narrow + step) <= budget:
        narrow += step
    choices = [[narrow + step] * wide + [narrow] * (LOCAL_UNITS - wide) for wide in range(LOCAL_UNITS + 1)]
    return min(choices, key=lambda widths: abs(sum(unit.kernels(filters, w) for w in widths) - budget))


@keras.saving.register_keras_serializable(package="ResidualAttention")
class AttentionBlock(layers.Layer):
    """Attention module: `y = unit^p((1 + M(u)) * T(u))`, `u = unit^p(x)`, or `M * T` with naive learning.

    `T` is `unit^t`, the trunk. `M` is the soft mask, one weight for each pixel and channel. Its steps are:

    - down, `mask_depth` times: 3/2 max pooling, then `unit^r` (at the bottom `unit^(r + r_up)`);
    - up, as many times: bilinear upsampling, plus a skip unit of the same size, then `unit^r_up`; the last upsampling,
      to the full size, has no skip and no units;
    - two 1x1 convolutions with BN-ReLU before each (with post-activation units, before the second only);
    - the activation of the attention type, see `attend`.

    Source: Wang et al. 2017, https://arxiv.org/abs/1704.06904, figures 2 and 3, equations 1 and 3, and the
    authors' Caffe graph, in which the trunk is only a size reference for the upsampling and is not added to it.

    Args:
        filters: int, channels in and out; a value that `unit` accepts.
        mask_depth: int, poolings in the mask branch, at least 1; 3, 2, 1 in stages one, two, three.
        p: int, units before the branches split, and after they join.
        t: int, units in the trunk.
        r: int, units between consecutive poolings of the mask.
        r_up: int, units between consecutive upsamplings of the mask, or None for `r`.
        learning: "arl" for attention residual learning, `(1 + M) * T`, or "nal" for naive, `M * T`.
        attention: "mixed", "channel" or "spatial", see `attend`.
        mask: "encoder_decoder", or "local" for three narrower units at full resolution with equal multiply-adds.
        unit: a subclass of `Unit`, registered with Keras.

    Input shape:  `(batch, height, width, filters)`, height and width known and at least `2**mask_depth`.
    Output shape: the same; with `return_mask=True` a pair of tensors of that shape, the output and the mask.

    Raises:
        ValueError: an argument out of range, or a map too small for `mask_depth` (names both).
    """

    def __init__(
        self,
        filters,
        *,
        mask_depth,
        p=1,
        t=2,
        r=1,
        r_up=None,
        learning="arl",
        attention="mixed",
        mask="encoder_decoder",
        unit=ResidualUnit,
        **kwargs,
    ):
        super().__init__(**kwargs)
        r_up = r if r_up is None else r_up
        for name, value in (("mask_depth", mask_depth), ("p", p), ("t", t), ("r", r), ("r_up", r_up)):
            check_count(name, value)
        chosen = (("learning", learning, LEARNING), ("attention", attention, ATTENTION), ("mask", mask, MASKS))
        for name, value, choices in chosen:
            check_choice(name, value, choices)
        self.filters = filters
        self.mask_depth = mask_depth
        self.p = p
        self.t = t
        self.r = r
        self.r_up = r_up
        self.learning = learning
        self.attention = attention
        self.mask = mask
        self.unit = keras.saving.get_registered_object(unit) if isinstance(unit, str) else unit

    def build(self, input_shape):
        if input_shape[-1] != self.filters:
            raise ValueError(f"filters={self.filters} needs an input with as many channels, received {input_shape[-1]}")
        if None in input_shape[1:]:
            raise ValueError(f"height and width must be known, received shape {tuple(input_shape)}")
        shape = tuple(input_shape)
        self.before = self._units("before", self.p, shape)
        self.trunk = self._units("trunk", self.t, shape)
        self.after = self._units("after", self.p, shape)
        sizes = mask_sizes(*shape[1:3], self.mask_depth)
        self.local, self.pools, self.down_sample, self.skip, self.up_sample, self.upsampling = ([] for _ in range(6))
        if self.mask == "local":
            widths = local_widths(self.unit, self.filters, sizes, self.r, self.r_up)
            for i, width in enumerate(widths, start=1):
                self.local += self._units(f"local_{i}", 1, shape, width)
        else:
            self._build_encoder_decoder([(shape[0], *size, self.filters) for size in sizes])
        self._build_weigh(shape)

    def _build_encoder_decoder(self, shapes):
        bottom = self.mask_depth
        for level in range(1, bottom + 1):
            pools = ceil_pooling(*shapes[level - 1][1:3], f"pool_{level}", self.dtype_policy)
            build_chain(pools, shapes[level - 1])
            self.pools.append(pools)
            count = self.r if level < bottom else self.r + self.r_up
            self.down_sample.append(self._units(f"down_sample_{level}", count, shapes[level]))
        for level in range(bottom - 1, -1, -1):
            height, width = shapes[level][1:3]
            upsampling = BilinearUpsampling(height, width, name=f"upsampling_{level}", dtype=self.dtype_policy)
            upsampling.build(shapes[level + 1])
            self.upsampling.append(upsampling)
            if level:  # no unit and no skip at full resolution
                self.skip += self._units(f"skip_{level}", 1, shapes[level])
                self.up_sample.append(self._units(f"up_sample_{level}", self.r_up, shapes[level]))

    def _build_weigh(self, shape):
        """Build the two 1x1 convolutions that turn the output of the units into the mask."""
        dtype = self.dtype_policy
        self.weigh = [
            *(norm_relu("mask_1", dtype) if self.unit.pre_activation else []),
            convolution(self.filters, 1, name="mask_convolve_1", dtype=dtype),
            *norm_relu("mask_2", dtype),
            convolution(self.filters, 1, name="mask_convolve_2", dtype=dtype),
        ]
        build_chain(self.weigh, shape)

    def _units(self, name, count, shape, width=None):
        units = [
            self.unit(self.filters, width=width, name=f"{name}_unit_{i}", dtype=self.dtype_policy)
            for i in range(1, count + 1)
        ]
        build_chain(units, shape)
        return units

    def call(self, inputs, return_mask=False):
        trunk, mask = self.branches(inputs)
        gain = mask + 1 if self.learning == "arl" else mask
        outputs = run_chain(self.after, gain * trunk)
        return (outputs, mask) if return_mask else outputs

    def branches(self, inputs):
        """Return the two factors of the product: trunk `T(u)` and mask `M(u)`, each of the output's shape."""
        x = run_chain(self.before, inputs)
        return run_chain(self.trunk, x), self._soft_mask(x)

    def _soft_mask(self, x):
        branch = self._encoder_decoder if self.mask == "encoder_decoder" else self._local
        return attend(run_chain(self.weigh, branch(x)), self.attention)

    def _local(self, x):
        return run_chain(self.local, x)

    def _encoder_decoder(self, x):
        levels = []
        for pools, units in zip(self.pools, self.down_sample):
            x = run_chain([*pools, *units], x)
            levels.append(x)
        x = levels.pop()  # the bottom has no skip
        for upsampling, skip, units in zip(self.upsampling, self.skip, self.up_sample):
            x = upsampling(x) + skip(levels.pop())
            x = run_chain(units, x)
        return self.upsampling[-1](x)  # (B, height, width, filters) again

    def compute_output_shape(self, input_shape):
        return tuple(input_shape)

    def compute_output_spec(self, inputs, return_mask=False):
        output = keras.KerasTensor(inputs.shape, dtype=self.compute_dtype)
        return (output, keras.KerasTensor(inputs.shape, dtype=self.compute_dtype)) if return_mask else output

    def get_config(self):
        own = ("filters", "mask_depth", "p", "t", "r", "r_up", "learning", "attention", "mask")
        config = {name: getattr(self, name) for name in own}
        return {**super().get_config(), **config, "unit": keras.saving.get_registered_name(self.unit)}


@keras.saving.register_keras_serializable(package="ResidualAttention")
class Branches(layers.Layer):
    """Trunk and soft mask of an attention block, as a layer that shares the block's weights.

    Args:
        block: an `AttentionBlock`.
        dtype: dtype or policy of the outputs; that of the block by default.

    Input shape:  that of the block.
    Output shape: a dictionary of two tensors of that shape, `trunk` and `mask`.
    """

    def __init__(self, block, *, dtype=None, **kwargs):
        super().__init__(dtype=dtype or block.dtype_policy, **kwargs)
        self.block = block

    def build(self, input_shape):
        if not self.block.built:
            self.block.build(input_shape)

    def call(self, inputs):
        trunk, mask = self.block.branches(inputs)
        return {"trunk": ops.cast(trunk, self.compute_dtype), "mask": ops.cast(mask, self.compute_dtype)}

    def compute_output_shape(self, input_shape):
        return {"trunk": tuple(input_shape), "mask": tuple(input_shape)}

    def get_config(self):
        return {**super().get_config(), "block": keras.saving.serialize_keras_object(self.block)}

    @classmethod
    def from_config(cls, config):
        return cls(**{**config, "block": keras.saving.deserialize_keras_object(config["block"])})

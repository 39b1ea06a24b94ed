"""One builder for every Residual Attention Network: tables of rows in, a functional Keras model out."""

from typing import NamedTuple

import keras
from keras import layers

from Module import AttentionBlock, BatchNormalization, ResidualUnit
from Module.residual_unit import convolution


class Stage(NamedTuple):
    """One row: the residual unit that opens a stage, and the attention blocks that follow it."""

    filters: int  # channels
    strides: int  # of the opening unit
    mask_depth: int  # poolings in the mask branch of its blocks


class Geometry(NamedTuple):
    """What stands around and between the blocks."""

    stem_filters: int
    stem_kernel: int  # pixels
    stem_pool: int  # pixels, also the stride; 1 is no pooling
    stages: tuple[Stage, ...]
    tail: tuple[Stage, ...]  # units without attention before the average pooling


GEOMETRIES = {
    # The reference re-implementation's network for 32 x 32 pixels, with the third stage that makes the depth true.
    "compact": Geometry(
        stem_filters=32,
        stem_kernel=5,
        stem_pool=2,
        stages=(Stage(128, 1, 3), Stage(256, 2, 2), Stage(512, 2, 1)),
        tail=(Stage(1024, 1, 0),) * 3,
    ),
}
# Blocks in each stage by depth, with p = 1 and t = 2; other depths have the same number in every stage.
BLOCKS = {56: (1, 1, 1), 92: (1, 2, 3)}


def blocks_per_stage(depth, p, t):
    """Attention blocks in each of the three stages of a network of `depth` trunk layers.

    `depth = 9 (2p + t) m + 20`: 36 m + 20 with the paper's p = 1, t = 2 (Wang et al. 2017, section 4.1).

    Raises:
        ValueError: no whole m gives this depth.
    """
    if (p, t) == (1, 2) and depth in BLOCKS:
        return BLOCKS[depth]
    step = 9 * (2 * p + t)
    m, rest = divmod(depth - 20, step)
    if m < 1 or rest:
        near = max(m, 1) * step + 20
        raise ValueError(
            f"depth must be {step} m + 20 with p={p}, t={t} (such as {near} or {near + step}), received {depth}"
        )
    return (m, m, m)


def residual_attention_network(
    depth=56,
    geometry="compact",
    learning="arl",
    p=1,
    t=2,
    r=1,
    classes=10,
    input_shape=(32, 32, 3),
    dropout=0.2,
    classifier_l2=1e-4,
    preprocessing=None,
    name=None,
):
    """A Residual Attention Network as a functional model, from raw images to class probabilities.

    Stem (convolution, pooling); three stages of one residual unit and their attention blocks; three residual
    units; BN-ReLU, average pooling over the whole map, dropout, classifier, softmax. Logits and softmax are
    float32 under every dtype policy. Source: Wang et al. 2017, https://arxiv.org/abs/1704.06904, figure 2 and
    table 2.

    Args:
        depth: int, layers along the trunk: 36 m + 20, with p = 1 and t = 2.
        geometry: str, a key of `GEOMETRIES`, or a `Geometry` of one's own.
        learning: "arl" or "nal", see `Module.AttentionBlock`.
        p, t, r: ints, units in each attention block, see `Module.AttentionBlock`.
        classes: int, number of classes.
        input_shape: `(height, width, channels)`.
        dropout: float in [0, 1), share of features dropped before the classifier.
        classifier_l2: float, weight of the L2 penalty on the classifier's kernel.
        preprocessing: a layer put before the first convolution (the mean subtraction), or None.
        name: str, the model's name; by default `attention_<depth>`.

    Input shape:  `(batch, *input_shape)`, any dtype; pixels as `preprocessing` takes them.
    Output shape: `(batch, classes)`, float32, rows sum to 1. The layer `logits` has the values before softmax.

    Raises:
        ValueError: an unknown geometry, a depth that is no 36 m + 20, or images too small for the masks.
    """
    if not isinstance(geometry, Geometry) and geometry not in GEOMETRIES:
        raise ValueError(f"geometry must be one of {', '.join(GEOMETRIES)}, received {geometry!r}")
    rows = geometry if isinstance(geometry, Geometry) else GEOMETRIES[geometry]
    inputs = keras.Input(input_shape, name="images")
    x = preprocessing(inputs) if preprocessing else inputs
    x = convolution(rows.stem_filters, rows.stem_kernel, padding="same", name="stem_convolve")(x)
    if rows.stem_pool > 1:
        x = layers.MaxPooling2D(rows.stem_pool, name="stem_pool")(x)
    for i, (stage, blocks) in enumerate(zip(rows.stages, blocks_per_stage(depth, p, t)), start=1):
        x = ResidualUnit(stage.filters, stage.strides, name=f"stage_{i}_unit")(x)
        for j in range(1, blocks + 1):
            x = AttentionBlock(
                stage.filters,
                mask_depth=stage.mask_depth,
                p=p,
                t=t,
                r=r,
                learning=learning,
                name=f"stage_{i}_attention_{j}",
            )(x)
    for i, unit in enumerate(rows.tail, start=1):
        x = ResidualUnit(unit.filters, unit.strides, name=f"tail_unit_{i}")(x)
    outputs = _classifier(x, classes, dropout, classifier_l2)
    return keras.Model(inputs, outputs, name=name or f"attention_{depth}")


def _classifier(x, classes, dropout, l2):
    x = BatchNormalization(name="tail_norm")(x)
    x = layers.ReLU(name="tail_relu")(x)
    x = layers.AveragePooling2D(x.shape[1:3], strides=1, name="average_pool")(x)  # (B, 1, 1, C)
    x = layers.Flatten(name="flatten")(x)
    x = layers.Dropout(dropout, name="dropout")(x)
    regularizer = keras.regularizers.L2(l2) if l2 else None
    x = layers.Dense(classes, kernel_regularizer=regularizer, dtype="float32", name="logits")(x)
    return layers.Softmax(dtype="float32", name="probabilities")(x)


def attention_56(**kwargs):
    """Attention-56: one attention block in each stage. Arguments of `residual_attention_network` but depth."""
    return residual_attention_network(depth=56, **kwargs)


def attention_92(**kwargs):
    """Attention-92: one, two and three attention blocks. Arguments of `residual_attention_network` but depth."""
    return residual_attention_network(depth=92, **kwargs)

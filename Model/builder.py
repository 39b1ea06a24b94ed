"""Builds all Residual Attention Networks as functional Keras models from the tables in `Model.geometries`."""

import os

import keras
from keras import layers

from Model.geometries import DEPTHS, GEOMETRIES, Depth, Geometry, blocks_per_stage, parse_name
from Module import AttentionBlock, Dropout, InceptionUnit, ResidualUnit, ResNeXtUnit
from Module.checks import check_choice, check_count, check_image_shape
from Module.pooling import MaxPooling2D, ceil_pooling
from Module.residual_unit import norm_relu, run_chain, strided_convolution

FEATURES = "flatten"  # the layer whose output are the features; dropout and classifier follow
UNITS = {"residual": ResidualUnit, "resnext": ResNeXtUnit, "inception": InceptionUnit}


def residual_attention_network(
    depth=56,
    geometry="compact",
    learning="arl",
    p=None,
    t=None,
    r=None,
    classes=None,
    input_shape=None,
    dropout=0.2,
    classifier_l2=1e-4,
    preprocessing=None,
    name=None,
    *,
    attention="mixed",
    mask="encoder_decoder",
    unit="residual",
    r_up=None,
):
    """Build a Residual Attention Network: a functional model from images to class probabilities.

    It consists of a stem, three stages of a residual unit and attention blocks, the geometry's last units, BN-ReLU,
    average pooling over the whole map, dropout, and the classifier. Logits and softmax are float32 under every dtype
    policy. Images are channels-last. Source: Wang et al. 2017, https://arxiv.org/abs/1704.06904, figure 2, table 2.

    Args:
        depth: int, layers along the trunk: 36 m + 20, with p = 1 and t = 2.
        geometry: str, a key of `GEOMETRIES`, or a `Geometry`.
        learning: "arl" or "nal", see `Module.AttentionBlock`.
        p, t, r: ints, see `Module.AttentionBlock`; None for the depth's default: 1, 2, 1, or 2, 4, 3 for 452.
        classes: int, or None for the geometry's default: 10, or 1000 for "imagenet".
        input_shape: `(height, width, channels)`; None for the default, 32 x 32 x 3, or 224 x 224 x 3 for "imagenet".
        dropout: float in [0, 1), share of features dropped before the classifier.
        classifier_l2: float, weight of the L2 penalty on the classifier's kernel.
        preprocessing: a layer that is applied before the first convolution, such as mean subtraction, or None.
        name: str, name of the model; by default `attention_<depth>`.
        attention, mask: see `Module.AttentionBlock`.
        unit: "residual", "resnext" (AttentionNeXt) or "inception" (AttentionInception).
        r_up: int, units per level on the mask's way up, or None for the depth's default: r, or 1 for 452.

    Input shape:  `(batch, *input_shape)`, any dtype; pixels as `preprocessing` expects them.
    Output shape: `(batch, classes)`, float32, rows sum to 1. The layer `logits` returns the values before softmax.

    Raises:
        ValueError: an unknown name, a number out of its range, a depth that is not 36 m + 20, images too small for the
            masks, or a `floatx` in Keras' configuration other than float32.
    """
    _refuse_floatx()
    rows, unit, units = _find_geometry(geometry), _find_unit(unit), _choose_units(depth, p=p, t=t, r=r, r_up=r_up)
    classes = rows.classes if classes is None else classes
    check_count("classes", classes)
    shape = (rows.pixels, rows.pixels, 3) if input_shape is None else input_shape
    check_image_shape("input_shape", shape)
    block = dict(**units, learning=learning, attention=attention, mask=mask, unit=unit)
    counts = blocks_per_stage(depth, units["p"], units["t"], rows.rising)
    inputs = keras.Input(shape, dtype="float32", name="images")
    x = _stem(preprocessing(inputs) if preprocessing else inputs, rows, unit)
    for i, (stage, count) in enumerate(zip(rows.stages, counts), start=1):
        x = _stage(x, i, stage, count, block)
    for i, (filters, strides) in enumerate(rows.tail, start=1):
        x = unit(filters, strides, name=f"tail_unit_{i}")(x)
    outputs = _classifier(x, int(classes), dropout, classifier_l2, unit)
    return keras.Model(inputs, outputs, name=name or f"attention_{depth}")


def _refuse_floatx():
    """Raise `ValueError` if the user's configuration makes all layers float16 or float64."""
    if keras.config.floatx() != "float32":
        folder = os.environ.get("KERAS_HOME") or os.path.join(os.path.expanduser("~"), ".keras")
        raise ValueError(
            f"floatx must be float32, received {keras.config.floatx()}: call keras.config.set_floatx('float32') or "
            f"change {os.path.join(folder, 'keras.json')}; for half precision set a mixed dtype policy instead"
        )


def _find_geometry(geometry):
    if isinstance(geometry, Geometry):
        return geometry
    check_choice("geometry", geometry, GEOMETRIES)
    return GEOMETRIES[geometry]


def _find_unit(name):
    check_choice("unit", name, UNITS)
    return UNITS[name]


def _choose_units(depth, **given):
    """Return p, t, r and r_up of the attention blocks: what is given, otherwise the default of the depth."""
    check_count("depth", depth)
    default = DEPTHS.get(depth, Depth())._asdict()
    units = {name: default[name] if value is None else value for name, value in given.items()}
    for name in ("p", "t"):  # AttentionBlock checks the others
        check_count(name, units[name])
    return units


def _stem(x, rows, unit):
    x = run_chain(strided_convolution(rows.stem_filters, rows.stem_kernel, rows.stem_strides, "stem_convolve", None), x)
    if rows.stem_norm or not unit.pre_activation:  # post-activation units need a normalized input
        x = run_chain(norm_relu("stem", None), x)
    if rows.stem_pool == 2:
        x = MaxPooling2D(2, name="stem_pool")(x)
    elif rows.stem_pool == 3:
        x = run_chain(ceil_pooling(*x.shape[1:3], "stem_pool"), x)
    return x


def _stage(x, number, stage, blocks, block):
    x = block["unit"](stage.filters, stage.strides, name=f"stage_{number}_unit")(x)
    for j in range(1, blocks + 1):
        name = f"stage_{number}_attention_{j}"
        x = AttentionBlock(stage.filters, mask_depth=stage.mask_depth, name=name, **block)(x)
    for j in range(1, stage.closing + 1):
        x = block["unit"](stage.filters, name=f"stage_{number}_closing_unit_{j}")(x)
    return x


def _classifier(x, classes, dropout, l2, unit):
    if unit.pre_activation:
        x = run_chain(norm_relu("tail", None), x)
    pool = layers.AveragePooling2D(x.shape[1:3], strides=1, data_format="channels_last", name="average_pool")
    x = layers.Flatten(data_format="channels_last", name=FEATURES)(pool(x))  # (B, 1, 1, C) to (B, C)
    x = Dropout(dropout, name="dropout")(x)
    regularizer = keras.regularizers.L2(l2) if l2 else None
    x = layers.Dense(classes, kernel_regularizer=regularizer, dtype="float32", name="logits")(x)
    return layers.Softmax(dtype="float32", name="probabilities")(x)


def assemble(network, depth, weights=None, include_top=True, **arguments):
    """Build a network with random weights, or with weights that come with the project.

    Args:
        network: str, name of the network, such as `attention_56`.
        depth: int, see `residual_attention_network`.
        weights: see `network`.
        include_top: see `network`.
        arguments: those of `residual_attention_network`; None for their defaults.

    Returns:
        A functional model.
    """
    given = {key: value for key, value in arguments.items() if value is not None}
    if weights is not None:
        from Model.weights import load_network

        return load_network(network, weights, include_top, **given)
    made = residual_attention_network(depth=depth, **given)
    return made if include_top else keras.Model(made.input, made.get_layer(FEATURES).output, name=made.name)


def network(
    name,
    geometry=None,
    learning=None,
    p=None,
    t=None,
    r=None,
    classes=None,
    input_shape=None,
    dropout=0.2,
    classifier_l2=1e-4,
    preprocessing=None,
    *,
    attention=None,
    mask=None,
    r_up=None,
    weights=None,
    include_top=True,
):
    """Build the network with this name, with random or trained weights.

    Args:
        name: str, `attention_<depth>`, `attentionnext_<depth>` or `attentioninception_<depth>`, such as `attention_92`.
        weights: name of weights that come with the project, such as "cifar10" or "cifar100" (see `Model.weights`),
            or None for random weights. With weights, the network is the one that was trained: it takes raw images from
            0 to 255, arguments that are None have the values used in training, and contradicting ones are refused.
        include_top: bool, whether to include the classifier. Without it, the network returns its features,
            `(batch, channels)`: the average of the last feature map over all pixels.

    All other arguments, shapes and errors: see `residual_attention_network`; None for the defaults there.

    Raises:
        ValueError: see `residual_attention_network` and `weights.load_network`.
    """
    arguments = locals()
    unit, depth = parse_name(name)
    return assemble(name, depth, unit=unit, **arguments)


def attention_56(
    geometry=None,
    learning=None,
    p=None,
    t=None,
    r=None,
    classes=None,
    input_shape=None,
    dropout=0.2,
    classifier_l2=1e-4,
    preprocessing=None,
    name=None,
    *,
    attention=None,
    mask=None,
    unit=None,
    r_up=None,
    weights=None,
    include_top=True,
):
    """Build Attention-56: one attention block in each stage.

    Arguments, shapes and errors: see `network`.
    """
    return assemble("attention_56", 56, **locals())


def attention_92(
    geometry=None,
    learning=None,
    p=None,
    t=None,
    r=None,
    classes=None,
    input_shape=None,
    dropout=0.2,
    classifier_l2=1e-4,
    preprocessing=None,
    name=None,
    *,
    attention=None,
    mask=None,
    unit=None,
    r_up=None,
    weights=None,
    include_top=True,
):
    """Build Attention-92: one, two and three attention blocks in the three stages.

    Arguments, shapes and errors: see `network`.
    """
    return assemble("attention_92", 92, **locals())

"""The tables of geometries and depths. Plain data, no framework."""

import re
from typing import NamedTuple


class Stage(NamedTuple):
    """One row: the residual unit that opens a stage, the attention blocks after it, and the units that close it."""

    filters: int  # channels
    strides: int  # of the opening unit
    mask_depth: int  # poolings in the mask branch of its blocks
    closing: int = 0  # units after the blocks


class Geometry(NamedTuple):
    """The parts around and between the attention blocks."""

    stem_filters: int  # channels
    stem_kernel: int  # pixels
    stages: tuple[Stage, ...]
    tail: tuple[tuple[int, int], ...]  # filters and strides of the units after the last stage
    stem_strides: int = 1
    stem_norm: bool = False  # BN-ReLU between the stem's convolution and its pooling
    stem_pool: int = 1  # pixels: 1 is no pooling, 2 is 2/2, 3 is 3/2 in ceil mode
    rising: bool = True  # Attention-92 has 1, 2, 3 blocks in its stages; False: 2, 2, 2
    pixels: int = 32  # default height and width of an image
    classes: int = 10  # default number of classes


GEOMETRIES = {
    # The network of the reference re-implementation, https://github.com/Jay4869/Deep-Learning, with the third stage
    # that gives it its nominal depth.
    "compact": Geometry(
        stem_filters=32,
        stem_kernel=5,
        stem_pool=2,
        stages=(Stage(128, 1, 3), Stage(256, 2, 2), Stage(512, 2, 1)),
        tail=((1024, 1), (1024, 1), (1024, 1)),
    ),
    # Wang et al. 2017, section 4.1, interpreted so that the published parameters match: two units per stage.
    "paper": Geometry(
        stem_filters=16,
        stem_kernel=3,
        stages=(Stage(64, 1, 3, closing=1), Stage(128, 2, 2, closing=1), Stage(256, 2, 1, closing=1)),
        tail=(),
        rising=False,
    ),
    # The compact widths at full resolution, as the strongest ports train on CIFAR.
    "full": Geometry(
        stem_filters=32,
        stem_kernel=3,
        stages=(Stage(128, 1, 3), Stage(256, 2, 2), Stage(512, 2, 1)),
        tail=((1024, 1), (1024, 1), (1024, 1)),
    ),
    # The authors' Caffe graph; Wang et al. 2017, table 2.
    "imagenet": Geometry(
        stem_filters=64,
        stem_kernel=7,
        stem_strides=2,
        stem_norm=True,
        stem_pool=3,
        stages=(Stage(256, 1, 3), Stage(512, 2, 2), Stage(1024, 2, 1)),
        tail=((2048, 2), (2048, 1), (2048, 1)),
        pixels=224,
        classes=1000,
    ),
}


class Depth(NamedTuple):
    """Units in each attention block, see `Module.AttentionBlock`."""

    p: int = 1
    t: int = 2
    r: int = 1
    r_up: int | None = None


# Depths whose blocks differ from p = 1, t = 2, r = 1. Attention-452: the paper's p, t and r; with one unit per level on
# the way up, the network has the published 8.6 M parameters.
DEPTHS = {452: Depth(p=2, t=4, r=3, r_up=1)}

# The choices of `Module.AttentionBlock`, repeated so that reading them starts no framework; a test compares them.
LEARNING = ("arl", "nal")
ATTENTION = ("mixed", "channel", "spatial")
MASKS = ("encoder_decoder", "local")

# The paper's families and the kind of their unit.
FAMILIES = {"attention": "residual", "attentionnext": "resnext", "attentioninception": "inception"}
TITLES = {"attention": "Attention", "attentionnext": "AttentionNeXt", "attentioninception": "AttentionInception"}
NAME = re.compile(rf"({'|'.join(FAMILIES)})_(\d{{1,4}})")
NETWORKS = (
    *(f"attention_{depth}" for depth in (56, 92, 128, 164, 236, 452)),
    "attentionnext_56",
    "attentionnext_92",
    "attentioninception_56",
)


def parse_name(name):
    """Return the unit's kind and the depth of a network's name, such as `attentionnext_92`.

    Raises:
        ValueError: not a network's name.
    """
    match = NAME.fullmatch(name)
    if not match:
        families = ", ".join(f"{family}_DEPTH" for family in FAMILIES)
        raise ValueError(f"the name of a network must be one of {families}, received {name!r:.80}")
    return FAMILIES[match[1]], int(match[2])


def format_name(name):
    """Return the name of a network as the paper writes it: AttentionNeXt-92 for `attentionnext_92`.

    Other texts, such as the name of a file, are returned as they are.
    """
    match = NAME.fullmatch(name)
    return f"{TITLES[match[1]]}-{match[2]}" if match else name


def blocks_per_stage(depth, p, t, rising):
    """Return the number of attention blocks in each of the three stages of a network of `depth` trunk layers.

    `depth = 9 (2p + t) m + 20` for m blocks per stage: 36 m + 20 with the paper's p = 1, t = 2 (Wang et al. 2017,
    section 4.1). With `rising`, Attention-92 (m = 2) has the 1, 2, 3 blocks of the ImageNet networks.

    Raises:
        ValueError: no whole m gives this depth.
    """
    step = 9 * (2 * p + t)
    m, rest = divmod(depth - 20, step)
    if m < 1 or rest:
        near = max(m, 1) * step + 20
        raise ValueError(
            f"depth must be {step} m + 20 with p={p}, t={t} (such as {near} or {near + step}), received {depth}"
        )
    return (1, 2, 3) if rising and m == 2 else (m, m, m)

"""Counts weights and multiply-adds of all networks by arithmetic on their description.

Nothing is built: each function goes through a part of the description with only sizes and channels, and adds its
counts to a tally. Run as a program, this file prints a table of all networks.
"""

import math
from dataclasses import dataclass

FAMILIES = ("attention", "attentionnext", "attentioninception")
GEOMETRIES = ("imagenet", "compact", "full", "paper")
CARDINALITY = 32


@dataclass(frozen=True)
class Plan:
    """A geometry: image size, classes, the stem, then widths and strides of stages and tail."""

    size: int
    classes: int
    stem: int
    stem_stride: int
    stem_channels: int
    stem_norm: bool
    stem_pool: str
    widths: tuple[int, int, int]
    first_stride: int
    tail: int
    tail_stride: int
    closing: bool


PLANS = {
    "imagenet": Plan(224, 1000, 7, 2, 64, True, "3x3", (256, 512, 1024), 1, 2048, 2, False),
    "compact": Plan(32, 10, 5, 1, 32, False, "2x2", (128, 256, 512), 1, 1024, 1, False),
    "full": Plan(32, 10, 3, 1, 32, False, "", (128, 256, 512), 1, 1024, 1, False),
    "paper": Plan(32, 10, 3, 1, 16, False, "", (64, 128, 256), 1, 0, 1, True),
}


def halve(size: int) -> int:
    """Return the size after a convolution of stride 2 that is padded on both sides."""
    return math.ceil(size / 2)


def pool(size: int) -> int:
    """Return the size after 3x3 pooling of stride 2 in ceil mode."""
    return max(1, math.ceil((size - 3) / 2) + 1)


class Tally:
    """The counts so far."""

    def __init__(self, family: str) -> None:
        self.family = family
        self.kernels = 0
        self.norm_channels = 0
        self.multiply_adds = 0

    def add_conv(self, kernel: int, inputs: int, outputs: int, size: int, groups: int = 1) -> None:
        """Add a convolution without bias, with an output of size x size pixels."""
        weights = kernel * kernel * (inputs // groups) * outputs
        self.kernels += weights
        self.multiply_adds += weights * size * size

    def add_norm(self, channels: int) -> None:
        """Add a batch normalization."""
        self.norm_channels += channels

    def add_unit(self, inputs: int, outputs: int, size: int, stride: int = 1) -> int:
        """Add a residual unit of the family, on size x size pixels; return the size of its output."""
        after = halve(size) if stride == 2 else size
        project = stride != 1 or inputs != outputs
        {
            "attention": self.add_preactivation_unit,
            "attentionnext": self.add_resnext_unit,
            "attentioninception": self.add_inception_unit,
        }[self.family](inputs, outputs, size, after)
        if project:
            self.add_conv(1, inputs, outputs, after)
            if self.family == "attentionnext":
                self.add_norm(outputs)
        return after

    def add_preactivation_unit(self, inputs: int, outputs: int, size: int, after: int) -> None:
        """Add three convolutions, each after a normalization."""
        inner = outputs // 4
        self.add_norm(inputs)
        self.add_conv(1, inputs, inner, size)
        self.add_norm(inner)
        self.add_conv(3, inner, inner, after)
        self.add_norm(inner)
        self.add_conv(1, inner, outputs, after)

    def add_resnext_unit(self, inputs: int, outputs: int, size: int, after: int) -> None:
        """Add three convolutions, the second in groups, each before a normalization."""
        inner = outputs // 2
        self.add_conv(1, inputs, inner, size)
        self.add_norm(inner)
        self.add_conv(3, inner, inner, after, CARDINALITY)
        self.add_norm(inner)
        self.add_conv(1, inner, outputs, after)
        self.add_norm(outputs)

    def add_inception_unit(self, inputs: int, outputs: int, size: int, after: int) -> None:
        """Add four branches of 5, 10, 4 and 5 sixteenths of C/4 channels, concatenated and widened."""
        n = outputs // 4
        five, ten, four = 5 * n // 16, 10 * n // 16, 4 * n // 16
        self.add_norm(inputs)
        self.add_conv(1, inputs, five, after)
        self.add_conv(1, inputs, ten, size)
        self.add_norm(ten)
        self.add_conv(3, ten, ten, after)
        self.add_conv(1, inputs, four, size)
        self.add_norm(four)
        self.add_conv(5, four, four, after)
        self.add_conv(1, inputs, five, after)
        joined = five + ten + four + five
        self.add_norm(joined)
        self.add_conv(1, joined, outputs, after)

    def add_units(self, channels: int, size: int, count: int) -> None:
        """Add units that keep size and channels."""
        for _ in range(count):
            self.add_unit(channels, channels, size)

    def add_block(self, channels: int, size: int, depth: int, p: int, t: int, r: int, r_up: int) -> None:
        """Add an attention block with an encoder-decoder mask of `depth` poolings."""
        self.add_units(channels, size, p + t + p)
        sizes = [size]
        for _ in range(depth):
            sizes.append(pool(sizes[-1]))
        for level in range(1, depth):
            self.add_units(channels, sizes[level], r)  # down
            self.add_units(channels, sizes[level], 1)  # skip
            self.add_units(channels, sizes[level], r_up)  # up
        self.add_units(channels, sizes[depth], r + r_up)
        if self.family != "attentionnext":
            self.add_norm(channels)
        self.add_conv(1, channels, channels, size)
        self.add_norm(channels)
        self.add_conv(1, channels, channels, size)


def plan_blocks(depth: int, geometry: str) -> tuple[tuple[int, int, int], int, int, int, int]:
    """Return the blocks in each stage, p, t, units per level down and units per level up."""
    if depth == 452:
        return (6, 6, 6), 2, 4, 3, 1
    if depth == 92 and geometry != "paper":
        return (1, 2, 3), 1, 2, 1, 1
    m, rest = divmod(depth - 20, 36)
    if rest or m < 1:
        raise ValueError(f"no network has {depth} layers")
    return (m, m, m), 1, 2, 1, 1


def count(
    name: str,
    geometry: str,
    classes: int | None = None,
    mask: str = "encoder_decoder",
    size: int | None = None,
) -> dict[str, int]:
    """Return weights, multiply-adds for one image and trunk depth of a network such as "attention_56"."""
    if mask != "encoder_decoder":
        raise ValueError(f"mask {mask!r} is not counted here")
    family, _, depth = name.rpartition("_")
    if family not in FAMILIES or not depth.isdigit():
        raise ValueError(f"unknown network {name!r}")
    if geometry not in PLANS:
        raise ValueError(f"unknown geometry {geometry!r}")
    plan = PLANS[geometry]
    classes = plan.classes if classes is None else classes
    size = plan.size if size is None else size
    blocks, p, t, r, r_up = plan_blocks(int(depth), geometry)
    tally = Tally(family)
    outside = 0

    if plan.stem_stride == 2:
        size = halve(size)
    tally.add_conv(plan.stem, 3, plan.stem_channels, size)
    if plan.stem_norm or family == "attentionnext":
        tally.add_norm(plan.stem_channels)
    if plan.stem_pool == "3x3":
        size = pool(size)
    elif plan.stem_pool == "2x2":
        size //= 2

    channels = plan.stem_channels
    for stage, (width, repeats) in enumerate(zip(plan.widths, blocks, strict=True)):
        size = tally.add_unit(channels, width, size, 2 if stage else plan.first_stride)
        channels = width
        outside += 1
        for _ in range(repeats):
            tally.add_block(channels, size, 3 - stage, p, t, r, r_up)
        if plan.closing:
            tally.add_units(channels, size, 1)
            outside += 1
    if plan.tail:
        size = tally.add_unit(channels, plan.tail, size, plan.tail_stride)
        channels = plan.tail
        tally.add_units(channels, size, 2)
        outside += 3
    if family != "attentionnext":
        tally.add_norm(channels)
    tally.add_conv(1, channels, classes, 1)  # the classifier

    trainable = tally.kernels + 2 * tally.norm_channels + classes
    return {
        "kernels": tally.kernels,
        "trainable": trainable,
        "parameters": trainable + 2 * tally.norm_channels,
        "multiply_adds": tally.multiply_adds,
        "trunk_depth": 2 + 3 * outside + 3 * (2 * p + t) * sum(blocks),
    }


def make_table() -> str:
    """Return a table of all networks in all geometries, one per line."""
    columns = ("kernels", "trainable", "parameters", "multiply_adds", "trunk_depth")
    lines = [f"{'geometry':9}{'network':24}" + "".join(f"{each:>16}" for each in columns)]
    for geometry in GEOMETRIES:
        for family in FAMILIES:
            depths = (56, 92) if geometry == "imagenet" else (56, 92, 128, 164, 236, 452)
            for depth in depths:
                counts = count(f"{family}_{depth}", geometry)
                cells = "".join(f"{counts[each]:>16,}" for each in columns)
                lines.append(f"{geometry:9}{family + '_' + str(depth):24}{cells}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(make_table())

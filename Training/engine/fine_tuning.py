"""Starts training from the weights of another run, and freezes layers."""

import re

import keras
import numpy as np

from Model.weights import DEFAULT_NETWORK
from Training.console import format_count
from Training.errors import InputError
from Training.runs import saved

CLASSIFIER = "logits"
STEM = "stem_convolve"
FUNCTION = ("learning", "attention")  # what an attention block computes without other weights
BLOCK = re.compile(r"(stage_\d+_attention_)(\d+)")
LAST_KERNELS = re.compile(r"((before|trunk|after)_unit_\d+/expand|mask_convolve_2)/kernel")  # of an attention block


def find_weighted_layers(network):
    """Return `{name: layer}` of the layers that have weights, in order."""
    return {layer.name: layer for layer in network.layers if layer.weights}


def _list_shapes(layer):
    return {weight.path.removeprefix(f"{layer.path}/"): tuple(weight.shape) for weight in layer.weights}


def find_difference(own, other, same_classes=False):
    """Describe the first difference between the layers of two networks, or return None.

    Args:
        own, other: dictionaries of layers, see `find_weighted_layers`.
        same_classes: bool, whether the classifiers must have the same shape too.
    """
    for name in [*own, *other]:
        if name not in other:
            return f"it has no layer {name}"
        if name not in own:
            return f"it has a layer {name}, which this network lacks"
    for name in [name for name in own if same_classes or name != CLASSIFIER]:
        ours, theirs = _list_shapes(own[name]), _list_shapes(other[name])
        for weight in [*ours, *theirs]:
            if ours.get(weight) != theirs.get(weight):
                return f"{name}/{weight} is {theirs.get(weight, 'not there')}, here {ours.get(weight, 'not there')}"
        for field in FUNCTION:
            ours, theirs = getattr(own[name], field, None), getattr(other[name], field, None)
            if ours != theirs:
                return f"{name} has {field}={theirs}, here {field}={ours}"
    return None


def _find_added_blocks(own, other):
    """Return `{name: name in other}` of the blocks that a deeper network adds, with the last block of their stage."""
    last = {}
    for match in filter(None, map(BLOCK.fullmatch, other)):
        last[match[1]] = match[0]
    added = {}
    for match in filter(None, map(BLOCK.fullmatch, own)):
        block = own[match[0]]
        if match[0] not in other and match[1] in last and block.unit.pre_activation and block.attention == "mixed":
            added[match[0]] = last[match[1]]
    return added


def _list_last_kernels(layer):
    """Return the kernels that end the units and the mask of an attention block; none for other layers."""
    return [w for w in layer.weights if LAST_KERNELS.fullmatch(w.path.removeprefix(f"{layer.path}/"))]


def _add_block(block, other):
    """Copy a block's weights, and set the kernels to 0 that end its units and its mask.

    The units are then identities and the mask is 1/2 everywhere: the block multiplies its input by 3/2 (ARL) or 1/2
    (NAL). Where a normalization comes next, as in the geometries without closing units, this has no effect.
    """
    block.set_weights(other.get_weights())
    for weight in _list_last_kernels(block):
        weight.assign(weight * 0)


def _is_untrained(layer):
    """Return whether a layer is a block from `_add_block` that has not been trained."""
    last = _list_last_kernels(layer)
    return bool(last) and not any(np.any(keras.ops.convert_to_numpy(weight)) for weight in last)


def _leave_out(layers, names):
    return {name: layer for name, layer in layers.items() if name not in names}


def _can_halve(own, other):
    """Return whether both networks differ in the stem as the geometries `full` and `compact` do."""
    if STEM not in own or STEM not in other:
        return False
    ours, theirs = _list_shapes(own[STEM]), _list_shapes(other[STEM])
    return {**ours, "kernel": (5, 5, *ours["kernel"][2:])} == theirs and ours["kernel"][:2] == (3, 3)


def _halve_kernel(kernel):
    """Return the 3x3 kernel that computes on an image what a 5x5 kernel computes on the image at twice its size.

    At twice the size, each pixel becomes 2x2 equal pixels, and the result is the mean over these four. Along each axis,
    the tap k of -2 to 2 is on the pixel floor((s + k) / 2) for the two positions s = 0 and 1.
    """
    taps = np.zeros((3, 5), kernel.dtype)
    for position in (0, 1):
        for k in range(-2, 3):
            taps[(position + k) // 2 + 1, k + 2] += 0.5
    return np.einsum("ai,bj,ijcd->abcd", taps, taps, kernel)


def load_weights(network, path, name=DEFAULT_NETWORK):
    """Copy the weights of a saved network into another, layer by layer, except a classifier of another shape.

    The mean that is subtracted from images is not copied, since it belongs to the data.

    The network may have more attention blocks than the saved one: Attention-92 can start from Attention-56. An added
    block starts from the weights of the last saved block of its stage, but as an identity up to a factor, so that the
    deeper network computes the same function at first. Source: Chen et al. 2016, "Net2Net",
    https://arxiv.org/abs/1511.05641, section 2.3.

    A network of the geometry "full" can start from one of "compact": its maps have twice the height and width, and the
    5x5 kernel of the stem becomes a 3x3 kernel that sees the image as the 5x5 kernel sees it at twice its size. This
    network does not compute the same function.

    Args:
        network: a functional model of `Model`.
        path: name of weights that come with the project, a run's folder with a `last.keras`, or a `.keras` file.
        name: str, name of the network, such as `attention_56`: the weights `cifar10` are then `attention_56-cifar10`.

    Returns:
        One line that reports what was loaded and what is new.

    Raises:
        InputError: there is no such file, or it is a different network; the message names the first difference.
    """
    path = saved.find(path, network=name)
    loaded = saved.load(path)
    own, other = find_weighted_layers(network), find_weighted_layers(loaded)
    added = _find_added_blocks(own, other)
    sources = {name: other[added.get(name, name)] for name in own if name in other or name in added}
    halved = {STEM} if _can_halve(own, other) else set()
    difference = find_difference(_leave_out(own, halved), _leave_out({**other, **sources}, halved))
    if difference:
        raise InputError(f"--weights {path} is a different network: {difference}")
    new = _list_shapes(own[CLASSIFIER]) != _list_shapes(other[CLASSIFIER])
    for name, layer in own.items():
        if name in added:
            _add_block(layer, sources[name])
        elif name in halved:
            kernel, *rest = sources[name].get_weights()
            layer.set_weights([_halve_kernel(kernel), *rest])
        elif name != CLASSIFIER or not new:
            layer.set_weights(sources[name].get_weights())
    classes = [layers[CLASSIFIER].units for layers in (other, own)]
    end = (
        f"the classifier is new, for {format_count(classes[1], 'class')} instead of {classes[0]}"
        if new
        else "so does the classifier"
    )
    if added:
        end += f"; new blocks, identities up to a factor at first: {', '.join(added)}"
    if halved:
        end += "; the 5x5 kernel of the stem became a 3x3 kernel"
    return f"{len(own) - new - len(added)} of {len(own)} layers start from the weights of {path}; {end}"


def freeze(network, name):
    """Freeze a network's layers up to `name`; their normalizations use the moving statistics.

    Args:
        network: a functional model of `Model`.
        name: str, name of a layer, or the first part of several names: "stem", "stage_1", "tail".

    Returns:
        One line that reports what is frozen.

    Raises:
        InputError: no layer has this name, none up to there has weights, no trainable weights would be left, or an
            added block would be frozen, which is an identity as long as it is not trained.
    """
    layers = network.layers
    last = max((i for i, each in enumerate(layers) if f"{each.name}_".startswith(f"{name}_")), default=None)
    if last is None:
        names = ", ".join(find_weighted_layers(network))
        raise InputError(f"freeze={name}: no layer has this name or prefix; the layers are {names}")
    kept = sum(1 for layer in layers[: last + 1] if layer.weights)
    if not kept:
        raise InputError(f"freeze={name}: no layer up to this one has weights")
    for layer in filter(_is_untrained, layers[: last + 1]):
        raise InputError(f"freeze={name} would keep {layer.name} as it is, but this block is new and must be trained")
    for layer in layers[: last + 1]:
        layer.trainable = False
    if not network.trainable_weights:
        raise InputError(f"freeze={name} leaves no weights to train")
    return (
        f"{format_count(kept, 'layer')} up to {layers[last].name} {'keep their' if kept > 1 else 'keeps its'} weights"
    )

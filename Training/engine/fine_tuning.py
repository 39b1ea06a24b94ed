"""Starts training from the weights of another run, and freezes layers."""

from Model.weights import DEFAULT_NETWORK
from Training.console import format_count
from Training.errors import InputError
from Training.runs import saved

CLASSIFIER = "logits"
FUNCTION = ("learning", "attention")  # what an attention block computes without other weights


def _find_weighted_layers(network):
    """Return `{name: layer}` of the layers that have weights, in order."""
    return {layer.name: layer for layer in network.layers if layer.weights}


def _list_shapes(layer):
    return {weight.path.removeprefix(f"{layer.path}/"): tuple(weight.shape) for weight in layer.weights}


def _find_difference(own, other):
    """Describe the first difference between the layers of two networks, or return None; classifiers may differ."""
    for name in [*own, *other]:
        if name not in other:
            return f"it has no layer {name}"
        if name not in own:
            return f"it has a layer {name}, which this network lacks"
    for name in [name for name in own if name != CLASSIFIER]:
        ours, theirs = _list_shapes(own[name]), _list_shapes(other[name])
        for weight in [*ours, *theirs]:
            if ours.get(weight) != theirs.get(weight):
                return f"{name}/{weight} is {theirs.get(weight, 'not there')}, here {ours.get(weight, 'not there')}"
        for field in FUNCTION:
            ours, theirs = getattr(own[name], field, None), getattr(other[name], field, None)
            if ours != theirs:
                return f"{name} has {field}={theirs}, here {field}={ours}"
    return None


def load_weights(network, path, name=DEFAULT_NETWORK):
    """Copy the weights of a saved network into another, layer by layer, except a classifier of another shape.

    The mean that is subtracted from images is not copied, since it belongs to the data.

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
    own, other = _find_weighted_layers(network), _find_weighted_layers(loaded)
    difference = _find_difference(own, other)
    if difference:
        raise InputError(f"--weights {path} is a different network: {difference}")
    new = _list_shapes(own[CLASSIFIER]) != _list_shapes(other[CLASSIFIER])
    for name, layer in own.items():
        if name != CLASSIFIER or not new:
            layer.set_weights(other[name].get_weights())
    classes = [layers[CLASSIFIER].units for layers in (other, own)]
    end = (
        f"the classifier is new, for {format_count(classes[1], 'class')} instead of {classes[0]}"
        if new
        else "so does the classifier"
    )
    return f"{len(own) - new} of {len(own)} layers start from the weights of {path}; {end}"


def freeze(network, name):
    """Freeze a network's layers up to `name`; their normalizations use the moving statistics.

    Args:
        network: a functional model of `Model`.
        name: str, name of a layer, or the first part of several names: "stem", "stage_1", "tail".

    Returns:
        One line that reports what is frozen.

    Raises:
        InputError: no layer has this name, or no trainable weights would be left.
    """
    layers = network.layers
    last = max((i for i, each in enumerate(layers) if f"{each.name}_".startswith(f"{name}_")), default=None)
    if last is None:
        names = ", ".join(_find_weighted_layers(network))
        raise InputError(f"freeze={name}: no layer has this name or prefix; the layers are {names}")
    for layer in layers[: last + 1]:
        layer.trainable = False
    if not network.trainable_weights:
        raise InputError(f"freeze={name} leaves no weights to train")
    kept = sum(1 for layer in layers[: last + 1] if layer.weights)
    return (
        f"{format_count(kept, 'layer')} up to {layers[last].name} {'keep their' if kept > 1 else 'keeps its'} weights"
    )

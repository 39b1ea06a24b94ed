"""A network that begins with the weights of another run, and that keeps some of them."""

from Training.errors import InputError
from Training.runs import saved

CLASSIFIER = "logits"


def _weighty(network):
    """`{name: layer}` of the layers that have weights, in their order."""
    return {layer.name: layer for layer in network.layers if layer.weights}


def _shapes(layer):
    return {weight.path.removeprefix(f"{layer.path}/"): tuple(weight.shape) for weight in layer.weights}


def _difference(own, other):
    """Where two networks' layers differ, the first place in words, or None; the classifiers may."""
    for name in [*own, *other]:
        if name not in other:
            return f"it has no layer {name}"
        if name not in own:
            return f"it has a layer {name}, which this one lacks"
    for name in [name for name in own if name != CLASSIFIER]:
        ours, theirs = _shapes(own[name]), _shapes(other[name])
        for weight in [*ours, *theirs]:
            if ours.get(weight) != theirs.get(weight):
                return f"{name}/{weight} is {theirs.get(weight, 'not there')}, here {ours.get(weight, 'not there')}"
    return None


def load_weights(network, path):
    """Give a network the weights of a saved one, layer by layer; a classifier of other shape stays new.

    The mean that is subtracted from images belongs to the data and is no weight: it stays the network's own.

    Args:
        network: the functional model of `Model`.
        path: a `.keras` file, or a run's folder with its `last.keras`.

    Returns:
        One line that says what was loaded and what is new.

    Raises:
        InputError: no such file, or another network; names the first difference.
    """
    path = saved.find(path)
    loaded = saved.load(path)
    own, other = _weighty(network), _weighty(loaded)
    difference = _difference(own, other)
    if difference:
        raise InputError(f"--weights {path} is another network's: {difference}")
    new = _shapes(own[CLASSIFIER]) != _shapes(other[CLASSIFIER])
    for name, layer in own.items():
        if name != CLASSIFIER or not new:
            layer.set_weights(other[name].get_weights())
    classes = [layers[CLASSIFIER].units for layers in (other, own)]
    end = f"the classifier is new, for {classes[1]} classes in place of {classes[0]}" if new else "the classifier, too"
    return f"{len(own) - new} of {len(own)} layers begin with the weights of {path}; {end}"


def freeze(network, name):
    """Keep the weights of a network's layers up to `name`; its normalizations use their moving statistics.

    Args:
        network: the functional model of `Model`.
        name: a layer's, or what the names of several begin with: "stem", "stage_1", "tail".

    Returns:
        One line that says what is kept.

    Raises:
        InputError: no layer is called so, or none would be left to train.
    """
    layers = network.layers
    last = max((i for i, each in enumerate(layers) if f"{each.name}_".startswith(f"{name}_")), default=None)
    if last is None:
        names = ", ".join(_weighty(network))
        raise InputError(f"freeze={name}: no layer is called so or begins with it; there are {names}")
    for layer in layers[: last + 1]:
        layer.trainable = False
    if not network.trainable_weights:
        raise InputError(f"freeze={name} leaves nothing to train")
    kept = sum(1 for layer in layers[: last + 1] if layer.weights)
    return f"{kept} layers up to {layers[last].name} keep their weights"

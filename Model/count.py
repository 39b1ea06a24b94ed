"""Counts the cost of a network from its built layers."""

import math

from keras import layers

from Module import AttentionBlock, Unit


def _parts(layer):
    """Return a model or layer and all layers inside it."""
    return list(layer._flatten_layers())


def _multiply_adds(layer):
    """Return the multiplications of a convolution or dense layer for one image, without additions of biases."""
    if isinstance(layer, layers.Conv2D):
        _, height, width, _ = layer.compute_output_shape(layer.get_build_config()["input_shape"])
        return math.prod(layer.kernel.shape) * height * width
    if isinstance(layer, layers.Dense):
        return math.prod(layer.kernel.shape)
    return 0


def _convolutions(chain):
    return sum(isinstance(layer, layers.Conv2D) for layer in chain)


def _depth(layer):
    """Return the weighted layers that a top-level layer adds to the trunk, without shortcuts and masks."""
    if isinstance(layer, AttentionBlock):
        return sum(map(_depth, (*layer.before, *layer.trunk, *layer.after)))
    if isinstance(layer, Unit):
        return max(map(_convolutions, layer.paths))
    return int(isinstance(layer, (layers.Conv2D, layers.Dense)))


def count(model):
    """Count the weights, multiply-adds and depth of a network.

    Returns:
        A dictionary: `kernels`, the weights of convolutions and classifier without biases and normalization;
        `trainable` and `parameters`, all trainable weights and all weights; `multiply_adds`, those of convolutions and
        classifier for one image; `trunk_depth`, the weighted layers along the trunk.
    """
    weighted = [part for part in _parts(model) if isinstance(part, (layers.Conv2D, layers.Dense))]
    return {
        "kernels": sum(math.prod(part.kernel.shape) for part in weighted),
        "trainable": sum(math.prod(w.shape) for w in model.trainable_weights),
        "parameters": model.count_params(),
        "multiply_adds": sum(map(_multiply_adds, weighted)),
        "trunk_depth": sum(map(_depth, model.layers)),
    }

"""Models that show what happens inside a network: attention masks, features, and how strongly layers respond."""

import keras
import numpy as np
from keras import ops

from Module import AttentionBlock, Branches, Unit


def find_blocks(network):
    """Return the attention blocks of a network, in order."""
    return [layer for layer in network.layers if isinstance(layer, AttentionBlock)]


def make_model(image, outputs, name):
    """Return a model for `predict` of a few images.

    TensorFlow runs it eagerly: tracing a graph takes longer than some batches. JAX compiles it, which is faster there.
    """
    model = keras.Model(image, outputs, name=name)
    model.compile(run_eagerly=keras.backend.backend() == "tensorflow")
    return model


def make_branch_model(network):
    """Return a model from images to `{block's name: {"trunk": ..., "mask": ...}}`, each `(batch, h, w, channels)`."""
    both = {block.name: Branches(block, name=f"{block.name}_branches")(block.input) for block in find_blocks(network)}
    return make_model(network.input, both, f"{network.name}_branches")


def make_mask_model(network):
    """Return a model from images to the soft masks of all blocks, `{block's name: (batch, h, w, channels)}`."""
    masks = {name: both["mask"] for name, both in make_branch_model(network).output.items()}
    return make_model(network.input, masks, f"{network.name}_masks")


def make_view_model(network):
    """Return a model from images to the class probabilities and the branches of all attention blocks, in one pass.

    Its outputs are `{"probabilities": (batch, classes), "branches": ...}`, see `make_branch_model`.
    """
    outputs = {"probabilities": network.output, "branches": make_branch_model(network).output}
    return keras.Model(network.input, outputs, name=f"{network.name}_view")


def make_feature_model(network):
    """Return a model from images to the features before the classifier, `(batch, channels)`."""
    return keras.Model(network.input, network.get_layer("logits").input, name=f"{network.name}_features")


class AveragedMask(AttentionBlock):
    """An attention block whose soft mask is replaced by its mean over the positions of the map, or by `values`.

    `values`, float `(filters,)` or None, is then the mask of all images and positions.
    """

    values = None

    def _soft_mask(self, x):
        if self.values is None:
            return ops.mean(super()._soft_mask(x), axis=(1, 2), keepdims=True)
        return ops.cast(ops.reshape(self.values, (1, 1, 1, self.filters)), self.compute_dtype)


def average_masks(network, images=None, batch_size=64):
    """Return a copy of a network whose soft masks do not depend on the position or, with `images`, on anything.

    The mask of a channel is replaced by its mean over the positions of the map. With `images`, it is replaced by its
    mean over these images and all positions: the blocks no longer attend to anything, and their features keep their
    scale.

    Args:
        network: a functional model of `Model`.
        images: uint8 `(n, height, width, 3)`, or None.
        batch_size: int, images per batch.
    """
    values = {} if images is None else measure_masks(network, images, batch_size)

    def replace(layer):
        if not isinstance(layer, AttentionBlock):
            return type(layer).from_config(layer.get_config())
        block = AveragedMask.from_config(layer.get_config())
        block.values = values.get(block.name)
        return block

    copy = keras.models.clone_model(network, clone_function=replace)
    copy.set_weights(network.get_weights())
    return copy


def measure_masks(network, images, batch_size=64):
    """Return the mean of each channel of the soft masks over images and positions, `{block: float (channels,)}`."""
    masks = make_mask_model(network).output
    means = {name: ops.mean(mask, axis=(1, 2)) for name, mask in masks.items()}
    model = make_model(network.input, means, f"{network.name}_mask_means")
    measured = model.predict(images, batch_size=batch_size, verbose=0)
    return {name: _average(each) for name, each in measured.items()}


def measure_responses(network, images, batch_size=64):
    """Return the mean absolute response of the features after each residual unit and attention block.

    Wang et al. 2017, figure 4.

    Args:
        network: a functional model of `Model`.
        images: uint8 `(n, height, width, 3)`, over which the mean is taken.
        batch_size: int, images per batch.

    Returns:
        `{layer's name: float}`, in the order of the network.
    """
    parts = [layer for layer in network.layers if isinstance(layer, AttentionBlock | Unit)]
    means = {part.name: keras.ops.mean(keras.ops.abs(part.output), axis=(1, 2, 3)) for part in parts}
    model = make_model(network.input, means, f"{network.name}_responses")
    measured = model.predict(images, batch_size=batch_size, verbose=0)
    return {part.name: float(_average(measured[part.name])) for part in parts}


def _average(values):
    """Average over the first axis in float32: NumPy would sum bfloat16 in bfloat16, where a sum stops growing."""
    return np.asarray(values, "float32").mean(axis=0)

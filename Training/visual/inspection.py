"""Models that show what happens inside a network: attention masks, features, and how strongly layers respond."""

import keras

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
    return {part.name: float(measured[part.name].mean()) for part in parts}

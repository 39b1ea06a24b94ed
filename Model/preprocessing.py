"""The preprocessing of raw pixels before the first convolution, which is part of the saved model."""

import numpy as np
from keras import layers


def mean_subtraction(mean, std=255.0):
    """Make the layer `(x - mean) / std`, so that a saved model takes raw images.

    Wang et al. 2017, section 4.1, subtract the mean of each pixel; the division by 255 only keeps numbers small (the
    layers after the stem normalize). Section 4.2 uses mean and deviation of each channel.

    Args:
        mean: float32 `(height, width, channels)` or `(channels,)`.
        std: float, or float32 of a shape that broadcasts to that of the mean.

    Returns:
        A `keras.layers.Normalization`, float32 under every dtype policy.
    """
    axis = (1, 2, 3) if mean.ndim == 3 else -1
    variance = np.broadcast_to(np.float32(std) ** 2, mean.shape)
    return layers.Normalization(axis=axis, mean=mean, variance=variance, dtype="float32", name="mean_subtraction")


def read_mean_and_std(network):
    """Return the mean that a network subtracts and the number by which it divides, as float32 arrays.

    Raises:
        ValueError: the network does not have one `keras.layers.Normalization`.
    """
    found = [layer.get_config() for layer in network.layers if isinstance(layer, layers.Normalization)]
    if len(found) != 1:
        raise ValueError(f"the network must have one Normalization layer as its preprocessing, but has {len(found)}")
    return np.asarray(found[0]["mean"], "float32"), np.sqrt(np.asarray(found[0]["variance"], "float32"))

"""What a network does to raw pixels before its first convolution; it is part of the saved model."""

import numpy as np
from keras import layers


def mean_subtraction(mean, std=255.0):
    """The layer `(x - mean) / std`, so that a saved model takes raw images.

    Wang et al. 2017, section 4.1, subtract the mean of each pixel; the division by 255 only keeps numbers small (what
    follows the stem is normalized). Section 4.2 takes mean and deviation of each channel.

    Args:
        mean: float32 `(height, width, channels)` or `(channels,)`.
        std: float, or float32 `(channels,)`.
    """
    axis = (1, 2, 3) if mean.ndim == 3 else -1
    variance = np.broadcast_to(np.float32(std) ** 2, mean.shape)
    return layers.Normalization(axis=axis, mean=mean, variance=variance, dtype="float32", name="mean_subtraction")

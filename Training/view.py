"""Pictures: images side by side, soft masks over images, the confusion matrix."""

import io

import keras
import numpy as np

from Module import AttentionBlock, SoftMask


def mask_model(network):
    """A model from images to the soft masks of all attention blocks, `{block's name: (batch, h, w, channels)}`."""
    blocks = [layer for layer in network.layers if isinstance(layer, AttentionBlock)]
    masks = {block.name: SoftMask(block, name=f"{block.name}_mask")(block.input) for block in blocks}
    return keras.Model(network.inputs, masks, name=f"{network.name}_masks")


def enlarge(images, factor):
    """Each pixel of `(batch, h, w, channels)` as a square of `factor` pixels."""
    return np.repeat(np.repeat(images, factor, axis=1), factor, axis=2)


def row(images, gap=2):
    """A batch `(n, h, w, 3)` as one picture, side by side on white."""
    padded = np.pad(images, ((0, 0), (gap, gap), (gap, gap), (0, 0)), constant_values=255)
    return np.concatenate(list(padded), axis=1)


def heat(values):
    """`(..., h, w)` in [0, 1] as colours uint8 `(..., h, w, 3)`: matplotlib's viridis."""
    import matplotlib

    return (matplotlib.colormaps["viridis"](np.clip(values, 0, 1))[..., :3] * 255).astype("uint8")


def mask_picture(images, mask):
    """Images in the first row, below each the mean of its mask over the channels.

    Dark is the lowest and bright the highest weight of the picture: early in training, and where weights are decayed,
    all of them lie near 0.5.

    Args:
        images: uint8 `(n, size, size, 3)`.
        mask: `(n, h, w, channels)` in (0, 1).

    Returns:
        uint8 `(height, width, 3)`.
    """
    strength = np.asarray(mask, "float32").mean(axis=-1)  # (n, h, w)
    low, high = strength.min(), strength.max()
    strength = (strength - low) / max(high - low, 1e-6)
    factor = max(images.shape[1] // strength.shape[1], 1)
    heats = enlarge(heat(strength), factor)[:, : images.shape[1], : images.shape[2]]
    return np.concatenate([row(images), row(heats)], axis=0)


def confusion_picture(labels, predictions, classes):
    """The confusion matrix as a picture uint8 `(height, width, 3)`; rows are the true classes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix

    matrix = confusion_matrix(labels, predictions, labels=range(len(classes)))
    few = len(classes) <= 20
    figure = Figure(figsize=(7, 7) if few else (12, 12), layout="constrained")
    FigureCanvasAgg(figure)
    display = ConfusionMatrixDisplay(matrix, display_labels=classes if few else None)
    display.plot(ax=figure.subplots(), include_values=few, colorbar=False, xticks_rotation="vertical", cmap="Blues")
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3]


def png(picture):
    """A uint8 picture `(height, width, 3)` as the bytes of a PNG file."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()

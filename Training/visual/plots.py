"""Pictures: images side by side, soft masks over images, features, responses, curves, the confusion matrix."""

import io
from pathlib import Path

import numpy as np

from Training.errors import InputError, format_path

ENLARGED = 4  # times, images with masks over them: 32 pixels are too few to see both


def enlarge(images, factor):
    """Each pixel of `(batch, h, w, channels)` as a square of `factor` pixels."""
    return np.repeat(np.repeat(images, factor, axis=1), factor, axis=2)


def arrange_in_row(images, gap=2):
    """A batch `(n, h, w, 3)` as one picture, side by side on white."""
    padded = np.pad(images, ((0, 0), (gap, gap), (gap, gap), (0, 0)), constant_values=255)
    return np.concatenate(list(padded), axis=1)


def color_heat(values):
    """`(..., h, w)` in [0, 1] as colours uint8 `(..., h, w, 3)`: matplotlib's viridis."""
    import matplotlib

    return (matplotlib.colormaps["viridis"](np.clip(values, 0, 1))[..., :3] * 255).astype("uint8")


def rescale(values):
    """Values between 0 and 1: the lowest and the highest of all of them."""
    low, high = values.min(), values.max()
    return (values - low) / max(high - low, 1e-6)


def overlay(image, strength, opacity=0.6):
    """An image under the heat map of a strength `(h, w)` in [0, 1], which is upsampled to the image's size."""
    from PIL import Image

    height, width, _ = image.shape
    smooth = Image.fromarray(strength.astype("float32")).resize((width, height), Image.Resampling.BILINEAR)
    return ((1 - opacity) * image + opacity * color_heat(np.asarray(smooth))).round().astype("uint8")


def draw_mask_rows(images, mask):
    """Images in the first row; below each, as heat over it, the mean of its mask over the channels.

    Dark is the lowest and bright the highest weight of the picture: early in training, and where weights are decayed,
    all of them lie near 0.5.

    Args:
        images: uint8 `(n, size, size, 3)`.
        mask: `(n, h, w, channels)` in (0, 1).

    Returns:
        uint8 `(height, width, 3)`, enlarged `ENLARGED` times.
    """
    strength = rescale(np.asarray(mask, "float32").mean(axis=-1))  # (n, h, w)
    images = enlarge(images, ENLARGED)
    heats = np.stack([overlay(image, each) for image, each in zip(images, strength)])
    return np.concatenate([arrange_in_row(images), arrange_in_row(heats)], axis=0)


def _figure(rows, columns, width=1.6, height=1.75):
    """A matplotlib figure that needs no screen, and its axes `(rows, columns)`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(columns * width, rows * height), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _pixels(figure):
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3]


def _text(name):
    """A name as matplotlib draws it letter by letter: `$` begins no formula, and what cannot be encoded is escaped."""
    return format_path(name).replace("$", r"\$")


def _show(axes, picture, title="", **kwargs):
    axes.imshow(picture, **kwargs)
    axes.set_title(_text(title), fontsize=8)
    axes.set_xticks([])
    axes.set_yticks([])


def format_block_title(name, shape):
    """`stage_2_attention_1` and its mask's shape as "stage 2, block 1: 8x8"."""
    return f"{name.replace('_attention_', ', block ').replace('_', ' ')}: {shape[0]}x{shape[1]}"


def draw_masks(images, masks, names):
    """A row for each image: itself, then its mask of each block, as heat over it.

    The heat is the mean of the mask over the channels, from the lowest to the highest weight of each picture, which
    stand below it.

    Args:
        images: uint8 `(n, size, size, 3)`.
        masks: `{block's name: (n, h, w, channels)}`.
        names: strings, one an image.

    Returns:
        uint8 `(height, width, 3)`.
    """
    figure, axes = _figure(len(images), 1 + len(masks))
    for i, (image, name) in enumerate(zip(images, names)):
        _show(axes[i, 0], image, name)
        for j, (block, mask) in enumerate(masks.items(), start=1):
            strength = np.asarray(mask[i], "float32").mean(axis=-1)
            large = enlarge(image[None], max(128 // len(image), 1))[0]
            _show(
                axes[i, j],
                overlay(large, rescale(strength)),
                format_block_title(block, mask.shape[1:]) if i == 0 else "",
            )
            axes[i, j].set_xlabel(f"{strength.min():.3f} to {strength.max():.3f}", fontsize=7)
    return _pixels(figure)


def find_strongest(mask, count):
    """Channels of a mask `(h, w, channels)` with the highest mean weight, the strongest first."""
    return np.argsort(-np.asarray(mask, "float32").mean(axis=(0, 1)), kind="stable")[:count]


def apply_mask(trunk, mask, learning):
    """Features, the mask, and what it makes of them: `(1 + M) T` with `learning="arl"`, `M T` with "nal".

    Args:
        trunk, mask: arrays of one shape, see `Module.Branches`.

    Returns:
        `{"before": trunk, "mask": mask, "after": ...}`, arrays of that shape.
    """
    gain = 1 + mask if learning == "arl" else mask
    return {"before": trunk, "mask": mask, "after": gain * trunk}


def draw_channels(image, trunk, mask, learning, count=4):
    """Features before the mask, the soft mask, and features after it, as figure 1 of the paper shows them.

    Args:
        image: uint8 `(size, size, 3)`.
        trunk, mask: of one block for this image, `(h, w, channels)`, see `Module.Branches`.
        learning: "arl" for `(1 + M) T` after the mask, "nal" for `M T`.
        count: int, channels shown, those with the strongest masks.

    Returns:
        uint8 `(height, width, 3)`.
    """
    chosen = find_strongest(mask, count)
    figure, axes = _figure(len(chosen), 4)
    stages = apply_mask(trunk, mask, learning)
    for i, channel in enumerate(chosen):
        _show(axes[i, 0], image, "image")
        for axis, (title, stage) in zip(axes[i, 1:], stages.items()):
            values = stage[..., channel]
            _show(axis, values, f"{title}, channel {channel}", cmap="viridis")
            axis.set_xlabel(f"{values.min():.3g} to {values.max():.3g}", fontsize=7)
    return _pixels(figure)


def _merge_names(orders):
    """The names in several lists, in an order that is each list's own, as far as the lists agree."""
    names = []
    for order in sorted(orders, key=len, reverse=True):
        place = 0
        for name in order:
            if name not in names:
                names.insert(place, name)
            place = names.index(name) + 1
    return names


def draw_responses(measured):
    """Mean absolute responses along networks, as figure 4 of the paper.

    Args:
        measured: `{label: {layer's name: float}}`, see `inspection.measure_responses`; a line a label.
    """
    figure, axes = _figure(1, 1, 7, 4)
    axis = axes[0, 0]
    names = _merge_names(measured.values())
    for label, values in measured.items():
        axis.plot([names.index(name) for name in values], list(values.values()), marker="o", label=_text(label))
    axis.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=7)
    axis.set_ylabel("mean absolute response")
    axis.legend()
    return _pixels(figure)


def draw_curves(histories):
    """Training loss, and errors in per cent, over the epochs.

    Args:
        histories: `{label: [history, ...]}`, see `history.read_history`; the mean of a label's runs is drawn.
    """
    figure, axes = _figure(1, 2, 5, 4)
    panels = (("loss", "training loss"), ("accuracy", "training error, %"), ("val_accuracy", "validation error, %"))
    for i, (label, runs) in enumerate(histories.items()):
        for key, title in panels:
            length = min(len(run[key]) for run in runs) if all(key in run for run in runs) else 0
            if not length:
                continue
            mean = np.mean([run[key][:length] for run in runs], axis=0)
            axis, values = (axes[0, 0], mean) if key == "loss" else (axes[0, 1], 100 * (1 - mean))
            dashed, name = "--" if key == "accuracy" else "-", _text(f"{label}, {title.split(',')[0]}")
            axis.plot(range(1, length + 1), values, dashed, color=f"C{i % 10}", label=name)
    for axis, title in zip(axes[0], ("training loss", "error, %")):
        axis.set_xlabel("epoch")
        axis.set_ylabel(title)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    return _pixels(figure)


def draw_confusion(labels, predictions, classes):
    """The confusion matrix as a picture uint8 `(height, width, 3)`; rows are the true classes."""
    from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix

    matrix = confusion_matrix(labels, predictions, labels=range(len(classes)))
    few = len(classes) <= 20
    figure, axes = _figure(1, 1, *((7, 7) if few else (12, 12)))
    display = ConfusionMatrixDisplay(matrix, display_labels=list(map(_text, classes)) if few else None)
    display.plot(ax=axes[0, 0], include_values=few, colorbar=False, xticks_rotation="vertical", cmap="Blues")
    return _pixels(figure)


def encode_png(picture):
    """A uint8 picture `(height, width, 3)` as the bytes of a PNG file."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def save_picture(picture, path):
    """Write a uint8 picture as a PNG file.

    Raises:
        InputError: it cannot be written there.
    """
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(encode_png(picture))
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from None

"""Draws soft masks, features, responses, training curves, confusion matrices and wrong predictions."""

import functools
import io
from pathlib import Path

import numpy as np

from Training.errors import InputError, format_path
from Training.files import replace_file
from Training.visual.escaping import escape_figure, is_drawable, shorten_name

ENLARGED = 4  # factor for images side by side: 32 pixels are small on a screen
LEAST_SIDE = 96  # pixels of an image under a mask: in a smaller one, the two cannot be told apart
MOST_CLASSES = 2000  # in a confusion matrix, which takes 8 bytes for each pair of classes
NAMED_CLASSES = 20  # with more, the confusion matrix has numbers in place of names
LONGEST_LABEL = 24  # characters of the name of a class or an image
MARGINS = (92, 92)  # pixels left and right of rows of masks, for names and colour bars


def enlarge(images, factor):
    """Return images `(batch, h, w, channels)` with each pixel as a square of `factor` pixels."""
    return np.repeat(np.repeat(images, factor, axis=1), factor, axis=2)


def arrange_in_row(images, gap=2):
    """Return a batch `(n, h, w, 3)` as one picture, side by side on white."""
    padded = np.pad(images, ((0, 0), (gap, gap), (gap, gap), (0, 0)), constant_values=255)
    return np.concatenate(list(padded), axis=1)


def color_heat(values):
    """Return values `(..., h, w)` in [0, 1] as colours uint8 `(..., h, w, 3)`: matplotlib's viridis."""
    import matplotlib

    return (matplotlib.colormaps["viridis"](np.clip(values, 0, 1))[..., :3] * 255).astype("uint8")


def rescale(values):
    """Return values mapped linearly so that the lowest of all is 0 and the highest is 1."""
    low, high = values.min(), values.max()
    return (values - low) / max(high - low, 1e-6)


def overlay(image, strength, opacity=0.6):
    """Return an image in grey under the heat map of `strength`.

    Args:
        image: uint8 `(height, width, 3)`.
        strength: `(h, w)` in [0, 1]; upsampled to the size of the image.
        opacity: float, the share of the heat map in each pixel; the rest is the image in grey.

    Returns:
        uint8 `(height, width, 3)`.
    """
    from PIL import Image

    height, width, _ = image.shape
    smooth = Image.fromarray(strength.astype("float32")).resize((width, height), Image.Resampling.BILINEAR)
    grey = np.asarray(Image.fromarray(image).convert("L"))[..., None]
    return ((1 - opacity) * grey + opacity * color_heat(np.asarray(smooth))).round().astype("uint8")


def overlay_all(images, strength):
    """Return enlarged images `(n, height, width, 3)` under the heat maps of `strength` `(n, h, w)`.

    The lowest of all values is the darkest colour and the highest the brightest, so the images can be compared.
    """
    return np.stack([overlay(image, each) for image, each in zip(enlarge_enough(images), rescale(strength))])


def enlarge_enough(images):
    """Return images enlarged by a whole factor, to `LEAST_SIDE` pixels or a little less."""
    return enlarge(images, max(LEAST_SIDE // images.shape[1], 1))


def find_most_varied(mask, count):
    """Return the channels of a mask `(n, h, w, channels)` whose weights vary most over images and positions."""
    return np.argsort(-np.asarray(mask, "float32").std(axis=(0, 1, 2)), kind="stable")[:count]


def draw_mask_rows(images, mask, channels=3):
    """Draw the masks of one block: the images, the mean mask over them, and single channels over them.

    Each row of masks has a colour bar with its own range: the lowest weight in the row is the darkest colour. Early in
    training all weights are near 0.5.

    Args:
        images: uint8 `(n, size, size, 3)`.
        mask: `(n, h, w, channels)` in (0, 1).
        channels: int, number of single channels to draw: those that vary most over images and positions.

    Returns:
        uint8 `(height, width, 3)`.
    """
    mask = np.asarray(mask, "float32")
    rows = {"mean": mask.mean(axis=-1)}
    rows |= {f"channel {i}": mask[..., i] for i in find_most_varied(mask, channels)}
    strips = [arrange_in_row(enlarge_enough(images))]
    strips += [arrange_in_row(overlay_all(images, values)) for values in rows.values()]
    canvas = np.full((len(strips), *strips[0].shape), 255, "uint8")
    canvas[:] = strips
    canvas = np.pad(np.concatenate(canvas), ((0, 0), MARGINS, (0, 0)), constant_values=255)
    return _annotate_rows(canvas, rows)


def _annotate_rows(canvas, rows):
    """Write the name of each row of `draw_mask_rows` on its left, and draw its colour bar on its right.

    Pillow is used because matplotlib takes half a second, and a run draws such a picture for each block and epoch.
    """
    from PIL import Image, ImageDraw, ImageFont

    height, right = len(canvas) // (1 + len(rows)), canvas.shape[1] - MARGINS[1] + 12
    for i in range(1, 1 + len(rows)):
        top, bottom = i * height + 14, (i + 1) * height - 14
        canvas[top:bottom, right : right + 14] = color_heat(np.linspace(1, 0, bottom - top)[:, None])
    picture = Image.fromarray(canvas)
    draw = ImageDraw.Draw(picture)
    # TensorBoard shows the picture at 40 % of its size and skips pixels: thinner strokes would be lost.
    style = dict(fill="black", font=ImageFont.load_default(20), anchor="lm", stroke_width=0.5)
    for i, (name, values) in enumerate({"image": None, **rows}.items()):
        draw.text((4, (i + 0.5) * height), name.replace(" ", "\n"), **style)
        for share, value in ((0, values.max()), (1, values.min())) if i else ():
            draw.text((right + 20, i * height + 14 + share * (height - 28)), f"{value:.3f}", **style)
    return np.asarray(picture)


def _draw_color_bar(figure, values, **place):
    """Draw a colour bar with the lowest and the highest of the values as its ends."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    low, high = float(values.min()), float(values.max())
    scale = ScalarMappable(Normalize(low, high if high > low else low + 1e-6), "viridis")
    bar = figure.colorbar(scale, **place)
    bar.set_ticks([low, high] if high > low else [low], labels=[f"{low:.4g}", f"{high:.4g}"][: 1 + (high > low)])
    bar.ax.tick_params(labelsize=8)


def _empty_figure(width, height, **kwargs):
    """Return a matplotlib figure of this size in inches that needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), **kwargs)
    FigureCanvasAgg(figure)
    return figure


def _figure(rows, columns, width=1.6, height=1.75):
    """Return a figure of axes `(rows, columns)`, each of this size in inches, and the axes."""
    figure = _empty_figure(columns * width, rows * height, layout="constrained", dpi=110)
    figure.get_layout_engine().set(h_pad=0.08)  # inches: with less, the titles of the first row can be cut off
    return figure, figure.subplots(rows, columns, squeeze=False)


def _pixels(figure):
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3]


def _fit_titles(figure, axes):
    """Shrink titles that are wider than their axes, and leave room for those of the upper row."""
    figure.canvas.draw()  # sizes are known only now
    for axis in axes:
        room = axis.get_window_extent().width / max(axis.title.get_window_extent().width, 1)
        axis.title.set_fontsize(axis.title.get_fontsize() * min(room, 1))
    figure.canvas.draw()
    top = max(axis.title.get_window_extent().y1 for axis in axes) + 4  # pixels
    over = top / figure.bbox.height - 1
    if over > 0:
        figure.get_layout_engine().set(rect=(0, 0, 1, 1 - over))


def with_default_style(draw):
    """Make a function draw with matplotlib's own style, whatever the user's matplotlibrc says, such as to use LaTeX."""

    @functools.wraps(draw)
    def styled(*args, **kwargs):
        from matplotlib import style

        with style.context("default"):
            return draw(*args, **kwargs)

    return styled


def _show(axes, picture, title="", **kwargs):
    axes.imshow(picture, **kwargs)
    axes.set_title(escape_figure(title, LONGEST_LABEL), fontsize=8)
    axes.set_xticks([])
    axes.set_yticks([])


def label_names(names, kind):
    """Return labels that fit into a figure: shortened names, or numbers for names that the font cannot draw.

    Args:
        names: strings.
        kind: what a number stands for, such as "image"; "" for the number alone.
    """
    short = [shorten_name(name, LONGEST_LABEL) for name in names]
    labels = []
    for i, (name, label) in enumerate(zip(names, short)):
        if not is_drawable(label) or not label.strip():
            label = f"{kind} {i}".strip()
        elif label != name and short.count(label) > 1:
            label = f"{i}: {shorten_name(name, LONGEST_LABEL - len(f'{i}: '))}"
        labels.append(label)
    return labels


def format_block_title(name, shape):
    """Return `stage_2_attention_1` and its mask's shape as "stage 2, block 1: 8x8"."""
    return f"{name.replace('_attention_', ', block ').replace('_', ' ')}: {shape[0]}x{shape[1]}"


@with_default_style
def draw_masks(images, masks, names):
    """Draw a row for each image: the image, then the mask of each block as heat over it.

    The heat is the mean of the mask over the channels. The colour bar below a block has the lowest and the highest
    mean of all images of this figure as its ends: the colours of two blocks are on different scales.

    Args:
        images: uint8 `(n, size, size, 3)`.
        masks: `{block's name: (n, h, w, channels)}`.
        names: strings, one for each image.

    Returns:
        uint8 `(height, width, 3)`.
    """
    figure, axes = _figure(len(images), 1 + len(masks), height=1.75 + 0.45 / len(images))
    for axis, image, label in zip(axes[:, 0], images, label_names(names, "image")):
        _show(axis, image, label)
    for column, (block, mask) in zip(axes.T[1:], masks.items()):
        strength = np.asarray(mask, "float32").mean(axis=-1)  # (n, h, w)
        for axis, heat in zip(column, overlay_all(images, strength)):
            _show(axis, heat)
        title = escape_figure(format_block_title(block, mask.shape[1:]), LONGEST_LABEL)
        column[0].set_title(title, fontsize=8)
        _draw_color_bar(figure, strength, ax=column, location="bottom", shrink=0.7)
    _fit_titles(figure, axes.ravel())
    return _pixels(figure)


def find_strongest(mask, count):
    """Return the channels of a mask `(h, w, channels)` with the highest mean weight, the strongest first."""
    return np.argsort(-np.asarray(mask, "float32").mean(axis=(0, 1)), kind="stable")[:count]


def apply_mask(trunk, mask, learning):
    """Return features, the mask, and their product: `(1 + M) T` with `learning="arl"`, `M T` with "nal".

    Args:
        trunk, mask: arrays of one shape, see `Module.Branches`.

    Returns:
        `{"before": trunk, "mask": mask, "after": ...}`, arrays of that shape.
    """
    gain = 1 + mask if learning == "arl" else mask
    return {"before": trunk, "mask": mask, "after": gain * trunk}


@with_default_style
def draw_channels(image, trunk, mask, learning, count=4):
    """Draw features before the mask, the soft mask, and features after it, as in figure 1 of the paper.

    Each map has its own colour bar with its lowest and its highest value.

    Args:
        image: uint8 `(size, size, 3)`.
        trunk, mask: branches of one block for this image, `(h, w, channels)`, see `Module.Branches`.
        learning: "arl" for `(1 + M) T` after the mask, "nal" for `M T`.
        count: int, number of channels to draw: those with the strongest masks.

    Returns:
        uint8 `(height, width, 3)`.
    """
    chosen = find_strongest(mask, count)
    figure, axes = _figure(len(chosen), 4, width=1.9)
    stages = apply_mask(trunk, mask, learning)
    for i, channel in enumerate(chosen):
        _show(axes[i, 0], image, "image")
        for axis, (title, stage) in zip(axes[i, 1:], stages.items()):
            values = stage[..., channel]
            _show(axis, values, f"{title}, channel {channel}", cmap="viridis")
            _draw_color_bar(figure, values, ax=axis)
    return _pixels(figure)


def _merge_names(orders):
    """Return the names in several lists, in an order that agrees with each list as far as the lists agree."""
    names = []
    for order in sorted(orders, key=len, reverse=True):
        place = 0
        for name in order:
            if name not in names:
                names.insert(place, name)
            place = names.index(name) + 1
    return names


@with_default_style
def draw_responses(measured):
    """Draw mean absolute responses along networks, as in figure 4 of the paper.

    The axis is logarithmic: with naive attention learning, responses fall by orders of magnitude.

    Args:
        measured: `{label: {layer's name: float}}`, see `inspection.measure_responses`; one line per label.
    """
    figure, axes = _figure(1, 1, 7, 4)
    axis = axes[0, 0]
    names = _merge_names(measured.values())
    for label, values in measured.items():
        axis.plot([names.index(name) for name in values], list(values.values()), marker="o", label=escape_figure(label))
    axis.set_yscale("log")
    axis.set_xticks(range(len(names)), map(escape_figure, names), rotation=60, ha="right", fontsize=7)
    axis.set_ylabel("mean absolute response, log scale")
    axis.grid(alpha=0.3)
    axis.legend()
    return _pixels(figure)


@with_default_style
def draw_curves(histories):
    """Draw training loss, and errors in per cent, over the epochs.

    Args:
        histories: `{label: [history, ...]}`, see `history.read_history`; the mean over the runs of a label is drawn.
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
            dashed, name = "--" if key == "accuracy" else "-", f"{escape_figure(label)}, {title.split(',')[0]}"
            marker = "o" if length == 1 else None  # a line of one point would be invisible
            axis.plot(range(1, length + 1), values, dashed, marker=marker, color=f"C{i % 10}", label=name)
    for axis, title in zip(axes[0], ("training loss", "error, %")):
        axis.set_xlabel("epoch")
        axis.set_ylabel(title)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=7)
    return _pixels(figure)


@with_default_style
def draw_confusion(labels, predictions, classes):
    """Draw the confusion matrix: rows are true classes, columns predicted classes.

    With up to `NAMED_CLASSES` classes, the axes have names, and each cell its number of images. With more, classes are
    numbered from 0, and only the colour shows the share of the true class.

    Args:
        labels, predictions: int, `(n,)`.
        classes: names, at most `MOST_CLASSES`.

    Returns:
        uint8 `(height, width, 3)`.
    """
    from matplotlib.colors import PowerNorm
    from sklearn.metrics import confusion_matrix

    count = len(classes)
    matrix = confusion_matrix(labels, predictions, labels=range(count))
    share = 100 * matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    named = count <= NAMED_CLASSES
    side = min(max(0.36 * count + 1.2, 3), 8) if count <= 200 else 13  # inches: TensorBoard shows few of its pixels
    figure, axes = _figure(1, 1, side + 0.9, side)
    axis = axes[0, 0]
    # With a square-root scale, single errors are visible next to the diagonal.
    picture = axis.imshow(share, cmap="Blues", norm=PowerNorm(0.5, 0, 100), interpolation="nearest")
    figure.colorbar(picture, ax=axis, shrink=0.8, label="% of the true class", ticks=[0, 1, 5, 20, 50, 100])
    axis.set_xlabel("predicted class")
    axis.set_ylabel("true class")
    if not named:
        step = next(each for each in (5, 10, 20, 50, 100, 200) if count / each <= 25)
        axis.set_xticks(range(0, count, step))
        axis.set_yticks(range(0, count, step))
        return _pixels(figure)
    names = [escape_figure(name, LONGEST_LABEL) for name in label_names(classes, "")]
    axis.set_xticks(range(count), names, rotation="vertical")
    axis.set_yticks(range(count), names)
    for (row, column), number in np.ndenumerate(matrix):
        color = "white" if share[row, column] > 25 else "black"
        axis.text(column, row, number, ha="center", va="center", color=color, fontsize=9)
    return _pixels(figure)


def find_mistakes(labels, probabilities, count):
    """Return the positions of the most confidently wrong images, the most confident first."""
    predictions = probabilities.argmax(axis=-1)
    wrong = np.flatnonzero(predictions != labels)
    return wrong[np.argsort(-probabilities[wrong, predictions[wrong]], kind="stable")][:count]


@with_default_style
def draw_mistakes(images, labels, probabilities, classes, columns=6):
    """Draw wrongly classified images with the true class, the predicted class and its probability.

    Args:
        images: uint8 `(n, height, width, 3)`.
        labels: int, `(n,)`.
        probabilities: `(n, classes)`.
        classes: names.

    Returns:
        uint8 `(height, width, 3)`.
    """
    names = label_names(classes, "class")
    rows = -(-len(images) // columns)
    figure, axes = _figure(rows, columns, 1.9, 2.2)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, label, shares in zip(axes.flat, images, labels, probabilities):
        axis.imshow(image)
        best = shares.argmax()
        true, taken = (escape_figure(names[i], LONGEST_LABEL) for i in (label, best))
        axis.set_title(f"{taken}: {100 * shares[best]:.0f} %\ntrue: {true}", fontsize=8)
    return _pixels(figure)


def make_sprite(images, size=32):
    """Return images as one square picture of thumbnails, row by row, as TensorBoard's projector expects.

    Args:
        images: uint8 `(n, height, width, 3)`.
        size: int, pixels of a thumbnail's side.

    Returns:
        uint8 `(k * size, k * size, 3)`, with k the root of n, rounded up.
    """
    from PIL import Image

    side = int(np.ceil(np.sqrt(len(images))))
    sprite = np.full((side * size, side * size, 3), 255, "uint8")
    for i, image in enumerate(images):
        top, left = i // side * size, i % side * size
        sprite[top : top + size, left : left + size] = np.asarray(Image.fromarray(image).resize((size, size)))
    return sprite


def encode_png(picture):
    """Return a uint8 picture `(height, width, 3)` as the bytes of a PNG file."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(buffer, "PNG")
    return buffer.getvalue()


def save_picture(picture, path):
    """Write a uint8 picture as a PNG file.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, encode_png(picture))
    except OSError as error:
        raise InputError(f"{format_path(path)} cannot be written: {error.strerror}") from None

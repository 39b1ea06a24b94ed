"""A second implementation of the ImageNet network in plain NumPy, written only from the description.

It is for inference only. Images and maps are (batch, rows, columns, channels), kernels (rows, columns, in, out). Arrays
are in a flat dictionary with structural names such as "stage1/block1/trunk2/conv2" or "tail/bn/gamma". Everything is
computed in the dtype of the weights.
"""

import math

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

EPSILON = 1e-5
STEM = 64
WIDTHS = (256, 512, 1024)
MASK_DEPTHS = (3, 2, 1)
TAIL = 2048
SCALES = {"conv3": 0.5, "mask/conv1": 0.5, "mask/conv2": 0.5}  # of random kernels, by the end of the name

Weights = dict[str, np.ndarray]
Shapes = dict[str, tuple[int, ...]]


# Shapes and random values of the parameters


def list_norm_shapes(name: str, channels: int) -> Shapes:
    """Return the shapes of the four arrays of a batch normalization."""
    return {f"{name}/{part}": (channels,) for part in ("gamma", "beta", "mean", "variance")}


def list_unit_shapes(name: str, inputs: int, outputs: int, stride: int = 1) -> Shapes:
    """Return the shapes of a residual unit; it has a projection if its stride or width changes the tensor."""
    inner = outputs // 4
    shapes = list_norm_shapes(f"{name}/bn1", inputs)
    shapes[f"{name}/conv1"] = (1, 1, inputs, inner)
    shapes |= list_norm_shapes(f"{name}/bn2", inner)
    shapes[f"{name}/conv2"] = (3, 3, inner, inner)
    shapes |= list_norm_shapes(f"{name}/bn3", inner)
    shapes[f"{name}/conv3"] = (1, 1, inner, outputs)
    if stride != 1 or inputs != outputs:
        shapes[f"{name}/project"] = (1, 1, inputs, outputs)
    return shapes


def list_block_shapes(name: str, channels: int, mask_depth: int, p: int = 1, t: int = 2, r: int = 1) -> Shapes:
    """Return the shapes of an attention block."""
    units = [f"before{n}" for n in range(1, p + 1)]
    units += [f"trunk{n}" for n in range(1, t + 1)]
    for level in range(1, mask_depth + 1):
        count = 2 * r if level == mask_depth else r
        units += [f"down{level}/unit{n}" for n in range(1, count + 1)]
    for level in range(mask_depth - 1, 0, -1):
        units += [f"skip{level}"] + [f"up{level}/unit{n}" for n in range(1, r + 1)]
    units += [f"after{n}" for n in range(1, p + 1)]
    shapes: Shapes = {}
    for each in units:
        shapes |= list_unit_shapes(f"{name}/{each}", channels, channels)
    for n in (1, 2):
        shapes |= list_norm_shapes(f"{name}/mask/bn{n}", channels)
        shapes[f"{name}/mask/conv{n}"] = (1, 1, channels, channels)
    return shapes


def list_network_shapes(blocks: tuple[int, int, int] = (1, 1, 1), classes: int = 1000) -> Shapes:
    """Return the shapes of the whole network, with `blocks` attention blocks in its stages."""
    shapes: Shapes = {"stem/conv": (7, 7, 3, STEM)}
    shapes |= list_norm_shapes("stem/bn", STEM)
    inputs = STEM
    for stage, (width, depth, count) in enumerate(zip(WIDTHS, MASK_DEPTHS, blocks, strict=True), 1):
        shapes |= list_unit_shapes(f"stage{stage}/unit", inputs, width, 1 if stage == 1 else 2)
        for n in range(1, count + 1):
            shapes |= list_block_shapes(f"stage{stage}/block{n}", width, depth)
        inputs = width
    shapes |= list_unit_shapes("tail/unit1", inputs, TAIL, 2)
    shapes |= list_unit_shapes("tail/unit2", TAIL, TAIL)
    shapes |= list_unit_shapes("tail/unit3", TAIL, TAIL)
    shapes |= list_norm_shapes("tail/bn", TAIL)
    shapes["classifier/kernel"] = (TAIL, classes)
    shapes["classifier/bias"] = (classes,)
    return shapes


def draw_values(shapes: Shapes, seed: int = 0) -> Weights:
    """Draw random float32 arrays of these shapes, scaled so that activations neither explode nor vanish."""
    random = np.random.default_rng(seed)
    values: Weights = {}
    for name, shape in shapes.items():
        part = name.rsplit("/", 1)[1]
        if part in ("gamma", "variance"):
            value = random.uniform(0.5, 1.5, shape)
        elif part in ("beta", "mean", "bias"):
            value = random.uniform(-0.3, 0.3, shape)
        else:
            scale = math.prod(scale for end, scale in SCALES.items() if name.endswith(f"/{end}"))
            value = random.normal(0, scale * math.sqrt(1 / math.prod(shape[:-1])), shape)
        values[name] = value.astype(np.float32)
    return values


def draw_weights(blocks: tuple[int, int, int] = (1, 1, 1), classes: int = 1000, seed: int = 0) -> Weights:
    """Draw random values for all parameters of the network."""
    return draw_values(list_network_shapes(blocks, classes), seed)


# Operations


def conv(x: np.ndarray, kernel: np.ndarray, stride: int = 1) -> np.ndarray:
    """Apply a convolution without bias, padded with (size - 1) / 2 zeros on every side."""
    size = kernel.shape[0]
    pad = (size - 1) // 2
    padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    windows = sliding_window_view(padded, (size, size), axis=(1, 2))[:, ::stride, ::stride]
    matrix = kernel.reshape(-1, kernel.shape[-1])
    columns = windows.transpose(0, 1, 2, 4, 5, 3).reshape(-1, len(matrix))
    return (columns @ matrix).reshape(*windows.shape[:3], -1)


def norm(x: np.ndarray, w: Weights, name: str) -> np.ndarray:
    """Apply batch normalization with the moving statistics."""
    scale = w[f"{name}/gamma"] / np.sqrt(w[f"{name}/variance"] + x.dtype.type(EPSILON))
    return (x - w[f"{name}/mean"]) * scale + w[f"{name}/beta"]


def norm_relu(x: np.ndarray, w: Weights, name: str) -> np.ndarray:
    """Apply batch normalization and ReLU."""
    return np.maximum(norm(x, w, name), 0)


def compute_pooled_size(size: int) -> int:
    """Return the rows or columns after 3x3 pooling of stride 2 in ceil mode."""
    if size < 2:
        raise ValueError("a map of one pixel cannot be compute_pooled_size")
    return math.ceil((size - 3) / 2) + 1


def pool(x: np.ndarray) -> np.ndarray:
    """Apply 3x3 max pooling with stride 2 and no padding; windows are clipped at the border."""
    rows, columns = ((compute_pooled_size(n) - 1) * 2 + 3 - n for n in x.shape[1:3])
    extended = np.pad(x, ((0, 0), (0, rows), (0, columns), (0, 0)), constant_values=-np.inf)
    return sliding_window_view(extended, (3, 3), axis=(1, 2))[:, ::2, ::2].max(axis=(-2, -1))


def make_interpolation_matrix(size: int, target: int, dtype: np.dtype) -> np.ndarray:
    """Return the (target, size) matrix of linear interpolation with aligned corners."""
    matrix = np.zeros((target, size))
    for row in range(target):
        place = row * (size - 1) / (target - 1) if target > 1 else 0.0
        low = min(int(place), size - 1)
        high = min(low + 1, size - 1)
        matrix[row, low] += 1 - (place - low)
        matrix[row, high] += place - low
    return matrix.astype(dtype)


def upsample(x: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Apply bilinear upsampling with aligned corners."""
    down = make_interpolation_matrix(x.shape[1], rows, x.dtype)
    across = make_interpolation_matrix(x.shape[2], columns, x.dtype)
    tall = np.moveaxis(np.tensordot(down, x, axes=(1, 1)), 0, 1)
    return np.moveaxis(np.tensordot(across, tall, axes=(1, 2)), 0, 2)


def sigmoid(x: np.ndarray) -> np.ndarray:
    """Apply the logistic function, without overflow."""
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, small) / (1 + small)


def attend(x: np.ndarray, attention: str = "mixed") -> np.ndarray:
    """Apply the last step of a mask: mixed, channel or spatial attention."""
    if attention == "mixed":
        return sigmoid(x)
    if attention == "channel":
        return x / np.sqrt(np.sum(x * x, axis=3, keepdims=True))
    if attention == "spatial":
        centred = x - x.mean(axis=(1, 2), keepdims=True)
        variance = np.mean(centred * centred, axis=(1, 2), keepdims=True)
        return sigmoid(centred / np.sqrt(variance + x.dtype.type(EPSILON)))
    raise ValueError(f"unknown attention {attention!r}")


# The network


def unit(x: np.ndarray, w: Weights, name: str, stride: int = 1) -> np.ndarray:
    """Apply a pre-activation residual unit."""
    active = norm_relu(x, w, f"{name}/bn1")
    inner = conv(active, w[f"{name}/conv1"])
    inner = conv(norm_relu(inner, w, f"{name}/bn2"), w[f"{name}/conv2"], stride)
    residual = conv(norm_relu(inner, w, f"{name}/bn3"), w[f"{name}/conv3"])
    projection = w.get(f"{name}/project")
    return residual + (x if projection is None else conv(active, projection, stride))


def block(
    x: np.ndarray,
    w: Weights,
    name: str,
    mask_depth: int,
    learning: str = "arl",
    attention: str = "mixed",
    p: int = 1,
    t: int = 2,
    r: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """Apply an attention block; return its output and its mask."""

    def units(value: np.ndarray, path: str, count: int) -> np.ndarray:
        for n in range(1, count + 1):
            value = unit(value, w, f"{name}/{path}{n}")
        return value

    if learning not in ("arl", "nal"):
        raise ValueError(f"unknown learning {learning!r}")
    shared = units(x, "before", p)
    trunk = units(shared, "trunk", t)

    levels = [shared]
    for level in range(1, mask_depth + 1):
        levels.append(units(pool(levels[-1]), f"down{level}/unit", 2 * r if level == mask_depth else r))
    z = levels[mask_depth]
    for level in range(mask_depth - 1, 0, -1):
        z = upsample(z, *levels[level].shape[1:3]) + unit(levels[level], w, f"{name}/skip{level}")
        z = units(z, f"up{level}/unit", r)
    z = upsample(z, *trunk.shape[1:3])
    for n in (1, 2):
        z = conv(norm_relu(z, w, f"{name}/mask/bn{n}"), w[f"{name}/mask/conv{n}"])
    mask = attend(z, attention)

    attended = (1 + mask) * trunk if learning == "arl" else mask * trunk
    return units(attended, "after", p), mask


def forward(
    images: np.ndarray,
    w: Weights,
    blocks: tuple[int, int, int] = (1, 1, 1),
    learning: str = "arl",
    attention: str = "mixed",
) -> np.ndarray:
    """Return the logits of a batch of images."""
    x = np.asarray(images, dtype=w["stem/conv"].dtype)
    x = pool(norm_relu(conv(x, w["stem/conv"], 2), w, "stem/bn"))
    for stage, (depth, count) in enumerate(zip(MASK_DEPTHS, blocks, strict=True), 1):
        x = unit(x, w, f"stage{stage}/unit", 1 if stage == 1 else 2)
        for n in range(1, count + 1):
            x, _ = block(x, w, f"stage{stage}/block{n}", depth, learning, attention)
    x = unit(x, w, "tail/unit1", 2)
    x = unit(x, w, "tail/unit2")
    x = unit(x, w, "tail/unit3")
    x = norm_relu(x, w, "tail/bn").mean(axis=(1, 2))
    return x @ w["classifier/kernel"] + w["classifier/bias"]

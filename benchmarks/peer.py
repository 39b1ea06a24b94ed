"""The same network in PyTorch, for comparing speed: residual units, arl, mixed attention, encoder-decoder masks.

It is built from the same tables (`Model.geometries`). Modules are in the order in which `copy_weights` visits the Keras
layers. `check` verifies that both are the same network: parameters, multiply-adds, logits.
"""

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from Model.geometries import GEOMETRIES, blocks_per_stage

MASK = 1  # mask units between poolings, the paper's r
TRUNK = 2  # units in the trunk, the paper's t


def convolution(channels, filters, size, strides=1):
    return nn.Conv2d(channels, filters, size, strides, padding=size // 2 if size > 1 else 0, bias=False)


class Unit(nn.Module):
    """`Module.ResidualUnit`."""

    def __init__(self, channels, filters, strides=1):
        super().__init__()
        width = filters // 4
        self.norm_1 = nn.BatchNorm2d(channels)
        self.reduce = convolution(channels, width, 1)
        self.norm_2 = nn.BatchNorm2d(width)
        self.convolve = convolution(width, width, 3, strides)
        self.norm_3 = nn.BatchNorm2d(width)
        self.expand = convolution(width, filters, 1)
        self.project = convolution(channels, filters, 1, strides) if strides > 1 or channels != filters else None

    def forward(self, x):
        a = functional.relu(self.norm_1(x))
        shortcut = x if self.project is None else self.project(a)
        a = self.convolve(functional.relu(self.norm_2(self.reduce(a))))
        return shortcut + self.expand(functional.relu(self.norm_3(a)))


def units(filters, count):
    return nn.Sequential(*(Unit(filters, filters) for _ in range(count)))


class AttentionBlock(nn.Module):
    """`Module.AttentionBlock`."""

    def __init__(self, filters, depth):
        super().__init__()
        self.before = units(filters, 1)
        self.trunk = units(filters, TRUNK)
        self.down = nn.ModuleList(units(filters, MASK if level < depth else 2 * MASK) for level in range(1, depth + 1))
        self.skip = nn.ModuleList(Unit(filters, filters) for _ in range(depth - 1))
        self.up = nn.ModuleList(units(filters, MASK) for _ in range(depth - 1))
        norms = (nn.BatchNorm2d(filters) for _ in range(2))
        pairs = [[norm, nn.ReLU(), convolution(filters, filters, 1)] for norm in norms]
        self.weigh = nn.Sequential(*pairs[0], *pairs[1])
        self.after = units(filters, 1)

    def forward(self, x):
        x = self.before(x)
        return self.after((1 + self.mask(x)) * self.trunk(x))

    def mask(self, x):
        sizes, levels = [x.shape[2:]], []
        for down in self.down:
            x = down(functional.max_pool2d(x, 3, 2, ceil_mode=True))
            sizes.append(x.shape[2:])
            levels.append(x)
        levels.pop()
        for skip, up in zip(self.skip, self.up):
            level = levels.pop()
            x = up(self.resize(x, level.shape[2:]) + skip(level))
        return torch.sigmoid(self.weigh(self.resize(x, sizes[0])))

    def resize(self, x, size):
        return functional.interpolate(x, size, mode="bilinear", align_corners=True)


class Network(nn.Module):
    """`Model.residual_attention_network` up to its logits, from raw images `(batch, 3, height, width)`."""

    def __init__(self, depth, geometry, classes, pixels, mean, dropout=0.2):
        super().__init__()
        rows = GEOMETRIES[geometry]
        self.register_buffer("mean", torch.tensor(mean).permute(2, 0, 1))
        channels = rows.stem_filters
        stem = [convolution(3, channels, rows.stem_kernel, rows.stem_strides)]
        stem += [nn.BatchNorm2d(channels), nn.ReLU()] if rows.stem_norm else []
        stem += [nn.MaxPool2d(rows.stem_pool, 2, ceil_mode=True)] if rows.stem_pool > 1 else []
        body = []
        for stage, blocks in zip(rows.stages, blocks_per_stage(depth, 1, TRUNK, rows.rising)):
            body.append(Unit(channels, stage.filters, stage.strides))
            channels = stage.filters
            body += [AttentionBlock(channels, stage.mask_depth) for _ in range(blocks)]
            body += [Unit(channels, channels) for _ in range(stage.closing)]
        for filters, strides in rows.tail:
            body.append(Unit(channels, filters, strides))
            channels = filters
        self.features = nn.Sequential(*stem, *body, nn.BatchNorm2d(channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.classifier = nn.Sequential(nn.Flatten(), nn.Dropout(dropout), nn.Linear(channels, classes))

    def forward(self, images):
        return self.classifier(self.features((images.float() - self.mean) / 255))

    def weighted(self):
        return [m for m in self.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d | nn.Linear)]

    def multiply_adds(self, images):
        """Return the multiply-adds of convolutions and classifier for one image, counted in a forward pass."""
        counted = []

        def add(module, _, output):
            counted.append(module.weight.numel() * (output[0, 0].numel() if output.ndim == 4 else 1))

        hooks = [m.register_forward_hook(add) for m in self.weighted() if not isinstance(m, nn.BatchNorm2d)]
        with torch.no_grad():
            self.eval()(images[:1])
        for hook in hooks:
            hook.remove()
        return sum(counted)


def list_keras_layers(network):
    """Return the layers of the Keras network with weights, in the order of the modules here."""
    from keras import layers

    from Module import AttentionBlock, ResidualUnit

    def parts(layer):
        if isinstance(layer, ResidualUnit):
            return [*layer.activate, *layer.branch, *layer.projection]
        if isinstance(layer, AttentionBlock):
            chains = (layer.before, layer.trunk, *layer.down_sample, layer.skip, *layer.up_sample)
            inner = [unit for chain in (*chains, layer.weigh, layer.after) for unit in chain]
            return [part for each in inner for part in parts(each)]
        return [layer]

    kinds = (layers.Conv2D, layers.BatchNormalization, layers.Dense)
    return [part for layer in network.layers for part in parts(layer) if isinstance(part, kinds)]


def copy_weights(network, peer):
    """Copy the weights of the Keras network to the PyTorch network."""
    for layer, module in zip(list_keras_layers(network), peer.weighted(), strict=True):
        arrays = [torch.tensor(np.asarray(weight)) for weight in layer.get_weights()]
        if isinstance(module, nn.BatchNorm2d):
            targets = [module.weight, module.bias, module.running_mean, module.running_var]
        else:
            arrays[0] = arrays[0].permute(3, 2, 0, 1) if arrays[0].ndim == 4 else arrays[0].T
            targets = [module.weight, module.bias][: len(arrays)]
        for target, array in zip(targets, arrays, strict=True):
            target.data.copy_(array)


def check(network, peer, images):
    """Compare counts and logits of both networks with the same weights.

    The difference of logits is the largest one, as a share of the largest logit, since the logits of an untrained
    residual network are large.

    Args:
        network: the Keras network, which takes raw images.
        peer: `Network`, to which the weights are copied.
        images: uint8 `(batch, height, width, 3)`.

    Returns:
        `{name: [Keras' count, PyTorch's count]}` and "logit_difference".
    """
    import keras

    from Model.count import count

    copy_weights(network, peer)
    raw = torch.tensor(images).permute(0, 3, 1, 2)
    logits = keras.Model(network.input, network.get_layer("logits").output).predict(images, verbose=0)
    with torch.no_grad():
        theirs = peer.eval()(raw).numpy()
    statistics = sum(m.running_mean.numel() + m.running_var.numel() for m in peer.weighted() if hasattr(m, "momentum"))
    counts = count(network)
    theirs_count = sum(p.numel() for p in peer.parameters()) + statistics
    return {
        "trainable": [counts["trainable"], sum(p.numel() for p in peer.parameters())],
        "parameters": [sum(int(np.prod(w.shape)) for x in list_keras_layers(network) for w in x.weights), theirs_count],
        "multiply_adds": [counts["multiply_adds"], peer.multiply_adds(raw)],
        "logit_difference": float(np.abs(logits - theirs).max() / np.abs(logits).max()),
    }

"""The model that is fitted: a network up to its logits, with augmentation in front of it, and its loss."""

import keras
import numpy as np
from keras import layers, ops

from Module.replicas import replicas
from Training.engine.graph import speed_up


def make_logits_model(network):
    """Return a model from raw images to logits, `(batch, classes)`, that shares the weights of a network."""
    return keras.Model(network.input, network.get_layer("logits").output, name=network.name)


class ImagesOnDevice(layers.Layer):
    """Holds all images of a run in a variable on the device, so that only indices are sent in each step.

    Args:
        images: uint8 `(n, height, width, channels)`.

    Input shape:  `(batch,)`, int32 positions in `images`; `-1 - position` is the mirror image.
    Output shape: `(batch, height, width, channels)`, uint8.
    """

    def __init__(self, images, **kwargs):
        super().__init__(trainable=False, **kwargs)
        self.images = self.add_weight(
            shape=images.shape, dtype="uint8", initializer=lambda *_, **__: images, trainable=False, name="images"
        )

    def call(self, indices):
        mirrored = indices < 0
        images = ops.take(self.images, ops.where(mirrored, -1 - indices, indices), axis=0)
        return ops.where(ops.reshape(mirrored, (-1, 1, 1, 1)), ops.flip(images, axis=2), images)

    def get_config(self):
        return {"name": self.name}  # the images are data

    def compute_output_spec(self, indices):
        return keras.KerasTensor((indices.shape[0], *self.images.shape[1:]), dtype="uint8")


def cross_entropy(labels, logits, label_smoothing=0.0):
    """Return the cross-entropy of each image in nats, `(batch,)`.

    With smoothing, the target is `1 - s + s / classes` for the label's class and `s / classes` for the others (Szegedy
    et al. 2016, https://arxiv.org/abs/1512.00567, section 7).

    Args:
        labels: int classes, `(batch,)`.
        logits: float32 `(batch, classes)`.
        label_smoothing: float s in [0, 1).
    """
    targets = ops.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    return keras.losses.categorical_crossentropy(targets, logits, from_logits=True, label_smoothing=label_smoothing)


@keras.saving.register_keras_serializable(package="ResidualAttention")
class TrainingModel(keras.Model):
    """A functional model from raw images, or their indices, to logits or, if images are mixed, to logits and shares.

    The loss is the mean of `cross_entropy` over the batch, plus the penalties of the layers. In training, the
    cross-entropy of each image is multiplied by the weight of its label's class. If images are mixed, the share s of
    each image in its mixture gives the loss `s CE(y, z) + (1 - s) CE(y', z)`, with the label y' of the previous image
    in the batch, with which `augmentation.Mix` mixed it. Accuracy uses the label y.
    """

    label_smoothing = 0.0
    batch_size = None  # images in each step of `fit`, if known
    class_weights = None  # list of floats, one for each class

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        logits, share = split_output(y_pred)
        loss = self._weigh(y, logits, training)
        if share is not None:
            loss = share * loss + (1 - share) * self._weigh(ops.roll(y, 1, axis=0), logits, training)
        if sample_weight is not None:
            loss = loss * ops.cast(sample_weight, loss.dtype)
        return (ops.mean(loss) + sum(self.losses)) / replicas()  # TensorFlow sums the gradients of its replicas

    def _weigh(self, labels, logits, training):
        loss = cross_entropy(labels, logits, self.label_smoothing)
        if self.class_weights is None or not training:
            return loss
        weights = ops.convert_to_tensor(np.float32(self.class_weights))
        return loss * ops.take(weights, ops.cast(labels, "int32"), axis=0)

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        return super().compute_metrics(x, y, split_output(y_pred)[0], sample_weight)

    def make_train_function(self, force=False):
        if self.train_function is None or force:
            super().make_train_function(force)
            if keras.backend.backend() == "tensorflow":
                self.train_function = speed_up(self, self.train_function)


def split_output(output):
    """Return the output of a training model or a layer as a pair of value and share, None if images are not mixed."""
    return tuple(output) if isinstance(output, tuple | list) else (output, None)


def make_training_model(network, changes=(), stored=None, label_smoothing=0.0, batch_size=None, class_weights=None):
    """Make the model that is fitted, around a network.

    Args:
        network: a functional model of `Model`; it shares its weights, and can be saved without the augmentation.
        changes: layers of `augmentation.make_augmentations`, applied to raw images in training.
        stored: uint8 images to keep on the device, or None; with them, the model takes indices.
        label_smoothing: see `cross_entropy`.
        batch_size: int, images in each step of `fit`, or None if they vary.
        class_weights: list of floats, one for each class, or None.

    Returns:
        A `TrainingModel`, not compiled.
    """
    if stored is None:
        inputs = x = keras.Input(network.input_shape[1:], name="images")
    else:
        inputs = keras.Input((), dtype="int32", name="indices")
        x = ImagesOnDevice(stored, name="images_on_device")(inputs)
    share = None
    for change in changes:
        x, share = split_output(change(x))
    logits = make_logits_model(network)(x)
    outputs = logits if share is None else (logits, share)
    model = TrainingModel(inputs, outputs, name=f"{network.name}_training")
    model.label_smoothing = label_smoothing
    model.batch_size = batch_size
    model.class_weights = class_weights
    return model

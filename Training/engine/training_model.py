"""The model that is fitted: a network up to its logits, with what happens to images and labels only in training."""

import keras
from keras import layers, ops

from Module.replicas import replicas
from Training.engine.graph import speed_up


def make_logits_model(network):
    """The network from raw images to logits, `(batch, classes)`; its weights are the network's."""
    return keras.Model(network.inputs, network.get_layer("logits").output, name=network.name)


class ImagesOnDevice(layers.Layer):
    """All images of a run as one variable on the device, so that a step is sent indices alone.

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
    """Cross-entropy of each image in nats, `(batch,)`.

    With smoothing a label is `1 - s + s / classes` in its own class and `s / classes` in the others (Szegedy et al.
    2016, https://arxiv.org/abs/1512.00567, section 7).

    Args:
        labels: int classes, `(batch,)`.
        logits: float32 `(batch, classes)`.
        label_smoothing: float s in [0, 1).
    """
    targets = ops.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    return keras.losses.categorical_crossentropy(targets, logits, from_logits=True, label_smoothing=label_smoothing)


@keras.saving.register_keras_serializable(package="ResidualAttention")
class TrainingModel(keras.Model):
    """A functional model from raw images, or their indices, to logits; where images are mixed, to a pair.

    The loss is the mean of `cross_entropy` over the batch, plus the layers' penalties. The pair's second half is the
    share s of each image's own label: its loss is then `s CE(y, z) + (1 - s) CE(y', z)` with the label y' of the image
    before it in the batch, which `augmentation.Mix` mixed it with. Accuracy is counted on the own labels.
    """

    label_smoothing = 0.0
    batch_size = None  # images in each step of `fit`, where it is known

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        logits, share = _pair(y_pred)
        loss = cross_entropy(y, logits, self.label_smoothing)
        if share is not None:
            other = cross_entropy(ops.roll(y, 1, axis=0), logits, self.label_smoothing)
            loss = share * loss + (1 - share) * other
        if sample_weight is not None:
            loss = loss * ops.cast(sample_weight, loss.dtype)
        return (ops.mean(loss) + sum(self.losses)) / replicas()  # TensorFlow sums the gradients of its replicas

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        return super().compute_metrics(x, y, _pair(y_pred)[0], sample_weight)

    def make_train_function(self, force=False):
        if self.train_function is None or force:
            super().make_train_function(force)
            if keras.backend.backend() == "tensorflow":
                self.train_function = speed_up(self, self.train_function)


def _pair(output):
    """What a training model or a layer gives, as a value and a share, which is None where nothing is mixed."""
    return tuple(output) if isinstance(output, tuple | list) else (output, None)


def make_training_model(network, changes=(), stored=None, label_smoothing=0.0, batch_size=None):
    """What is fitted around a network.

    Args:
        network: a functional model of `Model`, whose weights it shares; saved alone, it stays free of the changes.
        changes: layers of `augmentation.make_augmentations`, applied to raw images in training.
        stored: uint8 images to keep on the device, or None; with them the model takes indices.
        label_smoothing: see `cross_entropy`.
        batch_size: int, images in each step of `fit`, or None where they vary.

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
        x, share = _pair(change(x))
    logits = make_logits_model(network)(x)
    outputs = logits if share is None else (logits, share)
    model = TrainingModel(inputs, outputs, name=f"{network.name}_training")
    model.label_smoothing = label_smoothing
    model.batch_size = batch_size
    return model

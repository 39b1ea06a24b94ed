"""TensorBoard's event files: Keras' own callback where TensorFlow is there, and what it does not write.

Keras' callback needs TensorFlow. Pictures, recipe and hparams, and without TensorFlow the scalars too, go through
the writer of the `tensorboard` package, which does not; the tags are the same either way.
"""

import dataclasses
import importlib.util
import warnings

import keras
import numpy as np

from Training import view

SHOWN = 8  # images in a picture


def _has(package):
    return importlib.util.find_spec(package) is not None


def tensorboard(folder, histograms=False):
    """Callbacks that write loss, accuracy, learning rate, images/s, seconds and graph under train/ and validation/."""
    if not _has("tensorboard"):
        warnings.warn("tensorboard is not installed: no event files are written", stacklevel=2)
        return []
    if _has("tensorflow"):
        return [keras.callbacks.TensorBoard(folder, histogram_freq=int(histograms), write_graph=True)]
    return [Scalars(folder)]


class EventFile:
    """An event file in a folder of its own (TensorBoard follows one file a folder), through `tensorboard` alone."""

    def __init__(self, folder):
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self.writer = EventFileWriter(str(folder))

    def add(self, summary, step=0):
        import time

        from tensorboard.compat.proto import event_pb2

        self.writer.add_event(event_pb2.Event(wall_time=time.time(), step=step, summary=summary))

    def scalar(self, tag, value, step):
        from tensorboard.plugins.scalar.summary_v2 import scalar_pb

        self.add(scalar_pb(tag, float(value)), step)

    def image(self, tag, picture, step):
        """A uint8 picture `(height, width, 3)`."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        height, width, _ = picture.shape
        image = Summary.Image(
            height=height, width=width, colorspace=3, encoded_image_string=view.png(picture)
        )
        self.add(Summary(value=[Summary.Value(tag=tag, image=image)]), step)

    def text(self, tag, text):
        from tensorboard.plugins.text.summary_v2 import text_pb

        self.add(text_pb(tag, text))

    def hparams(self, values, metrics, name):
        """A row of the HPARAMS page. Args: metrics: `(group folder, tag)` pairs that stand beside the values."""
        from tensorboard.plugins.hparams import api_pb2, summary_v2

        config = summary_v2.hparams_config_pb(
            hparams=[summary_v2.HParam(key) for key in values],
            metrics=[summary_v2.Metric(tag, group=group) for group, tag in metrics],
        )
        self.add(config)
        self.add(summary_v2.hparams_pb(values, trial_id=name))
        ended = summary_v2._summary_pb  # the package has no public way to close a session
        from tensorboard.plugins.hparams import metadata, plugin_data_pb2

        self.add(
            ended(
                metadata.SESSION_END_INFO_TAG,
                plugin_data_pb2.HParamsPluginData(
                    session_end_info=plugin_data_pb2.SessionEndInfo(status=api_pb2.STATUS_SUCCESS)
                ),
            )
        )

    def close(self):
        self.writer.close()


class Scalars(keras.callbacks.Callback):
    """What Keras' callback writes at each epoch's end, without TensorFlow: the same tags in the same folders."""

    def __init__(self, folder):
        super().__init__()
        self.files = {name: EventFile(folder / name) for name in ("train", "validation")}

    def on_epoch_end(self, epoch, logs=None):
        for key, value in logs.items():
            part = "validation" if key.startswith("val_") else "train"
            self.files[part].scalar(f"epoch_{key.removeprefix('val_')}", value, epoch)
        for file in self.files.values():
            file.writer.flush()

    def on_train_end(self, logs=None):
        for file in self.files.values():
            file.close()


class Pictures(keras.callbacks.Callback):
    """The recipe as text, a batch after augmentation, and the soft masks each few epochs.

    Args:
        file: `EventFile` of the run's own folder.
        network: the network whose masks are shown.
        examples: `data.Examples`; the first of each are shown.
        recipe: `recipe.Recipe`.
    """

    def __init__(self, file, network, examples, recipe):
        super().__init__()
        self.file = file
        self.examples = examples
        self.every = recipe.masks_every
        self.recipe = recipe
        self.masks = view.mask_model(network)
        self.shown = examples.images[:SHOWN]

    def on_train_begin(self, logs=None):
        rows = "\n".join(f"| {k} | {v} |" for k, v in dataclasses.asdict(self.recipe).items())
        self.file.text("recipe", f"| field | value |\n|---|---|\n{rows}")
        self.file.image("augmented_batch", self._augmented(), 0)
        self.file.writer.flush()

    def _augmented(self):
        """A copy of the augmentation layer draws, so that the training's own random state is not moved."""
        names = [layer.name for layer in self.model.layers]
        if "augmentation" not in names:
            return view.row(self.shown)
        layer = self.model.get_layer("augmentation")
        copy = type(layer).from_config(layer.get_config())
        changed = keras.ops.convert_to_numpy(copy(self.shown.astype("float32"), training=True))
        return np.concatenate([view.row(self.shown), view.row(changed.round().astype("uint8"))])

    def on_epoch_end(self, epoch, logs=None):
        if not self.every or (epoch + 1) % self.every:
            return
        for name, mask in self.masks.predict(self.shown, verbose=0).items():
            self.file.image(f"masks/{name}", view.mask_picture(self.shown, mask), epoch)
        self.file.writer.flush()


def finish(file, recipe, folder, figures, labels, predictions, classes):
    """The end of a run in TensorBoard: final figures, the test set's confusion matrix, and the hparams row."""
    for key, value in figures.items():
        if value is not None:
            file.scalar(f"final/{key}", value, recipe.epochs)
    file.image("confusion_matrix", view.confusion_picture(labels, predictions, classes), recipe.epochs)
    metrics = [("", "final/test_error_percent"), ("", "final/test_loss")]
    file.hparams(dataclasses.asdict(recipe), metrics, folder.name)
    file.close()

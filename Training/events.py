"""TensorBoard's event files: scalars, graph, histograms, pictures, recipe and hparams of a run.

They go through the writer of the `tensorboard` package. Keras' TensorBoard callback needs TensorFlow, which a run on
JAX does without, and neither flushes at an epoch's end nor leaves out what a resumed run has already written; the tags
are Keras'.
"""

import dataclasses
import importlib.util
import time
import warnings

import keras
import numpy as np

from Training import view

SHOWN = 8  # images in a picture


def is_available():
    """Whether event files can be written: whether the `tensorboard` package is there."""
    return importlib.util.find_spec("tensorboard") is not None


def watchers(folder, network, examples, recipe, resumed):
    """The callbacks that write a run's event files; none, with a warning, without the `tensorboard` package.

    Args:
        folder: path of the run's folder.
        network: the network whose masks are shown.
        examples: `data.Examples`, whose first images are shown.
        recipe: `recipe.Recipe`.
        resumed: bool, whether what a run writes at its start is already there.
    """
    if not is_available():
        warnings.warn("tensorboard is not installed: no event files are written", stacklevel=2)
        return []
    return [
        EpochEvents(folder, recipe.histograms, resumed),
        Pictures(folder, network, examples.images[:SHOWN], recipe, resumed),
    ]


class EventFile:
    """An event file in a folder of its own (TensorBoard follows one file a folder), through `tensorboard` alone."""

    def __init__(self, folder):
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self.writer = EventFileWriter(str(folder))

    def add(self, summary, step=0):
        from tensorboard.compat.proto import event_pb2

        self.writer.add_event(event_pb2.Event(wall_time=time.time(), step=step, summary=summary))

    def graph(self, model):
        """The layers' graph of a functional model, as TensorBoard's GRAPHS page draws it."""
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
        from tensorboard.util.tensor_util import make_tensor_proto

        plugin = SummaryMetadata.PluginData(plugin_name="graph_keras_model", content=b"1")
        value = Summary.Value(
            tag="keras",
            metadata=SummaryMetadata(plugin_data=plugin),
            tensor=make_tensor_proto(model.to_json().encode(), dtype=np.object_),
        )
        self.add(Summary(value=[value]))

    def histogram(self, tag, values, step):
        from tensorboard.plugins.histogram.summary_v2 import histogram_pb

        self.add(histogram_pb(tag, values), step)

    def scalar(self, tag, value, step):
        from tensorboard.plugins.scalar.summary_v2 import scalar_pb

        self.add(scalar_pb(tag, float(value)), step)

    def image(self, tag, picture, step):
        """A uint8 picture `(height, width, 3)`."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        height, width, _ = picture.shape
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=view.png(picture))
        self.add(Summary(value=[Summary.Value(tag=tag, image=image)]), step)

    def text(self, tag, text):
        from tensorboard.plugins.text.summary_v2 import text_pb

        self.add(text_pb(tag, text))

    def hparams(self, values, metrics, name):
        """A row of the HPARAMS page, the scalars with the tags `metrics` beside it."""
        from tensorboard.plugins.hparams import summary_v2

        config = summary_v2.hparams_config_pb(
            hparams=[summary_v2.HParam(key) for key in values],
            metrics=[summary_v2.Metric(tag) for tag in metrics],
        )
        self.add(config)
        self.add(summary_v2.hparams_pb(values, trial_id=name))

    def close(self):
        self.writer.close()


class EpochEvents(keras.callbacks.Callback):
    """Each epoch's logs under train/ and validation/, the graph, and by option histograms of the weights."""

    def __init__(self, folder, histograms, resumed):
        super().__init__()
        self.folder = folder
        self.histograms = histograms
        self.resumed = resumed

    def on_train_begin(self, logs=None):
        self.files = {name: EventFile(self.folder / name) for name in ("train", "validation")}
        if not self.resumed:
            self.files["train"].graph(self.model)
            self.files["train"].writer.flush()  # a checkpoint within the first epoch must find it

    def on_epoch_end(self, epoch, logs=None):
        for key, value in logs.items():
            part = "validation" if key.startswith("val_") else "train"
            self.files[part].scalar(f"epoch_{key.removeprefix('val_')}", value, epoch)
        for weight in self.model.weights if self.histograms else ():
            values = keras.ops.convert_to_numpy(weight)
            self.files["train"].histogram(f"{weight.path}/histogram", values, epoch)
        for file in self.files.values():
            file.writer.flush()

    def on_train_end(self, logs=None):
        for file in self.files.values():
            file.close()


class Pictures(keras.callbacks.Callback):
    """The recipe as text, a batch before and after augmentation, and the soft masks each `masks_every` epochs."""

    def __init__(self, folder, network, images, recipe, resumed):
        super().__init__()
        self.folder = folder
        self.images = images
        self.recipe = recipe
        self.resumed = resumed
        self.masks = view.mask_model(network)

    def on_train_begin(self, logs=None):
        self.file = EventFile(self.folder)
        if not self.resumed:
            rows = "\n".join(f"| {k} | {v} |" for k, v in dataclasses.asdict(self.recipe).items())
            self.file.text("recipe", f"| field | value |\n|---|---|\n{rows}")
            self.file.image("augmented_batch", self._augmented(), 0)
        self.file.writer.flush()

    def _augmented(self):
        """A copy of the augmentation layer draws, so that the training's own random state is not moved."""
        layers = [layer for layer in self.model.layers if layer.name == "augmentation"]
        copies = [type(layer).from_config(layer.get_config()) for layer in layers]
        changed = [keras.ops.convert_to_numpy(copy(self.images, training=True)) for copy in copies]
        return np.concatenate([view.row(batch.round().astype("uint8")) for batch in (self.images, *changed)])

    def on_epoch_end(self, epoch, logs=None):
        if not self.recipe.masks_every or (epoch + 1) % self.recipe.masks_every:
            return
        for name, mask in self.masks.predict(self.images, verbose=0).items():
            self.file.image(f"masks/{name}", view.mask_picture(self.images, mask), epoch)
        self.file.writer.flush()

    def on_train_end(self, logs=None):
        self.file.close()


def finish(folder, recipe, figures, labels, predictions, classes):
    """The end of a run in TensorBoard: final figures, the test set's confusion matrix, and the hparams row."""
    if not is_available():
        return
    file = EventFile(folder)
    for key, value in figures.items():
        if value is not None:
            file.scalar(f"final/{key}", value, recipe.epochs)
    file.image("confusion_matrix", view.confusion_picture(labels, predictions, classes), recipe.epochs)
    metrics = ("final/test_error_percent", "final/validation_error_percent", "final/train_error_percent")
    file.hparams(dataclasses.asdict(recipe), metrics, folder.name)
    file.close()

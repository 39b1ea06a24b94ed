"""TensorBoard's event files: scalars, graph, histograms, pictures, recipe and hparams of a run.

They go through the writer of the `tensorboard` package. Keras' TensorBoard callback needs TensorFlow, which a run on
JAX does without, and neither flushes at an epoch's end nor leaves out what a resumed run has already written; the tags
are Keras'.
"""

import dataclasses
import importlib.util
import warnings

import keras
import numpy as np

from Training.devices import copy_to_one_device, on_one_device
from Training.engine.augmentation import Augmentation
from Training.recipe import compared_fields
from Training.runs.event_file import EventFile
from Training.visual import inspection, plots

SHOWN = 8  # images in a picture


def is_available():
    """Whether event files can be written: whether the `tensorboard` package is there."""
    return importlib.util.find_spec("tensorboard") is not None


def make_event_callbacks(folder, network, examples, recipe, resumed):
    """The callbacks that write a run's event files; none, with a warning, without the `tensorboard` package.

    Args:
        folder: path of the run's folder.
        network: the network whose masks are shown.
        examples: `datasets.Examples`, whose first images are shown.
        recipe: `recipe.Recipe`.
        resumed: bool, whether what a run writes at its start is already there.
    """
    if not is_available():
        warnings.warn("tensorboard is not installed: no event files are written", stacklevel=2)
        return []
    return [
        EpochEvents(folder, network, recipe.histograms, resumed),
        Pictures(folder, network, examples.images[:SHOWN], recipe, resumed),
    ]


class EpochEvents(keras.callbacks.Callback):
    """Each epoch's logs under train/ and validation/, the graph, and by option histograms of the weights."""

    def __init__(self, folder, network, histograms, resumed):
        super().__init__()
        self.folder = folder
        self.network = network
        self.histograms = histograms
        self.resumed = resumed

    def on_train_begin(self, logs=None):
        self.files = {name: EventFile(self.folder / name) for name in ("train", "validation")}
        if not self.resumed:
            self.files["train"].graph(self.network)
            self.files["train"].flush()  # a checkpoint within the first epoch must find it

    def on_epoch_end(self, epoch, logs=None):
        for key, value in logs.items():
            part = "validation" if key.startswith("val_") else "train"
            self.files[part].scalar(f"epoch_{key.removeprefix('val_')}", value, epoch)
        for weight in self.model.weights if self.histograms else ():
            values = keras.ops.convert_to_numpy(weight)
            self.files["train"].histogram(f"{weight.path}/histogram", values, epoch)
        for file in self.files.values():
            file.flush()

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
        self.network = network
        self.shown = copy_to_one_device(network)
        with on_one_device():
            self.masks = inspection.make_mask_model(self.shown) if recipe.masks_every else None

    def on_train_begin(self, logs=None):
        self.file = EventFile(self.folder)
        if not self.resumed:
            rows = "\n".join(f"| {k} | {v} |" for k, v in dataclasses.asdict(self.recipe).items())
            self.file.text("recipe", f"| field | value |\n|---|---|\n{rows}")
            self.file.image("augmented_batch", self._augmented(), 0)
        self.file.flush()

    def _augmented(self):
        """Copies of the augmentation layers draw, so that the training's own random state is not moved."""
        changed = self.images
        with on_one_device():
            for layer in self.model.layers:
                if isinstance(layer, Augmentation):
                    changed = type(layer).from_config(layer.get_config())(changed, training=True)
                    changed = changed[0] if isinstance(changed, tuple) else changed
        changed = keras.ops.convert_to_numpy(changed).round().clip(0, 255).astype("uint8")  # colours may go beyond
        return np.concatenate([plots.arrange_in_row(batch) for batch in (self.images, changed)])

    def on_epoch_end(self, epoch, logs=None):
        if not self.recipe.masks_every or (epoch + 1) % self.recipe.masks_every:
            return
        if self.shown is not self.network:
            self.shown.set_weights(self.network.get_weights())
        with on_one_device():
            masks = self.masks.predict(self.images, verbose=0)
        for name, mask in masks.items():
            self.file.image(f"masks/{name}", plots.draw_mask_rows(self.images, mask), epoch)
        self.file.flush()

    def on_train_end(self, logs=None):
        self.file.close()


def write_final_events(folder, recipe, figures, labels, predictions, classes):
    """The end of a run in TensorBoard: final figures, the test set's confusion matrix, and the hparams row."""
    if not is_available():
        return
    file = EventFile(folder)
    for key, value in figures.items():
        if value is not None:
            file.scalar(f"final/{key}", value, recipe.epochs)
    file.image("confusion_matrix", plots.draw_confusion(labels, predictions, classes), recipe.epochs)
    metrics = ("final/test_error_percent", "final/validation_error_percent", "final/train_error_percent")
    shown = {name: getattr(recipe, name) for name in (*compared_fields(), "seed")}
    file.hparams(shown, metrics, folder.name)
    file.close()

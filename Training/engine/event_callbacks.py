"""Callbacks that write TensorBoard event files: curves, graph, histograms, pictures, the recipe and traces.

They use the `tensorboard` package. Keras' TensorBoard callback needs TensorFlow, even on JAX, does not flush at the end
of an epoch, and writes events again that a resumed run has already written. The tags of losses and metrics are those of
Keras.

TensorBoard shows a run's folder as two runs, `train` and `validation`. Everything that belongs to neither is in
`train`.
"""

import dataclasses
import sys
import warnings

import keras
import numpy as np

from Training.console import format_count
from Training.devices import copy_to_one_device, on_one_device
from Training.engine.augmentation import Augmentation
from Training.engine.training_model import split_output
from Training.recipe import Recipe
from Training.runs.event_file import EventFiles, is_available
from Training.visual import inspection, plots
from Training.visual.escaping import make_markdown_table

SHOWN = 8  # images in a picture
MASKED = 4  # images under masks: more would be too small on TensorBoard's cards
INSTALL = "pip install tensorboard-plugin-profile"
NO_CHARTS = ("first_step_seconds",)  # zero in every epoch but the first


def make_event_callbacks(folder, network, examples, recipe, resumed):
    """Return the callbacks that write a run's event files. Without the `tensorboard` package, warn and return none.

    Args:
        folder: path of the run's folder.
        network: the network whose masks are shown.
        examples: `datasets.Examples`, whose first images are shown.
        recipe: `recipe.Recipe`.
        resumed: bool, whether the events from the start of the run already exist.
    """
    if not is_available():
        warnings.warn("tensorboard is not installed: no event files are written", stacklevel=2)
        return []
    events = EpochEvents(folder, network, recipe.histograms, resumed)
    return [events, Pictures(events, network, examples.images[:SHOWN], recipe, resumed)]


class EpochEvents(keras.callbacks.Callback):
    """Writes the logs of each epoch to train/ and validation/, the graph, and optionally histograms of the weights."""

    def __init__(self, folder, network, histograms, resumed):
        super().__init__()
        self.folder = folder
        self.network = network
        self.histograms = histograms
        self.resumed = resumed

    def on_train_begin(self, logs=None):
        self.files = EventFiles(self.folder)
        if not self.resumed:
            self.files["train"].graph(self.network)
            self.files["train"].layout()
            self.files["train"].flush()  # a checkpoint in the first epoch must include it

    def on_epoch_end(self, epoch, logs=None):
        add_epoch(self.files, logs, epoch)
        for weight in self.model.weights if self.histograms else ():
            values = keras.ops.convert_to_numpy(weight)
            self.files["train"].histogram(f"{weight.path}/histogram", values, epoch)
        for file in self.files.values():
            file.flush()

    def on_train_end(self, logs=None):
        for file in self.files.values():
            file.close()


def add_epoch(files, logs, epoch):
    """Add the metrics of an epoch, and errors in per cent, to `EventFiles`."""
    errors = {key.replace("accuracy", "error_percent"): 100 * (1 - logs[key]) for key in logs if "accuracy" in key}
    for key, value in {**logs, **errors}.items():
        part = "validation" if key.startswith("val_") else "train"
        if key not in NO_CHARTS and np.isfinite(value):
            files[part].scalar(f"epoch_{key.removeprefix('val_')}", value, epoch)


def add_masks(file, images, masks, epoch):
    """Add a picture of each block's masks, `{block's name: (n, h, w, channels)}`, over the first n images."""
    for name, mask in masks.items():
        file.image(f"masks/{name}", plots.draw_mask_rows(images[: len(mask)], mask), epoch)


class Pictures(keras.callbacks.Callback):
    """Writes the recipe, a batch before and after augmentation, and the soft masks every `masks_every` epochs.

    The images are the same in every epoch, so TensorBoard's slider shows how the masks change.

    Args:
        events: `EpochEvents`; this callback writes to its file for training.
        network: the network whose masks are shown.
        images: uint8 `(n, height, width, 3)`.
        recipe: `recipe.Recipe`.
        resumed: bool, whether the events from the start of the run already exist.
    """

    def __init__(self, events, network, images, recipe, resumed):
        super().__init__()
        self.events = events
        self.images = images
        self.recipe = recipe
        self.resumed = resumed
        self.network = network
        self.shown = copy_to_one_device(network)
        with on_one_device():
            self.masks = inspection.make_mask_model(self.shown) if recipe.masks_every else None
        if self.masks:
            self.masks.compile()  # as a graph, since it runs many times

    def on_train_begin(self, logs=None):
        if not self.resumed:
            file = self.events.files["train"]
            for tag, text in describe_recipe(self.recipe).items():
                file.text(tag, text)
            file.image("augmented_batch", self._augment(), 0)
            file.flush()

    def _augment(self):
        """Return a picture of the images above their augmented versions.

        Copies of the augmentation layers are used, so that their state does not change.
        """
        changed = self.images
        with on_one_device():
            for layer in self.model.layers:
                if isinstance(layer, Augmentation):
                    copy = type(layer).from_config(layer.get_config())
                    copy.set_weights(layer.get_weights())  # the number of steps after which `Mix` ends
                    changed, _ = split_output(copy(changed, training=True))
        changed = keras.ops.convert_to_numpy(changed).round().clip(0, 255).astype("uint8")  # may be out of range
        rows = (plots.enlarge_enough(self.images), plots.enlarge_enough(changed))
        return np.concatenate([plots.arrange_in_row(batch) for batch in rows])

    def on_epoch_end(self, epoch, logs=None):
        if not self.recipe.masks_every or (epoch + 1) % self.recipe.masks_every:
            return
        if self.shown is not self.network:
            self.shown.set_weights(self.network.get_weights())
        with on_one_device():
            masks = self.masks.predict(self.images[:MASKED], verbose=0)
        file = self.events.files["train"]
        add_masks(file, self.images, masks, epoch)
        file.flush()


class Trace(keras.callbacks.Callback):
    """Writes a trace of training steps for the PROFILE page of TensorBoard.

    Steps are counted from 1 at the start of this process; the first one compiles. If Keras runs several steps in a
    call, the trace starts and ends with the calls that contain `first` and `last`.

    Args:
        folder: path of a folder with event files; the trace is written to its plugins/profile/.
        first, last: ints, the first and the last step.
    """

    def __init__(self, folder, first, last):
        super().__init__()
        self.folder = str(folder)
        self.first = first
        self.last = last
        self.done = 0  # steps done in this process
        self.before = 0  # steps done in earlier epochs
        self.running = False
        self.traced = 0  # steps

    def on_epoch_begin(self, epoch, logs=None):
        self.before = self.done

    def on_train_batch_begin(self, batch, logs=None):
        end = self.before + batch + self.model.steps_per_execution  # Keras names the first step of a call
        if not self.running and self.done < self.last and end >= self.first:
            start_trace(self.folder)
            self.running, self.start = True, self.done
        if self.running:
            self.step = mark_step(self.before + batch + 1)
            self.step.__enter__()

    def on_train_batch_end(self, batch, logs=None):
        self.done = self.before + batch + 1
        if self.running:
            self.step.__exit__(None, None, None)
        if self.running and self.done >= self.last:
            self._stop()

    def on_train_end(self, logs=None):
        if self.running:
            self._stop()

    def report_nothing(self, say):
        """Say so if no step was traced."""
        if not self.traced:
            steps = format_count(self.done, "step")
            say(f"--profile: nothing was traced, this process made {steps} and step {self.first} was to be the first")

    def _stop(self):
        stop_trace()
        self.running, self.last = False, 0
        self.traced = self.done - self.start
        below = "\n" if sys.stdout.isatty() else ""  # in a terminal, the line of progress is not finished yet
        steps = format_count(self.traced, "step")
        print(f"{below}trace of {steps} in {self.folder}; to see it in TensorBoard: {INSTALL}", flush=True)


def start_trace(folder):
    """Start the backend's profiler, which writes to `<folder>/plugins/profile/`."""
    if keras.backend.backend() == "jax":
        import jax

        jax.profiler.start_trace(folder)
    else:
        import tensorflow as tf

        tf.profiler.experimental.start(folder)


def mark_step(number):
    """Return a context that marks a training step in the trace; without it, PROFILE shows no step times."""
    if keras.backend.backend() == "jax":
        import jax

        return jax.profiler.StepTraceAnnotation("train", step_num=number)
    import tensorflow as tf

    return tf.profiler.experimental.Trace("train", step_num=number, _r=1)


def stop_trace():
    """Stop the backend's profiler and write the trace."""
    if keras.backend.backend() == "jax":
        import jax

        jax.profiler.stop_trace()
    else:
        import tensorflow as tf

        tf.profiler.experimental.stop()


def describe_recipe(recipe):
    """Return the recipe as two Markdown tables, `{tag: text}`: changed values, and values equal to the defaults."""
    different, same, defaults = [], [], Recipe()
    for item in dataclasses.fields(Recipe):
        value = getattr(recipe, item.name)
        usual = getattr(defaults, item.name)
        if value == usual:
            same.append([item.name, value])
        else:
            different.append([item.name, value, usual])
    return {
        "recipe": make_markdown_table(["field", "value", "default"], different),
        "recipe/defaults": make_markdown_table(["field", "value, the default"], same),
    }

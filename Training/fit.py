"""Drives `keras.Model.fit`: the training model around a network, its optimizer, its batches, its callbacks."""

import math
import signal
import sys
import time

import keras
import numpy as np
from keras import layers

from Training.augmentation import augmentation
from Training.recipe import InputError

STEP_AT = (0.4, 0.6)  # of the run: 64k and 96k of the paper's 160k steps
PLATEAU_EPOCHS = 10
NOT_DECAYED = ("gamma", "beta", "bias")
LARGEST_PREDICTED_BATCH = 256


class Batches(keras.utils.PyDataset):
    """Batches of raw images as uint8, in an order that is a function of the seed and the epoch alone.

    Args:
        examples: `data.Examples`.
        batch_size: int, images a batch.
        seed: int, or None for the given order with a shorter last batch. With a seed each epoch is shuffled, and
            what does not fill a batch is left out of that epoch, so that every step has one shape.
    """

    def __init__(self, examples, batch_size, seed=None):
        super().__init__()
        self.examples = examples
        self.batch_size = batch_size
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch):
        count = len(self.examples.labels)
        if self.seed is None:
            self.order = np.arange(count)
        else:
            self.order = np.random.default_rng((self.seed, epoch)).permutation(count)

    def __len__(self):
        count = len(self.examples.labels) / self.batch_size
        return math.ceil(count) if self.seed is None else math.floor(count)

    def __getitem__(self, index):
        chosen = self.order[index * self.batch_size : (index + 1) * self.batch_size]
        return self.examples.images[chosen], self.examples.labels[chosen]


def mean_subtraction(mean):
    """The layer `(x - mean) / 255`, per pixel and channel, so that a saved model takes raw images.

    Wang et al. 2017, section 4.1, subtract the mean; the division only keeps numbers small (what follows the stem
    is normalized). Args: mean: float32 `(height, width, channels)`.
    """
    return layers.Normalization(
        axis=(1, 2, 3), mean=mean, variance=np.full_like(mean, 255.0**2), dtype="float32", name="mean_subtraction"
    )


def training_model(network, augment=None):
    """The model that is fitted: augmentation, then the network up to its logits; its weights are the network's.

    The loss on logits is exact on every backend, and the saved network stays free of the augmentation.
    """
    logits = keras.Model(network.inputs, network.get_layer("logits").output, name=network.name)
    inputs = keras.Input(network.input_shape[1:], name="images")
    return keras.Model(inputs, logits(augment(inputs) if augment else inputs), name=f"{network.name}_training")


def learning_rate(recipe, steps_per_epoch):
    """A Keras schedule, or a number for the constant rate and for the plateau's first rate."""
    rate, steps = recipe.learning_rate, recipe.epochs * steps_per_epoch
    if recipe.schedule == "step":
        at = [round(share * steps) for share in STEP_AT]
        return keras.optimizers.schedules.PiecewiseConstantDecay(at, [rate, rate / 10, rate / 100])
    if recipe.schedule == "cosine":
        warmup = round(recipe.warmup_epochs * steps_per_epoch)
        ramp = dict(initial_learning_rate=0.0, warmup_target=rate, warmup_steps=warmup) if warmup else {}
        return keras.optimizers.schedules.CosineDecay(
            **{"initial_learning_rate": rate, "decay_steps": max(steps - warmup, 1), **ramp}
        )
    return rate


def with_l2(optimizer_class):
    """The Keras optimizer with L2 as the paper has it: `decay * weight` joins the gradient, before momentum.

    Keras' own `weight_decay` is decoupled, and its regularizers would put a term for each weight into the loss.
    """

    class WithL2(optimizer_class):
        def __init__(self, *args, l2=0.0, exempt=(), **kwargs):
            super().__init__(*args, **kwargs)
            self.l2 = l2
            self.exempt = exempt

        def update_step(self, gradient, variable, learning_rate):
            name = variable.name.split(":")[0]  # TensorFlow's own variables are called gamma:0
            if self.l2 and name not in self.exempt:
                gradient = gradient + self.l2 * keras.ops.cast(variable, gradient.dtype)
            super().update_step(gradient, variable, learning_rate)

    WithL2.__name__ = optimizer_class.__name__
    return WithL2


def optimizer(recipe, steps_per_epoch):
    """The recipe's optimizer, with its schedule and its kind of weight decay."""
    name = {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW", "rmsprop": "RMSprop"}[recipe.optimizer]
    extra = {"momentum": recipe.momentum, "nesterov": recipe.momentum > 0} if name == "SGD" else {}
    rate = learning_rate(recipe, steps_per_epoch)
    exempt = () if recipe.decay_all else NOT_DECAYED
    if recipe.weight_decay_kind == "l2":
        return with_l2(getattr(keras.optimizers, name))(rate, l2=recipe.weight_decay, exempt=exempt, **extra)
    made = getattr(keras.optimizers, name)(rate, weight_decay=recipe.weight_decay, **extra)
    made.exclude_from_weight_decay(var_names=list(exempt))
    return made


class EpochMeter(keras.callbacks.Callback):
    """Keeps the batches' epoch, and adds learning rate, seconds and images/s to each epoch's logs.

    Images/s counts training steps alone, from the end of the first (which compiles) to the end of the last.
    """

    def __init__(self, batches):
        super().__init__()
        self.batches = batches

    def on_epoch_begin(self, epoch, logs=None):
        self.batches.set_epoch(epoch)
        self.started = time.perf_counter()
        self.first = None

    def on_train_batch_end(self, batch, logs=None):
        self.last = (batch, time.perf_counter())
        self.first = self.first or self.last

    def on_epoch_end(self, epoch, logs=None):
        steps, seconds = (b - a for a, b in zip(self.first, self.last))
        logs["learning_rate"] = float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate))
        logs["seconds"] = time.perf_counter() - self.started
        logs["images_per_second"] = steps * self.batches.batch_size / seconds if steps else float("nan")


def duration(seconds):
    """Seconds as words: 45 s, 12 min, 3 h 20 min."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


class RunProgress(keras.callbacks.ProgbarLogger):
    """Keras' progress bar, with the minutes left of the whole run; one line an epoch where there is no terminal."""

    def on_epoch_begin(self, epoch, logs=None):
        super().on_epoch_begin(epoch, logs)
        self.epoch = epoch
        if not hasattr(self, "first_epoch"):
            self.first_epoch, self.first_end = epoch, None

    def on_train_batch_end(self, batch, logs=None):
        now, step = time.perf_counter(), self.epoch * self.target + batch + 1
        self.first_end = self.first_end or (now, step)  # the first step compiles: it says nothing of the others
        spent, steps = now - self.first_end[0], step - self.first_end[1]
        if steps:
            self.left = spent / steps * (self.epochs * self.target - step)
            logs = {**(logs or {}), "minutes_left": self.left / 60}
        super().on_train_batch_end(batch, logs)

    def on_epoch_end(self, epoch, logs=None):
        super().on_epoch_end(epoch, logs)
        if epoch + 1 < self.epochs and hasattr(self, "left"):
            print(f"{epoch + 1} of {self.epochs} epochs, about {duration(self.left)} left of the run", flush=True)


class Interruption(keras.callbacks.Callback):
    """Lets Ctrl-C finish the step under way, so that the weights are whole, then ends the training."""

    def on_train_begin(self, logs=None):
        self.asked = False
        self.before = signal.signal(signal.SIGINT, self._ask)

    def _ask(self, _number, _frame):
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C stops at once

    def on_train_batch_end(self, batch, logs=None):
        if self.asked:
            raise KeyboardInterrupt

    def on_train_end(self, logs=None):
        signal.signal(signal.SIGINT, self.before)


class KeepBest(keras.callbacks.ModelCheckpoint):
    """Saves the network, not the training model around it, at each better validation accuracy."""

    def __init__(self, path, network):
        super().__init__(path, monitor="val_accuracy", mode="max", save_best_only=True)
        self.network = network

    def set_model(self, model):
        super().set_model(self.network)


def callbacks(recipe, folder, network, batches, events=()):
    """All that watches a run, in the order in which it must see the logs."""
    watchers = [EpochMeter(batches), keras.callbacks.BackupAndRestore(folder / "backup", delete_checkpoint=False)]
    if recipe.validation_split:
        watchers.append(KeepBest(folder / "best.keras", network))
    if recipe.schedule == "plateau":
        watchers.append(keras.callbacks.ReduceLROnPlateau(factor=0.1, patience=PLATEAU_EPOCHS))
    watchers += [
        keras.callbacks.TerminateOnNaN(),
        keras.callbacks.CSVLogger(folder / "history.csv", append=True),
        *events,
        RunProgress(),
        Interruption(),
    ]
    return watchers


def compiled(network, recipe, steps_per_epoch):
    """The training model of a network, compiled as the recipe says."""
    flip = recipe.flip and recipe.dataset != "digits"
    augment = augmentation(
        recipe.augmentation, rotation=recipe.rotation, shift=recipe.shift, flip=flip, seed=recipe.seed
    )
    model = training_model(network, augment)
    model.compile(
        optimizer=optimizer(recipe, steps_per_epoch),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=recipe.jit or keras.backend.backend() == "jax",
        steps_per_execution=recipe.steps_per_execution,
    )
    # Made inside the traced step, the optimizer's variables would have TensorFlow trace it twice.
    model.optimizer.build(model.trainable_variables)
    return model


def fit(network, data, recipe, folder, events=()):
    """Train a network as the recipe says; go on from `folder/backup` where there is one.

    Args:
        network: the functional model of `Model`, weights and all.
        data: `data.Data`.
        recipe: `recipe.Recipe`.
        folder: path of the run's folder; gets history.csv, best.keras, last.keras, backup/ and event files.
        events: further callbacks, which see each epoch's complete logs.

    Returns:
        `(model, history)`: the training model and Keras' `History`.

    Raises:
        InputError: fewer training images than one batch.
        KeyboardInterrupt: after Ctrl-C, with last.keras saved.
    """
    batches = Batches(data.train, recipe.batch_size, recipe.seed)
    if not len(batches):
        raise InputError(f"batch_size={recipe.batch_size} needs as many images, received {len(data.train.labels)}")
    held_out = Batches(data.validation, even_batch(len(data.validation.labels))) if recipe.validation_split else None
    model = compiled(network, recipe, len(batches))
    try:
        history = model.fit(
            batches,
            validation_data=held_out,
            epochs=recipe.epochs,
            callbacks=callbacks(recipe, folder, network, batches, events),
            verbose=1 if sys.stdout.isatty() else 2,
        )
    except KeyboardInterrupt:
        if keras.backend.backend() == "jax":
            model.jax_state_sync()  # on JAX the weights live outside the model while it is fitted
        network.save(folder / "last.keras")
        raise
    network.save(folder / "last.keras")
    return model, history


def even_batch(count):
    """The largest batch up to 256 that divides `count`, so that a compiled function sees one shape.

    Where the largest divisor is under 32, 256, with a shorter last batch.
    """
    divisor = max(d for d in range(1, LARGEST_PREDICTED_BATCH + 1) if count % d == 0)
    return divisor if divisor >= min(32, count) else LARGEST_PREDICTED_BATCH

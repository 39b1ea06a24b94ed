"""Drives `keras.Model.fit`: the training model around a network, its optimizer, its batches, its callbacks."""

import dataclasses
import math
import sys
import time

import keras
import numpy as np
from keras import layers

from Training.augmentation import augmentation
from Training.checkpoint import Checkpoints, newest, restore, rewind
from Training.recipe import InputError
from Training.run_folder import save_model

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

    def set_epoch(self, epoch, first_step=0):
        """Take the order of this epoch, from its step `first_step` on."""
        self.first_step = first_step
        count = len(self.examples.labels)
        if self.seed is None:
            self.order = np.arange(count)
        else:
            self.order = np.random.default_rng((self.seed, epoch)).permutation(count)

    @property
    def steps_per_epoch(self):
        count = len(self.examples.labels) / self.batch_size
        return math.ceil(count) if self.seed is None else math.floor(count)

    def __len__(self):
        return self.steps_per_epoch - self.first_step

    def __getitem__(self, index):
        index += self.first_step
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
    """Adds learning rate, seconds and images/s to each epoch's logs.

    Images/s counts training steps alone, from the end of the first (which compiles) to the end of the last. `spent`,
    the seconds of an epoch so far, is part of a checkpoint, so that the time of a resumed run adds up.
    """

    def __init__(self, batches):
        super().__init__()
        self.batches = batches
        self.spent = 0.0

    def on_epoch_begin(self, epoch, logs=None):
        self.clock = time.perf_counter()
        self.first = None

    def tick(self):
        now = time.perf_counter()
        self.spent, self.clock = self.spent + now - self.clock, now
        return now

    def on_train_batch_end(self, batch, logs=None):
        self.last = (batch, self.tick())
        self.first = self.first or self.last

    def on_epoch_end(self, epoch, logs=None):
        self.tick()
        steps, seconds = (b - a for a, b in zip(self.first, self.last))
        logs["learning_rate"] = float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate))
        logs["seconds"] = self.spent
        logs["images_per_second"] = steps * self.batches.batch_size / seconds if steps else float("nan")
        self.spent = 0.0


class EpochOrder(keras.callbacks.Callback):
    """Gives each epoch its order of images."""

    def __init__(self, batches):
        super().__init__()
        self.batches = batches

    def on_epoch_begin(self, epoch, logs=None):
        self.batches.set_epoch(epoch, self.batches.first_step)

    def on_epoch_end(self, epoch, logs=None):
        self.batches.first_step = 0


def duration(seconds):
    """Seconds as words: 45 s, 12 min, 3 h 20 min."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


class RunProgress(keras.callbacks.ProgbarLogger):
    """Keras' progress bar, with the minutes left of the whole run; one line an epoch where there is no terminal.

    Args:
        run_epochs: int, epochs of the run.
        run_steps: int, steps of a whole epoch.
    """

    def __init__(self, run_epochs, run_steps):
        super().__init__()
        self.run_epochs = run_epochs
        self.run_steps = run_steps
        self.first_end = None
        self.left = None

    def set_params(self, params):
        super().set_params({**params, "epochs": self.run_epochs})

    def on_epoch_begin(self, epoch, logs=None):
        super().on_epoch_begin(epoch, logs)
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        now = time.perf_counter()
        done = self.epoch * self.run_steps + self.run_steps - self.target + batch + 1
        self.first_end = self.first_end or (now, done)  # the first step compiles: it says nothing of the others
        spent, steps = now - self.first_end[0], done - self.first_end[1]
        if steps:
            self.left = spent / steps * (self.run_epochs * self.run_steps - done)
            logs = {**(logs or {}), "minutes_left": self.left / 60}
        super().on_train_batch_end(batch, logs)

    def on_epoch_end(self, epoch, logs=None):
        super().on_epoch_end(epoch, logs)
        if epoch + 1 < self.run_epochs and self.left is not None:
            print(f"{epoch + 1} of {self.run_epochs} epochs, about {duration(self.left)} left of the run", flush=True)


class KeepBest(keras.callbacks.Callback):
    """Saves the network, not the training model around it, at each better validation accuracy.

    Keras' `ModelCheckpoint` overwrites its file in place: a kill within a save would lose the best network.
    """

    def __init__(self, path, network):
        super().__init__()
        self.path = path
        self.network = network
        self.best = -1.0

    def on_epoch_end(self, epoch, logs=None):
        if logs["val_accuracy"] > self.best:
            self.best = logs["val_accuracy"]
            save_model(self.network, self.path)


def watchers(recipe, folder, network, batches, events, state):
    """All that watches a run, in the order in which it must see the logs; the checkpoints stand last."""
    meter = EpochMeter(batches)
    chosen = [EpochOrder(batches), meter]
    remembered = {"meter": (meter, ("spent",))}
    if recipe.validation_split:
        best = KeepBest(folder / "best.keras", network)
        chosen.append(best)
        remembered["best"] = (best, ("best",))
    if recipe.schedule == "plateau":
        plateau = keras.callbacks.ReduceLROnPlateau(factor=0.1, patience=PLATEAU_EPOCHS)
        chosen.append(plateau)
        remembered["plateau"] = (plateau, ("best", "wait", "cooldown_counter"))
    if recipe.patience:
        stopping = keras.callbacks.EarlyStopping(patience=recipe.patience)
        chosen.append(stopping)
        remembered["stopping"] = (stopping, ("best", "wait"))
    chosen += [keras.callbacks.CSVLogger(folder / "history.csv", append=True), *events]
    chosen.append(RunProgress(recipe.epochs, batches.steps_per_epoch))
    saved = dataclasses.asdict(recipe)
    every = recipe.checkpoint_steps
    chosen.append(Checkpoints(folder, saved, batches.steps_per_epoch, remembered, every, state))
    return chosen


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


def fit(network, data, recipe, folder, make_events=lambda resumed: (), say=print):
    """Train a network as the recipe says; go on from the newest checkpoint in the folder where there is one.

    Args:
        network: the functional model of `Model`, weights and all.
        data: `data.Data`.
        recipe: `recipe.Recipe`.
        folder: path of the run's folder; gets history.csv, best.keras, last.keras, backup/ and event files.
        make_events: function of whether the run is resumed, giving callbacks that see each epoch's complete logs.
        say: is told, in one line each, what a person should know.

    Returns:
        The training model.

    Raises:
        InputError: fewer training images than one batch, or a checkpoint of another recipe.
        Interrupted: after SIGINT or SIGTERM, with the state saved.
        RunError: the loss or a weight is not finite, or no checkpoint can be written.
    """
    data.refuse_batch(recipe.batch_size)
    batches = Batches(data.train, recipe.batch_size, recipe.seed)
    held_out = Batches(data.validation, even_batch(len(data.validation.labels))) if recipe.validation_split else None
    model = compiled(network, recipe, batches.steps_per_epoch)
    state, arrays = newest(folder, say) or (None, None)
    if state:
        refuse_other_recipe(recipe, state["recipe"])
        restore(model, arrays)
    rewind(folder, state)
    epoch, batches.first_step = (state["epoch"], state["step"]) if state else (0, 0)
    # Keras' fit takes one number of steps for all epochs: one begun before is ended in a fit of its own.
    parts = [epoch + 1, recipe.epochs] if batches.first_step else [recipe.epochs]
    model.stop_training = bool(state and state["stopped"])
    for end in parts:
        if epoch < end and not model.stop_training:
            chosen = watchers(recipe, folder, network, batches, make_events(state is not None), state)
            model.fit(
                batches,
                shuffle=False,  # the batches are shuffled; Keras would order them anew from a state that no file holds
                validation_data=held_out,
                initial_epoch=epoch,
                epochs=end,
                callbacks=chosen,
                verbose=1 if sys.stdout.isatty() else 2,
            )
            epoch, state = end, chosen[-1].state
    save_model(network, folder / "last.keras")
    return model


def refuse_other_recipe(recipe, saved):
    """Raise `InputError` unless the checkpoint's recipe is this one, but for the number of epochs."""
    other = [
        name for name, value in dataclasses.asdict(recipe).items() if name != "epochs" and saved.get(name) != value
    ]
    if other:
        named = ", ".join(f"{name} (checkpoint: {saved.get(name)!r}, now: {getattr(recipe, name)!r})" for name in other)
        raise InputError(f"the run was started with another recipe: {named}")


def even_batch(count):
    """The largest batch up to 256 that divides `count`, so that a compiled function sees one shape.

    Where the largest divisor is under 32, 256, with a shorter last batch.
    """
    divisor = max(d for d in range(1, LARGEST_PREDICTED_BATCH + 1) if count % d == 0)
    return divisor if divisor >= min(32, count) else LARGEST_PREDICTED_BATCH

"""Drives `keras.Model.fit`: the training model around a network, its optimizer, its batches, its callbacks."""

import dataclasses
import json
import math
import sys
import time

import keras
import numpy as np
from keras import layers

from Training.augmentation import augmentations
from Training.checkpoint import Checkpoints, newest, restore, rewind
from Training.console import duration
from Training.devices import ONE, from_first
from Training.momentum import SGD
from Training.recipe import InputError, Recipe, shares
from Training.run_folder import save_model
from Training.stream import ReadAhead, local_order
from Training.training_model import training_model

PLATEAU_EPOCHS = 10
RESULTS = ("result.json", "predictions.csv")
NOT_DECAYED = ("gamma", "beta", "bias")
LARGEST_PREDICTED_BATCH = 256


class Batches(keras.utils.PyDataset):
    """Batches of raw images as uint8, in an order that is a function of the seed and the epoch alone.

    Args:
        examples: `data.Examples`.
        batch_size: int, images a batch.
        seed: int, or None for the given order with a shorter last batch. With a seed each epoch is shuffled, and
            what does not fill a batch is left out of that epoch, so that every step has one shape.
        stored_from: int, or None. With a number the batches hold no images but their positions on the device, where
            these examples begin at this one.
        random_crops: bool, whether a stream gives random parts of its pictures, a function of seed and epoch too.
        shards_at_once: int, see `stream.local_order`; 0 is one order over all.
        devices: `devices.Devices`. Of each batch this process reads its part alone. Without a seed, the last batch is
            filled with further images of weight 0 until the devices can share it; the weights of the others are then
            a little over 1, so that means over all batches are those over the examples.
        alternate: bool. Mirrors each image in every second epoch, half of them, drawn from the seed, in the even ones
            (Jordan 2024, https://arxiv.org/abs/2404.00498, "alternating flip"). A position on the device is then
            sent as its complement, `-1 - position`.
    """

    def __init__(
        self,
        examples,
        batch_size,
        seed=None,
        stored_from=None,
        random_crops=False,
        shards_at_once=0,
        devices=ONE,
        alternate=False,
    ):
        super().__init__()
        self.examples = examples
        self.batch_size = batch_size
        self.seed = seed
        self.stored_from = stored_from
        self.devices = devices
        self.random_crops = random_crops
        self.shards_at_once = shards_at_once
        self.mirrored = np.zeros(len(examples.labels), bool)
        if alternate:
            self.mirrored = np.random.default_rng((seed, 0, 0)).random(len(self.mirrored)) < 0.5
        self.alternate = alternate
        self.ahead = ReadAhead(self._read, getattr(examples.images, "workers", 0))
        self.set_epoch(0)

    def set_epoch(self, epoch, first_step=0):
        """Take the order of this epoch, from its step `first_step` on."""
        self.ahead.clear()
        self.first_step = first_step
        self.epoch = epoch
        count = len(self.examples.labels)
        if self.seed is None:
            self.order = np.arange(-(-count // self.devices.count) * self.devices.count)
            return
        rng = np.random.default_rng((self.seed, epoch))
        if self.shards_at_once:
            self.order = local_order(rng, self.examples.images.shard, self.shards_at_once)
        else:
            self.order = rng.permutation(count)

    @property
    def steps_per_epoch(self):
        count = len(self.examples.labels) / self.batch_size
        return math.ceil(count) if self.seed is None else math.floor(count)

    def __len__(self):
        return self.steps_per_epoch - self.first_step

    def __getitem__(self, index):
        index += self.first_step
        chosen = self._chosen(index)
        count = len(self.examples.labels)
        weights = () if len(self.order) <= count else ((chosen < count).astype("float32") * len(self.order) / count,)
        labels = self.examples.labels[chosen % count]
        if self.stored_from is not None:
            position = (chosen % count + self.stored_from).astype("int32")
            return np.where(self._mirror(chosen % count), -1 - position, position), labels, *weights
        return self.ahead.get(index, self.steps_per_epoch), labels, *weights

    def _chosen(self, index):
        """Positions of the images of a step that this process reads; what fills up lies behind the last of them."""
        chosen = self.order[index * self.batch_size : (index + 1) * self.batch_size]
        return chosen[self.devices.part(len(chosen))]

    def _mirror(self, chosen):
        """Which of these examples are mirrored in this epoch."""
        return self.mirrored[chosen] ^ (self.alternate and self.epoch % 2 == 1)

    def _read(self, index):
        """The images of a step."""
        chosen = self._chosen(index) % len(self.examples.labels)
        images = self.examples.images
        if self.random_crops:
            return images.crops(chosen, (self.seed, self.epoch))
        read = images[chosen]
        if self.alternate:
            mirror = self._mirror(chosen)
            read[mirror] = read[mirror, :, ::-1]
        return read


def mean_subtraction(mean, std=255.0):
    """The layer `(x - mean) / std`, so that a saved model takes raw images.

    Wang et al. 2017, section 4.1, subtract the mean of each pixel; the division by 255 only keeps numbers small (what
    follows the stem is normalized). Section 4.2 takes mean and deviation of each channel.

    Args:
        mean: float32 `(height, width, channels)` or `(channels,)`.
        std: float, or float32 `(channels,)`.
    """
    axis = (1, 2, 3) if mean.ndim == 3 else -1
    variance = np.broadcast_to(np.float32(std) ** 2, mean.shape)
    return layers.Normalization(axis=axis, mean=mean, variance=variance, dtype="float32", name="mean_subtraction")


@keras.saving.register_keras_serializable(package="ResidualAttention")
class LinearDecay(keras.optimizers.schedules.LearningRateSchedule):
    """A rate that rises from 0 to `rate` over `warmup` steps and falls to 0 at `steps`, both linearly."""

    def __init__(self, rate, warmup, steps):
        super().__init__()
        self.rate = rate
        self.warmup = warmup
        self.steps = steps

    def __call__(self, step):
        step = keras.ops.cast(step, "float32")
        rising = step / max(self.warmup, 1) if self.warmup else 1.0
        falling = (self.steps - step) / max(self.steps - self.warmup, 1)
        return self.rate * keras.ops.clip(keras.ops.minimum(rising, falling), 0.0, 1.0)

    def get_config(self):
        return {"rate": self.rate, "warmup": self.warmup, "steps": self.steps}


def learning_rate(recipe, steps_per_epoch):
    """A Keras schedule, or a number for the constant rate and for the plateau's first rate."""
    rate, steps = recipe.learning_rate, recipe.epochs * steps_per_epoch
    if recipe.schedule == "step":
        at = [round(share * steps) for share in shares(recipe.step_at)]
        return keras.optimizers.schedules.PiecewiseConstantDecay(at, [rate / 10**i for i in range(len(at) + 1)])
    warmup = round(recipe.warmup_epochs * steps_per_epoch)
    if recipe.schedule == "linear":
        return LinearDecay(rate, warmup, steps)
    if recipe.schedule == "cosine":
        ramp = dict(initial_learning_rate=0.0, warmup_target=rate, warmup_steps=warmup) if warmup else {}
        return keras.optimizers.schedules.CosineDecay(
            **{"initial_learning_rate": rate, "decay_steps": max(steps - warmup, 1), **ramp}
        )
    return rate


def with_l2(optimizer_class):
    """The Keras optimizer with L2 as the paper has it: `decay * weight` joins the gradient, before momentum.

    Keras' own `weight_decay` is decoupled, and its regularizers would put a term for each weight into the loss. An
    average of the weights (`use_ema`) becomes the weights when `finish_average` is called, not at the end of each
    `fit`, so that training can go on.
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

        def finalize_variable_values(self, var_list):
            pass

        def finish_average(self, variables):
            super().finalize_variable_values(variables)

    WithL2.__name__ = optimizer_class.__name__
    return WithL2


def optimizer(recipe, steps_per_epoch):
    """The recipe's optimizer, with its schedule and its kind of weight decay."""
    name = {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW", "rmsprop": "RMSprop"}[recipe.optimizer]
    extra = {"momentum": recipe.momentum, "nesterov": recipe.momentum > 0} if name == "SGD" else {}
    if recipe.ema:
        extra |= {"use_ema": True, "ema_momentum": recipe.ema}
    if recipe.weight_decay_kind == "decoupled":
        extra["weight_decay"] = recipe.weight_decay
    exempt = () if recipe.decay_all else NOT_DECAYED
    l2 = recipe.weight_decay if recipe.weight_decay_kind == "l2" else 0.0
    rate = learning_rate(recipe, steps_per_epoch)
    kind = SGD if name == "SGD" else getattr(keras.optimizers, name)
    made = with_l2(kind)(rate, l2=l2, exempt=exempt, **extra)
    if recipe.weight_decay_kind == "decoupled":
        made.exclude_from_weight_decay(var_names=list(exempt))
    return made


class EpochMeter(keras.callbacks.Callback):
    """Adds learning rate, seconds and images/s to each epoch's logs, and the seconds of a process' first step.

    Images/s counts training steps alone, from an epoch's begin, or from the end of the process' first step (which
    compiles), to the end of the last. `spent` and `compiling`, the seconds of an epoch so far and those of them in
    the first step of a process, are part of a checkpoint, so that the time of a resumed run adds up.
    """

    def __init__(self, batches):
        super().__init__()
        self.batches = batches
        self.spent = 0.0
        self.compiling = 0.0
        self.compiled = False

    def on_epoch_begin(self, epoch, logs=None):
        self.clock = time.perf_counter()
        self.first = (-1, self.clock) if self.compiled else None

    def tick(self):
        now = time.perf_counter()
        self.spent, self.clock = self.spent + now - self.clock, now
        return now

    def on_train_batch_end(self, batch, logs=None):
        if self.first is None or batch == len(self.batches) - 1:
            float(logs["loss"])  # a step is done when its loss is there
        began = self.clock
        self.last = (batch, self.tick())
        self.first = self.first or self.last
        if not self.compiled:
            self.compiling, self.compiled = self.compiling + self.clock - began, True

    def on_epoch_end(self, epoch, logs=None):
        self.tick()
        steps, seconds = (b - a for a, b in zip(self.first, self.last))
        logs["learning_rate"] = float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate))
        logs["seconds"] = self.spent
        logs["first_step_seconds"] = self.compiling
        logs["images_per_second"] = steps * self.batches.batch_size / seconds if steps else float("nan")
        self.spent = self.compiling = 0.0


class EpochOrder(keras.callbacks.Callback):
    """Gives each epoch its order of images."""

    def __init__(self, batches):
        super().__init__()
        self.batches = batches

    def on_epoch_begin(self, epoch, logs=None):
        self.batches.set_epoch(epoch, self.batches.first_step)

    def on_epoch_end(self, epoch, logs=None):
        self.batches.first_step = 0


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


WRITERS = (KeepBest, RunProgress, keras.callbacks.CSVLogger)


def watchers(recipe, folder, network, batches, events, state, validated):
    """All that watches a run, in the order in which it must see the logs; the checkpoints stand last.

    Of several processes the first alone writes; what changes the training is in each.
    """
    meter = EpochMeter(batches)
    chosen = [EpochOrder(batches), meter]
    remembered = {"meter": (meter, ("spent", "compiling"))}
    if validated:
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
    due = [*range(0, recipe.epochs, recipe.checkpoint_epochs), recipe.epochs]
    if not batches.devices.first:
        chosen = [each for each in chosen if not isinstance(each, WRITERS)]
    steps = batches.steps_per_epoch
    chosen.append(Checkpoints(folder, saved, steps, remembered, every, due, state, batches.devices))
    return chosen


def flipped(recipe):
    """Whether half of the images are flipped: a digit's mirror image is none."""
    return recipe.flip and recipe.dataset != "digits"


def compiled(network, recipe, steps_per_epoch, fill=0.0, stored=None):
    """The training model of a network, compiled as the recipe says.

    Args:
        network: the functional model of `Model`.
        recipe: `recipe.Recipe`.
        steps_per_epoch: int.
        fill: float, what cutout puts in place of pixels.
        stored: uint8 images to keep on the device, or None.
    """
    changes = augmentations(
        recipe.augmentation,
        rotation=recipe.rotation,
        shift=recipe.shift,
        flip=flipped(recipe) and not recipe.alternate_flip,
        cutout=recipe.cutout,
        fill=fill,
        mix=recipe.mix,
        seed=recipe.seed,
    )
    model = training_model(network, changes, stored, recipe.label_smoothing)
    model.compile(
        optimizer=optimizer(recipe, steps_per_epoch),
        weighted_metrics=[keras.metrics.SparseCategoricalAccuracy(name="accuracy")],
        jit_compile=recipe.jit or keras.backend.backend() == "jax",
        steps_per_execution=recipe.steps_per_execution,
    )
    # Made inside the traced step, the variables of optimizer and metrics would have TensorFlow trace it twice.
    model.optimizer.build(model.trainable_variables)
    model.compute_metrics(None, np.zeros(1, "int32"), np.zeros((1, network.output_shape[-1]), "float32"))
    model.reset_metrics()
    return model


def fit(network, data, recipe, folder, make_events=lambda resumed: (), say=print, devices=ONE):
    """Train a network as the recipe says; go on from the newest checkpoint in the folder where there is one.

    Args:
        network: the functional model of `Model`, weights and all.
        data: `data.Data`.
        recipe: `recipe.Recipe`.
        folder: path of the run's folder; gets history.csv, best.keras, last.keras, backup/ and event files.
        make_events: function of whether the run is resumed, giving callbacks that see each epoch's complete logs.
        say: is told, in one line each, what a person should know.
        devices: `devices.Devices`, over which each batch is split.

    Returns:
        The training model.

    Raises:
        InputError: fewer training images than one batch, or a checkpoint of another recipe.
        Interrupted: after SIGINT or SIGTERM, with the state saved.
        RunError: the loss or a weight is not finite, or no checkpoint can be written.
    """
    data.refuse_batch(recipe.batch_size)
    batches, held_out, stored = batched(data, recipe, devices)
    fill = float(np.mean(data.mean_and_std(recipe.mean)[0])) if recipe.cutout else 0.0
    model = compiled(network, recipe, batches.steps_per_epoch, fill, stored)
    state = resumed(model, recipe, folder, say, devices)
    epoch, batches.first_step = (state["epoch"], state["step"]) if state else (0, 0)
    # Keras' fit takes one number of steps for all epochs: one begun before is ended in a fit of its own.
    parts = [epoch + 1, recipe.epochs] if batches.first_step else [recipe.epochs]
    for end in parts:
        if epoch < end and not model.stop_training:
            chosen = watchers(
                recipe, folder, network, batches, make_events(state is not None), state, held_out is not None
            )
            try:
                model.fit(
                    batches,
                    shuffle=False,  # they are; Keras would order them anew from a state that no file holds
                    validation_data=held_out,
                    initial_epoch=epoch,
                    epochs=end,
                    callbacks=chosen,
                    verbose=0 if not devices.first else 1 if sys.stdout.isatty() else 2,
                )
            finally:
                chosen[-1].release_signals()
            epoch, state = end, chosen[-1].state
    if recipe.ema:
        scaled = model.optimizer  # in mixed_float16 Keras puts one that scales the loss around ours
        getattr(scaled, "inner_optimizer", scaled).finish_average(model.trainable_variables)
    if devices.first:
        save_model(network, folder / "last.keras")
    return model


def resumed(model, recipe, folder, say, devices):
    """The state of the newest checkpoint, whose arrays the model gets, or None where the run begins.

    The folder becomes what it was at the checkpoint; where training goes on, the result of an earlier end is removed.
    Arguments and errors are those of `fit`.
    """
    state, arrays = newest(folder, say) or (None, None)
    if state:
        refuse_other_recipe(recipe, state["recipe"])
        restore(model, arrays)
    refuse_other_position(devices, state)
    model.stop_training = bool(state and state["stopped"])
    if model.stop_training:
        say(f"the run was stopped by --patience {recipe.patience} after {state['epoch']} epochs, and stays so")
    if devices.first:
        rewind(folder, state)
        if not model.stop_training and (not state or state["epoch"] < recipe.epochs):
            for name in RESULTS:
                (folder / name).unlink(missing_ok=True)
    return state


def batched(data, recipe, devices):
    """Batches to train on, those to validate with, and all images of both where they are to lie on the device.

    Returns:
        `(batches, held_out, stored)`; the last two are None where there is nothing held out, or stored.
    """
    stored, starts = None, (None, None)
    if recipe.data_on_device:
        stored, starts = np.concatenate([data.train.images, data.validation.images]), (0, len(data.train.labels))
    crops = recipe.augmentation == "imagenet"
    batches = Batches(
        data.train, recipe.batch_size, recipe.seed, starts[0], crops, recipe.shards_at_once, devices,
        flipped(recipe) and recipe.alternate_flip,
    )  # fmt: skip
    count = len(data.validation.labels)
    if not count:
        return batches, None, stored
    return batches, Batches(data.validation, even_batch(count, devices.count), None, starts[1], devices=devices), stored


def refuse_other_recipe(recipe, saved):
    """Raise `InputError` unless the checkpoint's recipe is this one, but for the number of epochs.

    Fields that are newer than the checkpoint had their defaults there.
    """
    now, then = dataclasses.asdict(recipe), dataclasses.asdict(Recipe.from_json(json.dumps(saved)))
    other = [name for name in now if name != "epochs" and now[name] != then[name]]
    if other:
        named = ", ".join(f"{name} (checkpoint: {then[name]!r}, now: {now[name]!r})" for name in other)
        raise InputError(f"the run was started with another recipe: {named}")


def refuse_other_position(devices, state):
    """Raise `InputError` where this process would go on from elsewhere than the first: their folder is not one."""
    own = f"epoch {state['epoch']}, step {state['step']}" if state else "the start"
    first = from_first(devices, lambda: own)
    if own != first:
        raise InputError(f"the first process goes on from {first}, this one from {own}: they must see one run's folder")


def even_batch(count, devices=1):
    """The largest batch up to 256 that divides `count`, so that a compiled function sees one shape.

    Where the largest divisor is under 32, 256, with a shorter last batch. With several devices all of this holds for
    the images of one device, of 256 for all of them together.
    """
    count, largest = -(-count // devices), max(LARGEST_PREDICTED_BATCH // devices, 1)
    divisor = max(d for d in range(1, largest + 1) if count % d == 0)
    return devices * (divisor if divisor >= min(32 // devices, count) else largest)

"""Compiles the training model of a network, and runs `keras.Model.fit` from the start or from a checkpoint."""

import dataclasses
import json
from pathlib import Path

import keras
import numpy as np

from Training.console import format_count
from Training.data.batches import Batches, find_even_batch
from Training.devices import ONE, ask_first_process
from Training.engine.augmentation import Augmentation, Mix, make_augmentations
from Training.engine.callbacks import TimeBudget, make_callbacks
from Training.engine.checkpointing import restore
from Training.engine.event_callbacks import Trace
from Training.engine.feeding import feed
from Training.engine.optimizers import finish_average, make_optimizer, set_run_length
from Training.engine.statistics import make_statistics
from Training.engine.training_model import make_training_model
from Training.errors import InputError, RunError
from Training.recipe import Recipe, movable_fields, parse_steps
from Training.runs.checkpoint import load_newest
from Training.runs.run_folder import rewind, save_model

RESULTS = ("result.json", "predictions.csv")


def compile_model(network, recipe, steps_per_epoch, fill=0.0, stored=None, class_weights=None):
    """Make the training model of a network, compiled according to the recipe.

    Args:
        network: the functional model of `Model`.
        recipe: `recipe.Recipe`.
        steps_per_epoch: int.
        fill: float, value of the pixels that cutout replaces.
        stored: uint8 images to keep on the device, or None.
        class_weights: list of floats, one for each class, or None.

    Returns:
        A `training_model.TrainingModel`.
    """
    model = make_training_model(
        network,
        make_changes(recipe, fill),
        stored,
        recipe.label_smoothing,
        recipe.batch_size,
        class_weights=class_weights,
    )
    model.compile(
        optimizer=make_optimizer(recipe, steps_per_epoch),
        weighted_metrics=[keras.metrics.SparseCategoricalAccuracy(name="accuracy")],
        jit_compile=recipe.jit or keras.backend.backend() == "jax",
        steps_per_execution=recipe.steps_per_execution,
    )
    # TensorFlow would trace the step twice if it created the variables of optimizer and metrics.
    model.optimizer.build(model.trainable_variables)
    model.compute_metrics(None, np.zeros(1, "int32"), np.zeros((1, network.output_shape[-1]), "float32"))
    model.reset_metrics()
    return model


def fit(network, data, recipe, folder, make_events=lambda resumed: (), say=print, devices=ONE):
    """Train a network according to the recipe; resume from the newest checkpoint in the folder, if there is one.

    Args:
        network: the functional model of `Model` with its weights.
        data: `datasets.Data`.
        recipe: `recipe.Recipe`.
        folder: path of the run's folder, for history.csv, best.keras, last.keras, backup/ and event files.
        make_events: function that is called with a bool, whether the run is resumed, and returns callbacks that see
            the complete logs of each epoch.
        say: function that reports a line to the user.
        devices: `devices.Devices`, over which each batch is split.

    Returns:
        The training model.

    Raises:
        InputError: there are fewer training images than in one batch, or the checkpoint has another recipe.
        Interrupted: after SIGINT, SIGTERM or SIGHUP, with the state saved.
        RunError: the loss or a weight is not finite, or no checkpoint can be written.
    """
    data.refuse_batch(recipe.batch_size)
    batches, held_out, stored = make_batches(data, recipe, devices)
    fill = compute_fill(recipe, data)
    weights = balance_classes(data.train.labels, len(data.classes)) if recipe.class_weights == "balanced" else None
    model = compile_model(network, recipe, batches.steps_per_epoch, fill, stored, weights)
    budget = TimeBudget(recipe, devices, say)
    state = restore_state(model, recipe, folder, budget, batches.steps_per_epoch, say, devices)
    epoch, batches.first_step = (state["epoch"], state["step"]) if state else (0, 0)
    changes = [layer for layer in model.layers if isinstance(layer, Augmentation)]
    statistics = make_statistics(network, data.train, recipe, devices, changes)
    traces = make_traces(recipe, folder) if devices.first else []
    while epoch < budget.length and not model.stop_training:
        # Keras' fit has a fixed number of epochs, all with the same number of steps. The rest of an interrupted epoch,
        # and an epoch that decides how many follow, need a call of their own.
        end = epoch + 1 if batches.first_step or not budget.decided else budget.length
        set_length(model, recipe, budget.length, batches.steps_per_epoch)
        events = [*make_events(state is not None), *traces]
        validated = held_out is not None
        chosen = make_callbacks(recipe, folder, network, batches, events, state, validated, budget, statistics)
        try:
            model.fit(
                feed(batches),
                shuffle=False,  # the batches are already shuffled, in a reproducible order
                validation_data=None if held_out is None else feed(held_out),
                initial_epoch=epoch,
                epochs=end,
                callbacks=chosen,
                verbose=0,  # callbacks.RunProgress prints
            )
        finally:
            chosen[-1].release_signals()
        epoch, state = end, chosen[-1].state
    for trace in traces:
        trace.report_nothing(say)
    finish_network(model, recipe, statistics)
    if devices.first:
        save_model(network, folder / "last.keras")
    return model


def finish_network(model, recipe, statistics):
    """Give a trained network the weights and the normalization statistics that its run keeps."""
    if recipe.ema:
        finish_average(model)
    if statistics:
        statistics.recompute()


def compute_fill(recipe, data):
    """Return the value of the pixels that cutout replaces: the mean of the training images, 0 without cutout."""
    return float(np.mean(data.mean_and_std(recipe.mean)[0])) if recipe.cutout else 0.0


def make_changes(recipe, fill):
    """Make the layers that augment the images of a run; `fill` is the value of the pixels that cutout replaces."""
    return make_augmentations(recipe.augmentation, recipe, recipe.flips and not recipe.alternate_flip, fill)


def make_traces(recipe, folder):
    """Return a list with the callback of `--profile`, or an empty one. All calls of `fit` in a process share it."""
    return [Trace(Path(folder) / "train", *parse_steps(recipe.profile))] if recipe.profile else []


def balance_classes(labels, classes):
    """Return weights `n / (classes * n_c)` with which all classes contribute equally to the loss.

    Args:
        labels: int `(n,)`; `n_c` of them are class c.
        classes: int, number of classes.

    Returns:
        A list of floats; their mean over the labels is 1 if no class is empty.
    """
    counts = np.bincount(labels, minlength=classes)
    return (len(labels) / (classes * np.maximum(counts, 1))).tolist()


def set_length(model, recipe, epochs, steps_per_epoch):
    """Adapt the schedule of the learning rate and the mixing of images to a run of `epochs`."""
    set_run_length(model.optimizer, recipe, epochs)
    for layer in model.layers:
        if isinstance(layer, Mix):
            layer.set_last(epochs, steps_per_epoch)


def restore_state(model, recipe, folder, budget, steps_per_epoch, say, devices):
    """Restore the newest checkpoint into the model, and return its state, or None if there is no checkpoint.

    The folder is restored to its state at the checkpoint. If training continues, the results of an earlier end are
    removed. Arguments and errors are those of `fit`; `budget` receives the number of epochs that the run decided on.
    """
    state, arrays = load_newest(folder, say) or (None, None)
    if state:
        refuse_other_recipe(recipe, state["recipe"])
        budget.restore(state)
        refuse_impossible_position(state, budget.length, steps_per_epoch)
        restore(model, arrays)
    refuse_other_position(devices, state)
    model.stop_training = bool(state and state["stopped"])
    if model.stop_training:
        done = format_count(state["epoch"], "epoch")
        say(f"--patience {recipe.patience} stopped the run after {done}: it is not trained any further")
    if devices.first:
        rewind(folder, state, say)
        if not model.stop_training and (not state or state["epoch"] < budget.length):
            for name in RESULTS:
                (folder / name).unlink(missing_ok=True)
    return state


def make_batches(data, recipe, devices):
    """Make the batches for training and validation, and the images of both if they are kept on the device.

    Returns:
        `(batches, held_out, stored)`; `held_out` and `stored` may be None.
    """
    stored, starts = None, (None, None)
    if recipe.data_on_device:
        stored, starts = np.concatenate([data.train.images, data.validation.images]), (0, len(data.train.labels))
    batches = Batches(
        data.train,
        recipe.batch_size,
        recipe.seed,
        stored_from=starts[0],
        random_crops=recipe.random_crops,
        shards_at_once=recipe.shards_at_once,
        devices=devices,
        alternate=recipe.flips and recipe.alternate_flip,
    )
    count = len(data.validation.labels)
    if not count:
        return batches, None, stored
    return (
        batches,
        Batches(data.validation, find_even_batch(count, devices=devices.count), None, starts[1], devices=devices),
        stored,
    )


def refuse_other_recipe(recipe, saved):
    """Raise `InputError` unless the checkpoint has the same recipe, except for more epochs and for movable fields.

    Fields that are newer than the checkpoint get the values that the run used.
    """
    now, then = dataclasses.asdict(recipe), dataclasses.asdict(Recipe.from_json(json.dumps(saved)))
    # With --minutes, epochs are the length of the schedule.
    may_change = {*movable_fields(), *(() if recipe.minutes else ("epochs",))}
    other = [name for name in now if name not in may_change and now[name] != then[name]]
    if now["epochs"] < then["epochs"] and "epochs" not in other:
        other.append("epochs")
    if other:
        named = ", ".join(f"{name} (checkpoint: {then[name]!r}, now: {now[name]!r})" for name in other)
        raise InputError(f"the run was started with another recipe: {named}")


def refuse_impossible_position(state, epochs, steps_per_epoch):
    """Raise `RunError` if the checkpoint is at an epoch or a step that the run does not have."""
    epoch, step = state["epoch"], state["step"]
    if step >= steps_per_epoch or epoch + (step > 0) > epochs:
        raise RunError(
            f"the checkpoint is after {format_count(epoch, 'epoch')} and {format_count(step, 'step')}, of "
            f"{format_count(epochs, 'epoch')} of {format_count(steps_per_epoch, 'step')} each: "
            "it belongs to another run"
        )


def refuse_other_position(devices, state):
    """Raise `InputError` if this process would resume from another position than the first process."""
    own = f"epoch {state['epoch']}, step {state['step']}" if state else "the start"
    first = ask_first_process(devices, lambda: own)
    if own != first:
        raise InputError(
            f"the first process resumes from {first}, this one from {own}: they must share the run's folder"
        )

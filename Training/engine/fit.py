"""Drives `keras.Model.fit`: compiles the training model around a network, and trains it from start or checkpoint."""

import dataclasses
import json
import sys

import keras
import numpy as np

from Training.data.batches import Batches, find_even_batch
from Training.devices import ONE, ask_first_process
from Training.engine.augmentation import make_augmentations
from Training.engine.callbacks import make_callbacks
from Training.engine.checkpointing import restore
from Training.engine.optimizers import make_optimizer
from Training.engine.training_model import make_training_model
from Training.errors import InputError
from Training.recipe import Recipe
from Training.runs.checkpoint import load_newest
from Training.runs.run_folder import rewind, save_model

RESULTS = ("result.json", "predictions.csv")


def compile_model(network, recipe, steps_per_epoch, fill=0.0, stored=None):
    """The training model of a network, compiled as the recipe says.

    Args:
        network: the functional model of `Model`.
        recipe: `recipe.Recipe`.
        steps_per_epoch: int.
        fill: float, what cutout puts in place of pixels.
        stored: uint8 images to keep on the device, or None.

    Returns:
        A `training_model.TrainingModel`.
    """
    changes = make_augmentations(recipe.augmentation, recipe, recipe.flips and not recipe.alternate_flip, fill)
    model = make_training_model(network, changes, stored, recipe.label_smoothing, recipe.batch_size)
    model.compile(
        optimizer=make_optimizer(recipe, steps_per_epoch),
        weighted_metrics=[keras.metrics.SparseCategoricalAccuracy(name="accuracy")],
        jit_compile=recipe.jit or keras.backend.backend() == "jax",
        steps_per_execution=recipe.steps_per_execution,
    )
    # Made inside the traced step, the variables of optimizer and metrics would have TensorFlow trace it twice.
    model.optimizer.build(model.trainable_variables)
    model.compute_metrics(None, np.zeros(1, "int32"), np.zeros((1, network.output_shape[-1]), "float32"))
    model.reset_metrics()
    return model


def fit(network, data, recipe, folder, make_events=lambda restore_state: (), say=print, devices=ONE):
    """Train a network as the recipe says; go on from the newest checkpoint in the folder where there is one.

    Args:
        network: the functional model of `Model`, weights and all.
        data: `datasets.Data`.
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
    batches, held_out, stored = make_batches(data, recipe, devices)
    fill = float(np.mean(data.mean_and_std(recipe.mean)[0])) if recipe.cutout else 0.0
    model = compile_model(network, recipe, batches.steps_per_epoch, fill, stored)
    state = restore_state(model, recipe, folder, say, devices)
    epoch, batches.first_step = (state["epoch"], state["step"]) if state else (0, 0)
    # Keras' fit takes one number of steps for all epochs: one begun before is ended in a fit of its own.
    parts = [epoch + 1, recipe.epochs] if batches.first_step else [recipe.epochs]
    for end in parts:
        if epoch < end and not model.stop_training:
            chosen = make_callbacks(
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


def restore_state(model, recipe, folder, say, devices):
    """The state of the newest checkpoint, whose arrays the model gets, or None where the run begins.

    The folder becomes what it was at the checkpoint; where training goes on, the result of an earlier end is removed.
    Arguments and errors are those of `fit`.
    """
    state, arrays = load_newest(folder, say) or (None, None)
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


def make_batches(data, recipe, devices):
    """Batches to train on, those to validate with, and all images of both where they are to lie on the device.

    Returns:
        `(batches, held_out, stored)`; the last two are None where there is nothing held out, or stored.
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
        Batches(data.validation, find_even_batch(count, devices.count), None, starts[1], devices=devices),
        stored,
    )


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
    first = ask_first_process(devices, lambda: own)
    if own != first:
        raise InputError(f"the first process goes on from {first}, this one from {own}: they must see one run's folder")

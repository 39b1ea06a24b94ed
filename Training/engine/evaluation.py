"""Evaluates a trained network: errors on all parts of the data and cost, as `result.json` and as a table."""

import keras
import numpy as np

from Training.console import format_count, format_duration
from Training.data.batches import Batches, find_even_batch
from Training.data.datasets import Examples, spread_evenly
from Training.devices import ONE
from Training.engine.feeding import feed
from Training.engine.training_model import cross_entropy, make_logits_model

MOST_TRAIN_IMAGES = 50_000  # largest number of images for the training error
TOP_5_ABOVE = 10  # with more classes, the top-5 error is reported too


def score(model, examples, devices=ONE, mirrored=False, batch_size=None):
    """Compute cross-entropy, accuracy and logits of a model on examples, or on their mirror images.

    Args:
        model: a model from raw images to logits, see `training_model.make_logits_model`.
        examples: `datasets.Examples`.
        devices: `devices.Devices`.
        mirrored: bool, whether to use the mirror images.
        batch_size: int, or None for `find_even_batch` of these examples.

    Returns:
        `(loss, accuracy, logits)`, the loss in nats without penalties, or three times None if there are no examples.
    """
    count = len(examples.labels)
    if not count:
        return None, None, None
    batch_size = batch_size or find_even_batch(count, devices=devices.count)
    batches = Batches(examples, batch_size, devices=devices, mirrored=mirrored, padded=True)
    logits = model.predict(feed(batches), verbose=0)[:count]
    loss = np.mean(keras.ops.convert_to_numpy(cross_entropy(examples.labels, logits)))
    return float(loss), accuracy(logits, examples.labels), logits


def accuracy(logits, labels):
    """Return the share of images whose label has the highest logit."""
    return float(np.mean(np.argmax(logits, axis=-1) == labels))


def top_5(logits, labels):
    """Return the share of images whose label is among the five highest logits, or None for up to 10 classes."""
    if logits.shape[1] <= TOP_5_ABOVE:
        return None
    return float(np.mean(keras.ops.convert_to_numpy(keras.ops.in_top_k(labels, logits, 5))))


def limit_examples(examples, limit):
    """Return the examples or, if there are more than `limit`, that many evenly spaced ones."""
    if len(examples.labels) <= limit:
        return examples
    chosen = spread_evenly(len(examples.labels), limit)
    return Examples(examples.images.take(chosen, axis=0), examples.labels[chosen])


def _percent(accuracy):
    return None if accuracy is None else round(100 * (1 - accuracy), 4)


def evaluate(network, data, flip=False, devices=ONE):
    """Compute the errors of the last weights on all three parts of the data. Only here is the test set used.

    The training error is that of at most 50,000 evenly spaced images.

    Args:
        network: a functional model of `Model`.
        data: `datasets.Data`.
        flip: bool, whether to report also the test error with the probabilities of each image and its mirror image
            averaged.
        devices: `devices.Devices`.

    Returns:
        `(figures, logits)`: a dictionary for `result.json`, and the logits of the test set `(n, classes)`.
    """
    model = make_logits_model(network)
    measured = limit_examples(data.train, MOST_TRAIN_IMAGES)
    counts = [len(examples.labels) for examples in (measured, data.validation, data.test)]
    shared = dict(devices=devices, batch_size=find_even_batch(*counts, devices=devices.count))
    _, train, _ = score(model, measured, **shared)
    validation_loss, validation, _ = score(model, data.validation, **shared)
    test_loss, test, logits = score(model, data.test, **shared)
    figures = {
        "test_accuracy": test,
        "test_loss": test_loss,
        "test_error_percent": _percent(test),
        "test_top_5_error_percent": _percent(top_5(logits, data.test.labels)),
        "train_error_percent": _percent(train),
        "validation_accuracy": validation,
        "validation_loss": validation_loss,
        "validation_error_percent": _percent(validation),
    }
    if flip:
        twice = logits, score(model, data.test, **shared, mirrored=True)[2]
        both = sum(keras.ops.convert_to_numpy(keras.ops.softmax(z)) for z in twice)
        figures["test_error_flip_percent"] = _percent(accuracy(both, data.test.labels))
    return figures, logits


def summarize(figures, recipe, history, network, environment, steps_per_epoch):
    """Return the content of `result.json`.

    `running_time_s` is the time of all epochs with validation, but without start and final evaluation. `first_step_s`
    is the part of it that the first step took, with compilation (the first call, if a call has several steps).
    `images_per_s` is the median over the epochs of the rate of training alone. `training_time_s` is the running time
    without compilation: the steps of first calls are counted at that rate. All are over the epochs in `history.csv`.
    """
    rates = [rate for rate in history["images_per_second"] if np.isfinite(rate)]
    rate = float(np.median(rates)) if rates else None
    running, first = sum(history["seconds"]), sum(history["first_step_seconds"])
    calls = sum(seconds > 0 for seconds in history["first_step_seconds"])
    images = calls * min(recipe.steps_per_execution, steps_per_epoch) * recipe.batch_size
    return {
        **figures,
        "running_time_s": round(running, 2),
        "first_step_s": round(first, 2),
        "training_time_s": round(running - first + images / rate, 2) if rate else None,
        "images_per_s": round(rate, 2) if rate else None,
        "parameters": network.count_params(),
        "epochs": len(history["seconds"]),
        "dataset": recipe.dataset,
        "model": recipe.model,
        "learning": recipe.learning,
        "backend": environment["backend"],
        "device": environment["device"],
        "seed": recipe.seed,
    }


def format_predictions(labels, predictions):
    """Return the predictions as CSV: number, label and predicted class of each test image in order, counted from 0."""
    rows = [f"{i},{label},{predicted}" for i, (label, predicted) in enumerate(zip(labels, predictions))]
    return "\n".join(["index,label,predicted", *rows]) + "\n"


def format_result(values):
    """Return the result as a table for the console."""

    def format_value(key, text="{}", scale=1):
        value = values.get(key)
        return "-" if value is None else text.format(value * scale if scale != 1 else value)

    rows = [
        ("network", f"{values['model']}, {values['learning']}, {values['parameters']:,} parameters"),
        ("data set", f"{values['dataset']}, {format_count(values['epochs'], 'epoch')}, seed {values['seed']}"),
        ("test accuracy", format_value("test_accuracy", "{:.2f} %", 100)),
        ("test error", format_value("test_error_percent", "{:.2f} %")),
        ("top-5 error", format_value("test_top_5_error_percent", "{:.2f} %")),
        ("with mirror image", format_value("test_error_flip_percent", "{:.2f} %")),
        ("test loss", format_value("test_loss", "{:.4f}")),
        ("validation error", format_value("validation_error_percent", "{:.2f} %")),
        ("train error", format_value("train_error_percent", "{:.2f} %")),
        (
            "running time",
            f"{format_duration(values['running_time_s'])}, {values['first_step_s']:.0f} s of it the first step",
        ),
        ("training speed", format_value("images_per_s", "{:.0f} images/s")),
        ("on", f"{values['device']}, {values['backend']}"),
    ]
    return "\n".join(f"  {name:<17} {value}" for name, value in rows if value != "-")

"""What a run came to: its errors and its cost, as `result.json` and as a table."""

import keras
import numpy as np

from Training.fit import Batches, duration, even_batch


def scores(model, examples):
    """Cross-entropy, accuracy and predicted classes of the training model on examples, without augmentation.

    Returns:
        `(loss, accuracy, predictions)`, the loss in nats without penalties, or Nones where there are no examples.
    """
    count = len(examples.labels)
    if not count:
        return None, None, None
    logits = model.predict(Batches(examples, even_batch(count)), verbose=0)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)(examples.labels, logits)
    predictions = np.argmax(logits, axis=-1)
    return float(loss), float(np.mean(predictions == examples.labels)), predictions


def _percent(accuracy):
    return None if accuracy is None else round(100 * (1 - accuracy), 4)


def evaluate(model, data):
    """Errors of the last weights on all three parts of the data; the test set is predicted once, here.

    Returns:
        `(figures, predictions)`: a dictionary for `result.json` and the predicted classes of the test set.
    """
    _, train, _ = scores(model, data.train)
    validation_loss, validation, _ = scores(model, data.validation)
    test_loss, test, predictions = scores(model, data.test)
    figures = {
        "test_accuracy": test,
        "test_loss": test_loss,
        "test_error_percent": _percent(test),
        "train_error_percent": _percent(train),
        "validation_accuracy": validation,
        "validation_loss": validation_loss,
        "validation_error_percent": _percent(validation),
    }
    return figures, predictions


def result(figures, recipe, history, network, environment):
    """Everything that `result.json` holds.

    `running_time_s` is the time in epochs, validation included, start and evaluation not; `images_per_s` is the
    median epoch's rate of training alone. Both are over all epochs in `history.csv`.
    """
    rates = [rate for rate in history["images_per_second"] if np.isfinite(rate)]
    return {
        **figures,
        "running_time_s": round(sum(history["seconds"]), 2),
        "images_per_s": round(float(np.median(rates)), 2) if rates else None,
        "parameters": network.count_params(),
        "epochs": len(history["seconds"]),
        "dataset": recipe.dataset,
        "model": recipe.model,
        "learning": recipe.learning,
        "backend": environment["backend"],
        "device": environment["device"],
        "seed": recipe.seed,
    }


def read_history(path):
    """The columns of a history.csv as lists of numbers.

    An epoch that was repeated after an interruption counts with its last row.
    """
    import csv

    with open(path, newline="", encoding="utf-8") as file:
        rows = {int(row["epoch"]): row for row in csv.DictReader(file)}
    return {key: [float(rows[epoch][key]) for epoch in sorted(rows)] for key in next(iter(rows.values()))}


def table(values):
    """The result as a table for the console."""

    def shown(key, text="{}", scale=1):
        value = values[key]
        return "-" if value is None else text.format(value * scale if scale != 1 else value)

    rows = [
        ("network", f"{values['model']}, {values['learning']}, {values['parameters']:,} parameters"),
        ("data set", f"{values['dataset']}, {values['epochs']} epochs, seed {values['seed']}"),
        ("test accuracy", shown("test_accuracy", "{:.2f} %", 100)),
        ("test error", shown("test_error_percent", "{:.2f} %")),
        ("test loss", shown("test_loss", "{:.4f}")),
        ("validation error", shown("validation_error_percent", "{:.2f} %")),
        ("train error", shown("train_error_percent", "{:.2f} %")),
        ("running time", duration(values["running_time_s"])),
        ("training speed", shown("images_per_s", "{:.0f} images/s")),
        ("on", f"{values['device']}, {values['backend']}"),
    ]
    return "\n".join(f"  {name:<17} {value}" for name, value in rows)

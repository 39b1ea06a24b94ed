"""Writes TensorBoard events at the end of a run: final errors, confusion matrix, precision-recall curves, mistakes."""

import keras
import numpy as np

from Training.data.datasets import spread_evenly
from Training.devices import copy_to_one_device, on_one_device
from Training.recipe import compared_fields, label_run
from Training.runs.event_file import EventFile, is_available, write_projector
from Training.visual import inspection, plots
from Training.visual.escaping import escape_console, make_markdown_table, shorten_name

PROJECTED = 2000  # images, at most, in the projector
MOST_CURVES = 100  # classes above which no precision-recall curves are written
METRICS = ("final/test_error_percent", "final/validation_error_percent", "final/train_error_percent")


def write_final_events(folder, network, data, recipe, result, logits, clock=None):
    """Write the end of a run: final errors, the result, confusion matrix, precision-recall curves and the hparams row.

    By option also the projector (`recipe.projector`) and the most confidently wrong images (`recipe.mistakes`).

    Args:
        folder: path of the run's folder.
        network: the trained network.
        data: `datasets.Data`.
        recipe: `recipe.Recipe`.
        result: dictionary, the content of `result.json`.
        logits: `(n, classes)`, of the test images.
        clock: see `EventFile`.
    """
    if not is_available():
        return
    probabilities = keras.ops.convert_to_numpy(keras.ops.softmax(logits))
    place, labels = folder / "train", np.asarray(data.test.labels)
    step = result.get("epochs") or recipe.epochs  # those trained; results of earlier versions may lack them
    file = EventFile(place, clock)
    for key, value in result.items():
        if key.endswith(("_percent", "_accuracy", "_loss")) and value is not None:
            file.scalar(f"final/{key}", value, step)
    rows = [(key, f"{value:,}" if isinstance(value, int) else value) for key, value in result.items()]
    file.text("result", make_markdown_table(["", ""], [row for row in rows if row[1] is not None]), step)
    predictions = probabilities.argmax(axis=-1)
    if len(data.classes) <= plots.MOST_CLASSES:
        file.image("confusion_matrix", plots.draw_confusion(labels, predictions, data.classes), step)
    for i, name in enumerate(data.classes if len(data.classes) <= MOST_CURVES else ()):
        title = f"{i}: {escape_console(shorten_name(name, 40))}" if name != str(i) else name
        file.pr_curve(f"class/{title}", labels == i, probabilities[:, i], step)
    if recipe.mistakes:
        wrong = plots.find_mistakes(labels, probabilities, recipe.mistakes)
        if len(wrong):
            images = data.test.images[wrong]
            picture = plots.draw_mistakes(images, labels[wrong], probabilities[wrong], data.classes)
            file.image("most_confident_mistakes", picture, step)
    shown = {name: getattr(recipe, name) for name in (*compared_fields(), "seed")}
    file.hparams(shown, METRICS, label_run(recipe))
    file.close()
    if recipe.projector:
        project_features(place, network, data, predictions)


def project_features(folder, network, data, predictions):
    """Write the features before the classifier of up to `PROJECTED` test images for the PROJECTOR page.

    Args:
        folder: path of a folder with event files.
        network: the trained network.
        data: `datasets.Data`.
        predictions: int `(n,)`, predicted classes of the test images.
    """
    chosen = spread_evenly(len(data.test.labels), min(PROJECTED, len(data.test.labels)))
    images, labels = data.test.images[chosen], data.test.labels[chosen]
    shown = copy_to_one_device(network)
    if shown is not network:
        shown.set_weights(network.get_weights())
    with on_one_device():
        features = inspection.make_feature_model(shown).predict(images, batch_size=64, verbose=0)
    names = [escape_console(shorten_name(name, 60)) for name in data.classes]
    if all(name.isdigit() for name in names):  # the page labels points by the first column without numbers
        names = [f"class {name}" for name in names]
    columns = {
        "class": [names[label] for label in labels],
        "predicted": [names[i] for i in predictions[chosen]],
        "right": ["yes" if right else "no" for right in labels == predictions[chosen]],
        "number": [str(i) for i in chosen],
    }
    write_projector(folder, "features before the classifier", features, columns, images)

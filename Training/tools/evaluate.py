"""Measure the error of a saved network, or of weights that come with the project, on the test part of a data set.

python -m Training.tools.evaluate --model cifar10 --data-dir data
python -m Training.tools.evaluate --model Logs/<run> --dataset cifar10 --flip --statistics 2048
"""

import dataclasses
import json
from typing import NamedTuple

import numpy as np

from Training.console import entry_point, format_count, run_program, start_keras
from Training.data.datasets import load_for_recipe
from Training.devices import ONE
from Training.errors import InputError, format_path
from Training.flags import Parser, add_data_flags
from Training.runs import saved

PROGRAM = "python -m Training.tools.evaluate"
PRECISIONS = ("float32", "saved")
STATISTICS_BATCH = 128  # images normalized together while statistics are recomputed
MASK_IMAGES = 2048  # training images over which masks are averaged
CONFIDENCE = 0.95


class Error(NamedTuple):
    """The number of wrongly classified images, of `total` images."""

    wrong: int
    total: int

    @property
    def percent(self):
        return 100 * self.wrong / self.total

    @property
    def interval(self):
        """The 95 % Wilson confidence interval of the error in per cent.

        Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference", JASA 22.
        """
        from scipy.stats import binomtest

        low, high = binomtest(self.wrong, self.total).proportion_ci(CONFIDENCE, method="wilson")
        return 100 * float(low), 100 * float(high)

    def to_dict(self):
        """Return the error and its interval as plain data."""
        low, high = self.interval
        return {
            "wrong": self.wrong,
            "images": self.total,
            "error_percent": round(self.percent, 4),
            "interval_percent": [round(low, 4), round(high, 4)],
        }


def parse(arguments):
    parser = Parser(prog=PROGRAM, description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument(
        "--model",
        required=True,
        metavar="NAME|RUN|FILE",
        help="weights such as cifar10, a run's folder or a .keras file",
    )
    parser.add_argument("--best", action="store_true", help="the run's best.keras instead of its last.keras")
    add_data_flags(parser)
    parser.add_argument(
        "--flip", action="store_true", help="also average the probabilities of each image and its mirror image"
    )
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="float32",
        help="arithmetic; saved: that of the saved network (default: float32)",
    )
    parser.add_argument(
        "--statistics", type=int, default=0, metavar="N",
        help="also recompute the statistics of the normalizations over N training images, augmented as in the recipe",
    )  # fmt: skip
    parser.add_argument(
        "--average-masks", action="store_true",
        help="also replace the soft masks by their means over the positions of each image, and over images and "
        "positions: what the error becomes without attention",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead of a table")
    options = parser.parse_args(arguments)
    if options.statistics < 0:
        parser.error(f"--statistics must be 0 or more, received {options.statistics}")
    return options


def refuse_other_data(network, names, data, what):
    """Raise `InputError` if the data set has other images or classes than the network."""
    saved.refuse_other_images(network, data, what)
    if network.output_shape[1] != len(data.classes):
        raise InputError(f"the network has {network.output_shape[1]} classes, {what} has {len(data.classes)}")
    if names and tuple(names) != tuple(data.classes):
        pairs = zip(names, data.classes)
        first = next((f"{a!r:.80}, in {what} {b!r:.80}" for a, b in pairs if a != b), "")
        raise InputError(f"the classes of the network and of {what} differ, first: {first}")
    if not any(layer.name == "logits" for layer in network.layers):
        raise InputError("the network has no layer logits: it is not one of this project")


def find_wrong(network, examples, flip=False):
    """Return which images a network classifies wrongly, `{"plain": bool (n,)}`.

    Args:
        network: a functional model of `Model`.
        examples: `datasets.Examples`.
        flip: bool, whether to add "flip", with the probabilities of each image and its mirror image averaged.
    """
    import keras

    from Training.engine.evaluation import score
    from Training.engine.training_model import make_logits_model

    model = make_logits_model(network)
    values = {"plain": score(model, examples)[2]}
    if flip:
        both = values["plain"], score(model, examples, mirrored=True)[2]
        values["flip"] = sum(keras.ops.convert_to_numpy(keras.ops.softmax(logits)) for logits in both)
    return {name: np.argmax(each, axis=-1) != examples.labels for name, each in values.items()}


def count_errors(wrong, labels, classes):
    """Return the errors of all images and of each class, `{"all": Error, "class <name>": Error, ...}`."""
    found = {"all": Error(int(wrong.sum()), len(wrong))}
    for i, name in enumerate(classes):
        mine = wrong[labels == i]
        if len(mine):
            found[f"class {name}"] = Error(int(mine.sum()), len(mine))
    return found


def measure(network, data, flip=False, statistics=0, recipe=None):
    """Measure a network's errors on the test part of a data set.

    Args:
        network: a functional model of `Model`. With `statistics`, its moving statistics change.
        data: `datasets.Data`.
        flip: bool, whether to measure also with mirror images averaged.
        statistics: int, number of training images over which statistics are recomputed for further measurements, or 0.
        recipe: `recipe.Recipe`, whose augmentation these images get.

    Returns:
        `{"plain": errors, "flip": errors, "statistics": errors, "statistics, flip": errors}`, those that were asked
        for; errors are those of `count_errors`.
    """
    from Training.engine.fit import compute_fill, make_changes
    from Training.engine.statistics import Statistics, choose_examples

    found = {}
    for recomputed in (False, True) if statistics else (False,):
        if recomputed:
            examples = choose_examples(data.train, statistics, STATISTICS_BATCH)
            changes = make_changes(recipe, compute_fill(recipe, data))
            Statistics(network, examples, STATISTICS_BATCH, ONE, changes, recipe.random_crops).recompute()
        for name, wrong in find_wrong(network, data.test, flip).items():
            if recomputed:
                name = "statistics" if name == "plain" else f"statistics, {name}"
            found[name] = count_errors(wrong, data.test.labels, data.classes)
    return found


def count_statistics_images(data, options):
    """Return over how many training images the statistics were recomputed: whole batches, near to what was asked."""
    from Training.engine.statistics import choose_examples

    if not options.statistics:
        return 0
    return len(choose_examples(data.train, options.statistics, STATISTICS_BATCH).labels)


def measure_averaged_masks(network, data):
    """Measure a network's errors with its soft masks replaced by their means, see `inspection.average_masks`.

    Returns:
        `{"positions": errors, "images": errors}`: means over the positions of each image, and over all positions of
        `MASK_IMAGES` training images. Errors are those of `count_errors`.

    Raises:
        InputError: the network has no attention blocks.
    """
    from Training.engine.statistics import choose_examples
    from Training.visual.inspection import average_masks, find_blocks

    if not find_blocks(network):
        raise InputError("--average-masks needs a network with attention blocks, and this one has none")
    images = choose_examples(data.train, MASK_IMAGES, STATISTICS_BATCH).images
    found = {}
    for name, over in (("positions", None), ("images", images[:])):
        wrong = find_wrong(average_masks(network, over), data.test)["plain"]
        found[name] = count_errors(wrong, data.test.labels, data.classes)
    return found


LABELS = {
    "plain": "error",
    "positions": "masks averaged over positions",
    "images": "masks averaged over images",
    "flip": "with mirror images averaged",
    "statistics": "with recomputed statistics",
    "statistics, flip": "with both",
}


def format_error(label, error):
    """Return a row of the table of errors."""
    low, high = error.interval
    return f"  {label:<30} {error.percent:6.2f} %   {low:.2f} to {high:.2f} %   {error.wrong:,} of {error.total:,}"


def format_errors(found):
    """Return the errors as a table: one row for each way of measuring, then the plain errors of each class."""
    classes = {name.removeprefix("class "): each for name, each in found["plain"].items() if name != "all"}
    rows = [*((LABELS[name], errors["all"]) for name, errors in found.items()), *classes.items()]
    return "\n".join(format_error(format_path(label), error) for label, error in rows)


def run(options):
    path = saved.find(options.model, options.best)
    recipe = saved.find_recipe(path, options.dataset, options.data_dir)
    # Errors are measured on all test images with their true labels, and statistics may need all training images.
    recipe = dataclasses.replace(recipe, label_noise=0.0, samples=0, eval_samples=0)
    keras = start_keras()
    network = saved.load(path)
    names = saved.read_classes(path, network.output_shape[1])
    data = load_for_recipe(saved.fit_image_size(recipe, network))
    refuse_other_data(network, names, data, recipe.dataset)
    if options.precision == "float32":
        network = saved.convert_to_float32(network)
    with data.reading():
        masks = measure_averaged_masks(network, data) if options.average_masks else {}
        found = {**measure(network, data, options.flip, options.statistics, recipe), **masks}
    if options.json:
        errors = {name: {key: error.to_dict() for key, error in each.items()} for name, each in found.items()}
        what = {"model": str(path), "dataset": recipe.dataset, "precision": options.precision}
        print(json.dumps({**what, "statistics_images": count_statistics_images(data, options), "errors": errors}))
        return
    arithmetic = f"{options.precision} arithmetic on {keras.backend.backend()}"
    tested = format_count(len(data.test.labels), "test image")
    print(f"{format_path(path)} on {recipe.dataset}: {tested}, {arithmetic}, 95 % intervals")
    print(format_errors(found))


@entry_point(PROGRAM)
def main(arguments=None):
    run(parse(arguments))


if __name__ == "__main__":
    run_program(main)

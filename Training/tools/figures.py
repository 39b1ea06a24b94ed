"""Draw figures of runs as PNG files: `python -m Training.tools.figures FIGURE RUN`.

- masks: the mean soft mask of each attention block as a heat map over images;
- channels: features before a mask, the mask, and features after it (figure 1 of the paper);
- responses: mean absolute responses along the network, one line per run (figure 4 of the paper);
- confusion: the confusion matrix of the test set;
- mistakes: the test images that are classified wrongly with the highest probability.
"""

import argparse
import csv
import dataclasses
import io
from pathlib import Path

import numpy as np

from Model.geometries import format_name
from Training.console import entry_point, report_errors, run_program, start_keras
from Training.data import decoding
from Training.data.datasets import load_for_recipe, load_photographs
from Training.errors import InputError, format_path
from Training.files import read_text
from Training.flags import Parser
from Training.runs import saved
from Training.visual.escaping import escape_console

LARGEST_PREDICTIONS = 16 * 2**20  # bytes of predictions.csv: a million rows
PROGRAM = "python -m Training.tools.figures"
MEASURED = 256  # images over which responses are averaged


def find_recipe(run, best=False):
    """Return the path of the `recipe.json` next to the network that `saved.find` returns, or None."""
    path = saved.find(run, best).with_name("recipe.json")
    return path if path.is_file() else None


def load_data(network, run, options, instead=""):
    """Return a run's data set, or the one in `--data-dir`.

    Raises:
        InputError: the run has no recipe, its data cannot be read, or the images have another size than the network's.
            The message for a missing recipe ends with `instead`, what to do then.
    """
    path = find_recipe(run, options.best)
    if path is None:
        raise InputError(f"{format_path(run)} has no recipe.json, which names the data to show{instead}")
    recipe = saved.read_recipe(path)
    data = load_for_recipe(dataclasses.replace(recipe, data_dir=options.data_dir or recipe.data_dir, cache=""))
    saved.refuse_other_images(network, data, recipe.dataset)
    return data


def load_images(network, options):
    """Return the images that a figure shows or chooses from, uint8 `(n, height, width, 3)`, and a name for each."""
    height, width = network.input_shape[1:3]
    count = None if options.figure == "channels" else options.count  # of channels, there
    if options.photographs:
        return load_photographs(height, width)[:count], ["temple", "its roof", "flower", "its middle"][:count]
    if options.images:
        images = [decoding.read(path, (height, width)) for path in options.images]
        return np.stack(images), [Path(path).stem for path in options.images]
    data = load_data(network, options.run, options, ": give --images")
    _, first = np.unique(data.test.labels, return_index=True)  # one of each class
    chosen = first[:count]
    return data.test.images[chosen], [data.classes[label] for label in data.test.labels[chosen]]


def load_network(run, best):
    """Return the network of a run, and print its file, since a run has two.

    Raises:
        InputError: see `saved`.
    """
    path = saved.find(run, best)
    print(f"network: {format_path(path)}")
    return saved.load(path)


def load_attentive(run, best):
    """Return the network of a run, and its attention blocks.

    Raises:
        InputError: see `saved`; or the network has no attention blocks.
    """
    from Training.visual import inspection

    network = load_network(run, best)
    blocks = inspection.find_blocks(network)
    if not blocks:
        raise InputError(
            f"{format_path(saved.find(run, best))} has no attention blocks: a network of this project is needed"
        )
    return network, blocks


def draw_masks(options):
    """Return the figure of masks, as pixels."""
    from Training.visual import inspection, plots

    network, _ = load_attentive(options.run, options.best)
    images, names = load_images(network, options)
    return plots.draw_masks(images, inspection.make_mask_model(network).predict(images, verbose=0), names)


def draw_channels(options):
    """Return the figure of the features of one image in one block, as pixels."""
    from Training.visual import inspection, plots

    network, blocks = load_attentive(options.run, options.best)
    images, _ = load_images(network, options)
    if options.number >= len(images):
        raise InputError(f"--number must be less than {len(images)}, the number of images, received {options.number}")
    image = images[options.number]
    known = {block.name: block for block in blocks}
    name = options.block or blocks[0].name
    if name not in known:
        raise InputError(f"--block must be one of {', '.join(known)}, received {name!r:.80}")
    both = inspection.make_branch_model(network).predict(image[None], verbose=0)[name]
    return plots.draw_channels(image, both["trunk"][0], both["mask"][0], known[name].learning, options.count)


def label_runs(runs, blocks, best=False):
    """Return a different short name for each run: its network and learning, if needed with its folder or path.

    Raises:
        InputError: a run is given twice.
    """
    labels = []
    for run, own in zip(runs, blocks):
        path = find_recipe(run, best)
        model = saved.read_recipe(path).model if path else Path(run).stem
        labels.append(f"{format_name(model)}, {own[0].learning.upper()}")
    places = [saved.find(run, best).resolve() for run in runs]
    for run, place in zip(runs, places):
        if places.count(place) > 1:
            raise InputError(f"each run must be given once, received {format_path(run)} twice")
    for names in ([Path(run).resolve().name for run in runs], [str(place) for place in places]):
        labels = [f"{label}, {name}" if labels.count(label) > 1 else label for label, name in zip(labels, names)]
    return labels


def draw_responses(options):
    """Print the responses of all runs, and return their figure as pixels."""
    from Training.visual import inspection, plots

    networks = [load_attentive(run, options.best) for run in options.runs]
    labels, measured = label_runs(options.runs, [blocks for _, blocks in networks], options.best), {}
    for label, run, (network, _) in zip(labels, options.runs, networks):
        test = load_data(network, run, options).test
        measured[label] = inspection.measure_responses(network, test.images[:MEASURED])
        numbers = ", ".join(f"{name} {value:.3g}" for name, value in measured[label].items())
        print(f"{escape_console(label)}: {numbers}")
    return plots.draw_responses(measured)


def read_predictions(path):
    """Return labels and predicted classes in a run's `predictions.csv`.

    Raises:
        InputError: the file cannot be read, or is invalid.
    """
    from Training.visual.plots import MOST_CLASSES

    try:
        rows = csv.DictReader(io.StringIO(read_text(path, LARGEST_PREDICTIONS), newline=""))
        labels, predictions = zip(*((int(row["label"]), int(row["predicted"])) for row in rows))
        if min(*labels, *predictions) < 0:
            raise ValueError
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{format_path(path)} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, csv.Error):
        raise InputError(f"{format_path(path)} must have a row with label and predicted for each image") from None
    highest = max(*labels, *predictions)
    if highest >= MOST_CLASSES:
        raise InputError(
            f"{format_path(path)} has class {highest!s:.40}, a confusion matrix has at most {MOST_CLASSES:,}"
        )
    return labels, predictions


def draw_confusion(options):
    """Return the figure of the confusion matrix of a run's test predictions, as pixels."""
    from Training.visual import plots

    path = Path(options.run) / "predictions.csv"
    if not path.is_file():
        finished = path.with_name("result.json").is_file()
        why = "the run is finished, but has no such file" if finished else "the folder of a finished run is needed"
        raise InputError(f"{format_path(path)} does not exist: {why}")
    labels, predictions = read_predictions(path)
    count = max(*labels, *predictions) + 1
    classes = saved.read_classes(path, count, most=plots.MOST_CLASSES) or [str(i) for i in range(count)]
    return plots.draw_confusion(labels, predictions, tuple(classes))


def draw_mistakes(options):
    """Return the figure of the most confidently wrong test images, as pixels."""
    from Training.visual import plots

    network = load_network(options.run, options.best)
    data = load_data(network, options.run, options)
    test, classes, outputs = data.test, data.classes, network.output_shape[1]
    if outputs != len(classes):
        raise InputError(f"the network has {outputs} classes, the data has {len(classes)}")
    labels = np.asarray(test.labels)
    parts = range(0, len(labels), MEASURED)
    probabilities = np.concatenate([network.predict(test.images[i : i + MEASURED], verbose=0) for i in parts])
    wrong = plots.find_mistakes(labels, probabilities, options.count)
    if not len(wrong):
        raise InputError("the network classifies all test images correctly: there is nothing to draw")
    return plots.draw_mistakes(test.images[wrong], labels[wrong], probabilities[wrong], classes)


FIGURES = {
    "masks": draw_masks,
    "channels": draw_channels,
    "responses": draw_responses,
    "confusion": draw_confusion,
    "mistakes": draw_mistakes,
}


def parse(arguments):
    parser = Parser(prog=PROGRAM, description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    chosen = parser.add_subparsers(dest="figure", required=True, parser_class=Parser)
    for name in FIGURES:
        own = chosen.add_parser(name, allow_abbrev=False)
        several = {"nargs": "+"} if name == "responses" else {}
        own.add_argument("runs" if several else "run", metavar="RUN", help="a run's folder", **several)
        own.add_argument(
            "--output", metavar="FILE", help=f"(default: {name}.png in the run's folder, or the next free {name}-N.png)"
        )
        if name == "confusion":
            continue
        own.add_argument("--best", action="store_true", help="best.keras (by validation accuracy), not last.keras")
        own.add_argument("--data-dir", default="", help="folder of the data set (default: the run's)")
        if name in ("masks", "channels"):
            source = own.add_mutually_exclusive_group()
            source.add_argument("--photographs", action="store_true", help="show the photographs of scikit-learn")
            source.add_argument("--images", nargs="+", metavar="FILE", help="(default: test images, one of each class)")
        if name != "responses":
            count, shown = 24 if name == "mistakes" else 4, "channels" if name == "channels" else "test images"
            own.add_argument("--count", type=int, default=count, help=f"number of {shown} (default: {count})")
    channel = chosen.choices["channels"]
    channel.add_argument("--number", type=int, default=0, metavar="N", help="number of the image, from 0 (default: 0)")
    channel.add_argument("--block", help="name of the attention block (default: the first)")
    options, unknown = parser.parse_known_args(arguments)
    chosen.choices[options.figure].refuse_unknown(unknown)
    if getattr(options, "count", 1) < 1 or getattr(options, "number", 0) < 0:
        parser.error("--count must be 1 or more, and --number 0 or more")
    return options


def choose_output(options):
    """Return the file to write: `--output`, or a new file in the folder of the (first) run."""
    if options.output:
        return Path(options.output)
    run = Path(options.runs[0] if options.figure == "responses" else options.run)
    folder, name = run if run.is_dir() else run.parent, options.figure
    names = (f"{name}.png" if i == 1 else f"{name}-{i}.png" for i in range(1, 10_000))
    return next(folder / each for each in names if not (folder / each).exists())


@entry_point(PROGRAM)
def main(arguments=None):
    options = parse(arguments)
    with report_errors(PROGRAM, "Stopped."):
        start_keras()
        from Training.visual.plots import save_picture

        picture, output = FIGURES[options.figure](options), choose_output(options)
        existed = output.exists()
        save_picture(picture, output)
    print(f"{format_path(output)} {'replaced' if existed else 'written'}")


if __name__ == "__main__":
    run_program(main)

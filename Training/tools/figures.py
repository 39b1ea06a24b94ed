"""Figures of finished runs as PNG files: `python -m Training.tools.figures masks|channels|responses|confusion ...`.

- masks: the soft mask of each attention block as heat over images;
- channels: features before a mask, the mask, and features after it (the paper's figure 1);
- responses: mean absolute response along the network, one line a run (the paper's figure 4);
- confusion: which classes of the test set are taken for which.
"""

import argparse
import csv
import dataclasses
import io
from pathlib import Path

import numpy as np

from Training.console import entry_point, report_errors, run_program, start_keras
from Training.data import decoding
from Training.data.datasets import load_for_recipe, load_photographs
from Training.errors import InputError, format_path
from Training.files import read_text
from Training.flags import Parser
from Training.runs import saved

LARGEST_PREDICTIONS = 16 * 2**20  # bytes of predictions.csv: a million rows
MOST_CLASSES = 5_000  # of a confusion matrix, which then has 200 MB
PROGRAM = "python -m Training.tools.figures"
MEASURED = 256  # images that responses are averaged over


def load_test_examples(run, data_dir=""):
    """The test set of the data that a run was trained on, and the names of the classes.

    Raises:
        InputError: the run has no recipe, or its data cannot be had.
    """
    path = Path(run) / "recipe.json"
    if not path.is_file():
        raise InputError(f"{run} has no recipe.json, which says what data to show: give image files")
    recipe = saved.read_recipe(path)
    data = load_for_recipe(dataclasses.replace(recipe, data_dir=data_dir or recipe.data_dir))
    return data.test, data.classes


def load_images(words, size):
    """The images that a figure shows, uint8 `(n, *size, 3)`, and a name for each."""
    if words.photographs:
        return load_photographs(size[0]), ["temple", "its roof", "flower", "its middle"]
    if words.images:
        return np.stack([decoding.read(path, size) for path in words.images]), [Path(p).stem for p in words.images]
    test, classes = load_test_examples(words.run, words.data_dir)
    _, first = np.unique(test.labels, return_index=True)  # one of each class
    chosen = first[: words.count]
    return test.images[chosen], [classes[label] for label in test.labels[chosen]]


def load_attentive(run, best):
    """The network of a run, and its attention blocks.

    Raises:
        InputError: see `saved`; or it has none.
    """
    from Training.visual import inspection

    path = saved.find(run, best)
    network = saved.load(path)
    blocks = inspection.find_blocks(network)
    if not blocks:
        raise InputError(f"{format_path(path)} has no attention blocks: a network of this project is needed")
    return network, blocks


def masks(words):
    """The figure of masks, as pixels."""
    from Training.visual import inspection, plots

    network, _ = load_attentive(words.run, words.best)
    images, names = load_images(words, network.input_shape[1:3])
    return plots.draw_masks(images, inspection.make_mask_model(network).predict(images, verbose=0), names)


def channels(words):
    """The figure of one image's features in one block, as pixels."""
    from Training.visual import inspection, plots

    network, blocks = load_attentive(words.run, words.best)
    images, _ = load_images(words, network.input_shape[1:3])
    if words.number >= len(images):
        raise InputError(f"--number must be less than {len(images)}, the images at hand, received {words.number}")
    image = images[words.number]
    known = {block.name: block for block in blocks}
    name = words.block or blocks[0].name
    if name not in known:
        raise InputError(f"--block must be one of {', '.join(known)}, received {name!r:.80}")
    both = inspection.make_branch_model(network).predict(image[None], verbose=0)[name]
    return plots.draw_channels(image, both["trunk"][0], both["mask"][0], known[name].learning, words.count)


def responses(words):
    """The figure of responses of all runs, as pixels; prints the numbers."""
    from Training.visual import inspection, plots

    measured = {}
    for run in words.runs:
        network, blocks = load_attentive(run, words.best)
        test, _ = load_test_examples(run, words.data_dir)
        label = f"{Path(run).name}, {blocks[0].learning.upper()}"
        measured[label] = inspection.measure_responses(network, test.images[:MEASURED])
        print(f"{label}: " + ", ".join(f"{name} {value:.3g}" for name, value in measured[label].items()))
    return plots.draw_responses(measured)


def read_predictions(path):
    """Labels and predicted classes in a run's `predictions.csv`.

    Raises:
        InputError: the file cannot be read, or is not what a run writes.
    """
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
        raise InputError(f"{format_path(path)} has class {highest}, a confusion matrix has at most {MOST_CLASSES:,}")
    return labels, predictions


def confusion(words):
    """The confusion matrix in a run's predictions of the test set, as pixels."""
    from Training.visual import plots

    path = Path(words.run) / "predictions.csv"
    if not path.is_file():
        finished = path.with_name("result.json").is_file()
        why = "the run is finished, but without it" if finished else "a finished run's folder is needed"
        raise InputError(f"{format_path(path)} does not exist: {why}")
    labels, predictions = read_predictions(path)
    count = max(*labels, *predictions) + 1
    classes = saved.read_classes(path, count, most=MOST_CLASSES) or [str(i) for i in range(count)]
    return plots.draw_confusion(labels, predictions, tuple(classes))


def parse(arguments):
    parser = Parser(prog=PROGRAM, description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    chosen = parser.add_subparsers(dest="figure", required=True, parser_class=Parser)
    for make in (masks, channels, responses, confusion):
        name = make.__name__
        own = chosen.add_parser(name, allow_abbrev=False)
        own.set_defaults(make=make)
        several = {"nargs": "+"} if name == "responses" else {}
        own.add_argument("runs" if several else "run", metavar="RUN", help="a run's folder", **several)
        own.add_argument("--output", metavar="FILE", default=f"{name}.png", help=f"(default: {name}.png)")
        if name == "confusion":
            continue
        own.add_argument("--best", action="store_true", help="best.keras instead of last.keras")
        own.add_argument("--data-dir", default="", help="where the run's data lies now; by default where it lay then")
        if name in ("masks", "channels"):
            own.add_argument("--photographs", action="store_true", help="show the photographs of scikit-learn")
            own.add_argument("--images", nargs="+", metavar="FILE", help="by default test images, one of each class")
            own.add_argument("--count", type=int, default=4, help="images, or channels, that are shown (default: 4)")
    channel = chosen.choices["channels"]
    channel.add_argument("--number", type=int, default=0, metavar="N", help="which of the images (default: 0)")
    channel.add_argument("--block", help="name of the attention block (default: the first)")
    words, unknown = parser.parse_known_args(arguments)
    chosen.choices[words.figure].refuse_unknown(unknown)
    if getattr(words, "count", 1) < 1 or getattr(words, "number", 0) < 0:
        parser.error("--count must be 1 or more, and --number 0 or more")
    return words


@entry_point(PROGRAM)
def main(arguments=None):
    words = parse(arguments)
    with report_errors(PROGRAM, "Stopped."):
        start_keras()
        from Training.visual.plots import save_picture

        save_picture(words.make(words), words.output)
    print(f"{words.output} written")


if __name__ == "__main__":
    run_program(main)

"""Say what is in pictures: their most probable classes, by a network that a run has saved."""

import contextlib
import csv
import os
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from Training.console import entry_point, exit_with, report_errors, run_program, silence_stderr, start_keras
from Training.data import decoding
from Training.errors import InputError, format_path
from Training.flags import Parser

PROGRAM = "predict.py"
BATCH = 64  # pictures in memory at a time


def parse(arguments):
    parser = Parser(prog=PROGRAM, description=__doc__, allow_abbrev=False)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="a picture, or a folder, with all that are below it")
    parser.add_argument("--model", required=True, metavar="RUN|FILE", help="a run's folder, or a .keras file")
    parser.add_argument("--best", action="store_true", help="the run's best.keras instead of its last.keras")
    parser.add_argument("--top", type=int, default=5, metavar="N", help="classes shown (default: 5)")
    parser.add_argument("--csv", metavar="FILE", help="write a table there instead of printing one; - is the console")
    parser.add_argument("--masks", metavar="DIR", help="write each picture there, beside its soft masks")
    words = parser.parse_args(arguments)
    if words.top < 1:
        parser.error(f"--top must be 1 or more, received {words.top}")
    return words


def expand_paths(images):
    """The pictures that files and folders name, as pairs: the path, and its name below what was given.

    Raises:
        InputError: a path that does not exist, or a folder without pictures.
    """
    found = []
    if "" in images:  # what a shell makes of "$PICTURE" where it is not set: no wish for all that is here
        raise InputError("a picture or a folder is needed, received ''")
    for path in map(Path, images):
        if not os.path.exists(path):
            raise InputError(f"{format_path(path)} does not exist")
        inside = decoding.find_pictures(path) if path.is_dir() else None
        if inside == []:
            raise InputError(f"{format_path(path)} holds no pictures")
        found += [(path, Path(path.name))] if inside is None else [(each, each.relative_to(path)) for each in inside]
    return found


def read_batches(found, size):
    """Pictures as `(numbers, images)`: their positions in `found`, and uint8 `(n, *size, 3)`; broken ones are named."""

    def attempt(pair):
        try:
            return decoding.read(pair[0], size)
        except InputError as error:
            return error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(found), BATCH):
            with silence_stderr():  # libtiff writes there what it thinks of a broken file
                results = list(pool.map(attempt, found[start : start + BATCH]))
            for error in results:
                if isinstance(error, InputError):
                    sys.stderr.write(f"{PROGRAM}: skipped: {error}\n")
            numbers = [start + i for i, result in enumerate(results) if isinstance(result, np.ndarray)]
            if numbers:
                yield numbers, np.stack([results[number - start] for number in numbers])


def predict_batch(model, images, rows):
    """What the model gives for a batch, filled up to `rows` images, so that it is compiled for one shape."""
    filled = np.concatenate([images, np.repeat(images[-1:], rows - len(images), axis=0)])
    outputs = model.predict_on_batch(filled)
    if isinstance(outputs, dict):
        return {name: np.asarray(values)[: len(images)] for name, values in outputs.items()}
    return np.asarray(outputs)[: len(images)]


def rank(probabilities, names, count):
    """The most probable classes of one picture, as `[(name, probability)]`."""
    order = np.argsort(-probabilities, kind="stable")[:count]
    return [(names[i], float(probabilities[i])) for i in order]


@contextlib.contextmanager
def open_table(target, found, top):
    """A function of a path and its classes that writes a row: for a person's eyes, or as CSV to the file `target`."""
    width = max(len(format_path(path)) for path, _ in found) if len(found) > 1 else 0

    def line(path, rows):
        if width:
            shares = ", ".join(f"{name} {100 * share:.1f} %" for name, share in rows)
            print(f"{format_path(path):<{width}}  {shares}")
            return
        longest = max(len(name) for name, _ in rows)
        print("\n".join([format_path(path), *(f"  {name:<{longest}} {100 * share:7.2f} %" for name, share in rows)]))

    if not target:
        yield line
        return
    try:
        file = open(target, "w", newline="", encoding="utf-8") if target != "-" else contextlib.nullcontext(sys.stdout)  # noqa: SIM115
    except OSError as error:
        raise InputError(f"--csv {target} cannot be written: {error.strerror}") from None
    with file as text:
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["image", *(f"{what}_{i}" for i in range(1, top + 1) for what in ("class", "probability"))])
        yield lambda path, rows: writer.writerow([format_path(path), *(value for row in rows for value in row)])


def make_mask_folder(target, found):
    """The folder for mask pictures, made; refused where two pictures would share a name in it."""
    names = [name for _, name in found]
    twice = next((name for name, number in Counter(names).items() if number > 1), None)
    if twice:
        raise InputError(f"two pictures are called {format_path(twice)}: give them --masks folders of their own")
    try:
        Path(target).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--masks {target} cannot be written: {error.strerror}") from None
    return Path(target)


def write_masks(path, image, masks):
    """The picture beside the heat of each block's mask, as a PNG file."""
    from Training.visual import plots

    figure = plots.draw_masks(image[None], {block: mask[None] for block, mask in masks.items()}, [path.name])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name(f"{path.name}.masks.png").write_bytes(plots.encode_png(figure))


def read_class_names(path, count):
    """The names that the run has written beside its network, or numbers, which is said."""
    from Training.runs import saved

    names = saved.read_classes(path, count)
    if names is None:
        sys.stderr.write(f"{PROGRAM}: no classes.json beside {path}: classes are numbered from 0\n")
    return [format_path(name) for name in names or range(count)]


def predict(words):
    """Predict all pictures; returns how many could not be read, and how many there are."""
    from Training.runs import saved

    found = expand_paths(words.images)
    masks_to = make_mask_folder(words.masks, found) if words.masks else None
    path = saved.find(words.model, words.best)
    start_keras()
    from Training.visual.inspection import find_blocks, make_mask_model

    network = saved.load(path)
    if masks_to and not find_blocks(network):
        raise InputError(f"{path} has no attention blocks: leave out --masks")
    masks_of = make_mask_model(network) if masks_to else None
    names = read_class_names(path, network.output_shape[1])
    rows, done = min(BATCH, len(found)), 0
    with open_table(words.csv, found, min(words.top, len(names))) as add:
        for numbers, images in read_batches(found, network.input_shape[1:3]):
            done += len(numbers)
            for number, probabilities in zip(numbers, predict_batch(network, images, rows)):
                add(found[number][0], rank(probabilities, names, words.top))
            masks = predict_batch(masks_of, images, rows) if masks_to else {}
            for i, number in enumerate(numbers if masks_to else ()):
                write_masks(masks_to / found[number][1], images[i], {name: mask[i] for name, mask in masks.items()})
    return len(found) - done, len(found)


@entry_point(PROGRAM)
def main(arguments=None):
    words = parse(arguments)
    with report_errors(PROGRAM, "Stopped."):
        try:
            broken, total = predict(words)
            sys.stdout.flush()
        except OSError as error:
            if error is sys.stdout.lost:
                raise
            exit_with(
                1, f"{PROGRAM}: error: {error.filename or 'the table'} cannot be written: {error.strerror or error}"
            )
    if broken:
        exit_with(1, f"{PROGRAM}: {broken} of {total} pictures could not be read")


if __name__ == "__main__":
    run_program(main)

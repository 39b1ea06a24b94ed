"""Classify pictures: print the most probable classes of each, with trained weights or the network of a run."""

import contextlib
import csv
import errno
import hashlib
import os
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from Training.console import (
    entry_point,
    exit_with,
    format_count,
    report_errors,
    run_program,
    silence_stderr,
    start_keras,
    warn,
)
from Training.data import decoding
from Training.errors import InputError, format_os_error, format_path
from Training.flags import Parser
from Training.visual.escaping import LONGEST_CELL, escape_console, escape_csv, shorten_name

PROGRAM = "predict.py"
DEFAULT_MODEL = "cifar10"  # weights in weights/
BATCH = 64  # pictures in memory at a time
WIDEST = 60  # characters of the column of paths
LONGEST_NAME = 255  # bytes of a file name, unless the file system has another limit
MASKS = ".masks.png"


def parse(arguments):
    parser = Parser(prog=PROGRAM, description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "images", nargs="+", metavar="IMAGE", help="a picture, or a folder that is searched for pictures"
    )
    parser.add_argument(
        "--model",
        metavar="NAME|RUN|FILE",
        help=f"weights such as cifar100, a run's folder or a .keras file (default: {DEFAULT_MODEL})",
    )
    parser.add_argument("--best", action="store_true", help="best.keras (by validation accuracy), not last.keras")
    parser.add_argument("--top", type=int, default=5, metavar="N", help="number of classes to print (default: 5)")
    parser.add_argument("--csv", metavar="FILE", help="write a CSV table to this file; - is the standard output")
    parser.add_argument("--masks", metavar="DIR", help="draw each picture with its soft masks to this folder")
    options = parser.parse_args(arguments)
    if options.top < 1:
        parser.error(f"--top must be 1 or more, received {options.top}")
    return options


def expand_paths(images):
    """Return the pictures in these files and folders as pairs: the path, and the path relative to the folder.

    Raises:
        InputError: a path does not exist, or a folder has no pictures.
    """
    found = []
    if "" in images:  # "$PICTURE" with an unset variable must not mean the current folder
        raise InputError("a picture or a folder is needed, received ''")
    for path in map(Path, images):
        if not os.path.exists(path):
            raise InputError(f"{format_path(path)} does not exist")
        inside = decoding.find_pictures(path) if path.is_dir() else None
        if inside == []:
            raise InputError(f"{format_path(path)} contains no pictures")
        found += [(path, Path(path.name))] if inside is None else [(each, each.relative_to(path)) for each in inside]
    return found


def read_batches(found, size):
    """Yield batches of positions in `found` and images, uint8 `(n, *size, 3)`; warn about broken pictures."""

    def attempt(pair):
        try:
            return decoding.read(pair[0], size)
        except InputError as error:
            return error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(found), BATCH):
            with silence_stderr():  # libtiff writes warnings about damaged files there
                results = list(pool.map(attempt, found[start : start + BATCH]))
            for error in results:
                if isinstance(error, InputError):
                    sys.stderr.write(f"{PROGRAM}: skipped: {error}\n")
            numbers = [start + i for i, result in enumerate(results) if isinstance(result, np.ndarray)]
            if numbers:
                yield numbers, np.stack([results[number - start] for number in numbers])


def predict_batch(model, images, rows):
    """Return the output of a model for a batch, which is padded to `rows` images so that only one shape is compiled."""
    filled = np.concatenate([images, np.repeat(images[-1:], rows - len(images), axis=0)])
    outputs = model.predict_on_batch(filled)
    if isinstance(outputs, dict):
        return {name: np.asarray(values)[: len(images)] for name, values in outputs.items()}
    return np.asarray(outputs)[: len(images)]


def rank(probabilities, names, count):
    """Return the most probable classes of one picture, as `[(name, probability)]`."""
    order = np.argsort(-probabilities, kind="stable")[:count]
    return [(names[i], float(probabilities[i])) for i in order]


@contextlib.contextmanager
def open_table(target, found, top):
    """Yield a function of a path and its classes that prints them or, if `target` is given, writes a row of CSV."""
    if not target:
        width = min(max(len(escape_console(path)) for path, _ in found), WIDEST) if len(found) > 1 else 0
        yield lambda path, rows: print_classes(path, rows, width)
        return
    try:
        file = open(target, "w", newline="", encoding="utf-8") if target != "-" else contextlib.nullcontext(sys.stdout)  # noqa: SIM115
    except OSError as error:
        raise InputError(f"--csv {format_path(target)} cannot be written: {error.strerror}") from None
    with file as text:
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["image", *(f"{what}_{i}" for i in range(1, top + 1) for what in ("class", "probability"))])
        yield lambda path, rows: writer.writerow(map(escape_csv, (path, *(value for row in rows for value in row))))


def print_classes(path, rows, width):
    """Print the classes of one picture: as a list or, if `width` is not 0, as a line that begins with the path."""
    shown = [(shorten_name(escape_console(name), LONGEST_CELL), 100 * share) for name, share in rows]
    if width:
        print(f"{escape_console(path):<{width}}  {', '.join(f'{name} {share:.1f} %' for name, share in shown)}")
        return
    longest = max(len(name) for name, _ in shown)
    print("\n".join([escape_console(path), *(f"  {name:<{longest}} {share:7.2f} %" for name, share in shown)]))


def make_mask_folder(target, found):
    """Create the folder for mask pictures and return its path.

    Raises:
        InputError: two pictures would have the same name in it, or it cannot be created.
    """
    names = [name for _, name in found]
    twice = next((name for name, number in Counter(names).items() if number > 1), None)
    if twice:
        raise InputError(
            f"two pictures are called {format_path(twice)}: classify them separately, with different --masks folders"
        )
    try:
        Path(target).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--masks {format_path(target)} cannot be written: {error.strerror}") from None
    return Path(target)


def write_masks(path, image, masks):
    """Write a picture with a heat map of each block's mask as a PNG file; return whether its path is short enough."""
    from Training.visual import plots

    figure = plots.draw_masks(image[None], {block: mask[None] for block, mask in masks.items()}, [path.name])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name(name_mask_picture(path)).write_bytes(plots.encode_png(figure))
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        warn(f"{PROGRAM}: skipped: the path of the masks of {escape_console(path.name)} is too long")
        return False
    return True


def name_mask_picture(path):
    """Return the name `<picture>.masks.png`; if it is too long for the file system, its end is replaced by a digest."""
    try:
        limit = os.pathconf(path.parent, "PC_NAME_MAX")
    except (OSError, ValueError, AttributeError):  # AttributeError: on Windows
        limit = LONGEST_NAME
    raw = os.fsencode(path.name)
    if len(raw) + len(MASKS) <= limit:
        return f"{path.name}{MASKS}"
    ending = f"-{hashlib.sha256(raw).hexdigest()[:8]}{MASKS}"
    return raw[: limit - len(ending)].decode(errors="ignore") + ending


def read_class_names(path, count):
    """Return the class names next to the network or, with a warning, numbers."""
    from Training.runs import saved

    names = saved.read_classes(path, count)
    if names is None:
        warn(f"{PROGRAM}: no classes.json next to {format_path(path)}: classes are numbered from 0")
    return [str(name) for name in names or range(count)]


def report_network(path, options):
    """Print which network is used if the run's folder has two."""
    if (
        options.model
        and Path(options.model).is_dir()
        and all(path.with_name(f"{name}.keras").is_file() for name in ("last", "best"))
    ):
        other = "without --best: last.keras, the final weights" if options.best else "with --best: best.keras"
        warn(f"{PROGRAM}: classified by {format_path(path)} ({other})")


def find_model(model, best):
    """Return the file of the network; by default, of the weights that come with the project.

    Raises:
        InputError: there is no such file.
    """
    from Model.weights import find_weights
    from Training.runs import saved

    if model is None and not best and find_weights(DEFAULT_MODEL) is None:
        raise InputError(
            f"there are no weights {DEFAULT_MODEL} in weights/: give --model, a run's folder or a .keras file"
        )
    if model is None and best:
        raise InputError("--best needs a run's folder: give --model")
    return saved.find(DEFAULT_MODEL if model is None else model, best)


def predict(options):
    """Classify all pictures.

    Returns:
        `(broken, unwritten, total)`: the numbers of pictures that could not be read, of mask pictures that could not be
        written, and of all pictures.
    """
    from Training.runs import saved

    found = expand_paths(options.images)
    masks_to = make_mask_folder(options.masks, found) if options.masks else None
    path = find_model(options.model, options.best)
    start_keras()
    from Training.visual.inspection import find_blocks, make_mask_model

    network = saved.load(path)
    if masks_to and not find_blocks(network):
        raise InputError(f"{format_path(path)} has no attention blocks: leave out --masks")
    masks_of = make_mask_model(network) if masks_to else None
    names = read_class_names(path, network.output_shape[1])
    rows, done, unwritten = min(BATCH, len(found)), 0, 0
    with open_table(options.csv, found, min(options.top, len(names))) as add:
        report_network(path, options)
        for numbers, images in read_batches(found, network.input_shape[1:3]):
            done += len(numbers)
            for number, probabilities in zip(numbers, predict_batch(network, images, rows)):
                add(found[number][0], rank(probabilities, names, options.top))
            masks = predict_batch(masks_of, images, rows) if masks_to else {}
            for i, number in enumerate(numbers if masks_to else ()):
                own = {name: mask[i] for name, mask in masks.items()}
                unwritten += not write_masks(masks_to / found[number][1], images[i], own)
    if options.csv and options.csv != "-":
        print(f"{format_path(options.csv)} written: {format_count(done, 'picture')}")
    if masks_to:  # the table may be on standard output
        line = f"{format_count(done - unwritten, 'mask picture')} written to {format_path(masks_to)}"
        print(line, file=sys.stderr if options.csv == "-" else sys.stdout)
    return len(found) - done, unwritten, len(found)


@entry_point(PROGRAM)
def main(arguments=None):
    options = parse(arguments)
    with report_errors(PROGRAM, "Stopped."):
        try:
            broken, unwritten, total = predict(options)
            sys.stdout.flush()
        except OSError as error:
            if error is sys.stdout.lost:
                raise
            exit_with(1, f"{PROGRAM}: error: {format_os_error(error, 'the table')}")
    if broken or unwritten:
        what = [f"{broken} of {format_count(total, 'picture')} could not be read"] if broken else []
        what += [f"{format_count(unwritten, 'mask picture')} could not be written"] if unwritten else []
        exit_with(1, f"{PROGRAM}: {', '.join(what)}")


if __name__ == "__main__":
    run_program(main)

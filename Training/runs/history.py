"""Finds runs, and reads and checks their recipes, results and histories."""

import csv
import dataclasses
import io
import json
import math
from pathlib import Path
from typing import NamedTuple

from Training.errors import InputError, format_path, shorten
from Training.files import read_text
from Training.recipe import Recipe

LARGEST = 1e15  # the largest number accepted in a result or a history


class Run(NamedTuple):
    """A finished run: its folder, and its recipe, result and history as plain data."""

    folder: Path
    recipe: dict
    result: dict
    history: dict


class Number(NamedTuple):
    """The valid values of a number in `result.json`."""

    high: float = LARGEST
    whole: bool = False
    needed: bool = False  # if False, the number may be missing or null

    def check(self, value):
        """Return whether a value is valid."""
        if value is None:
            return not self.needed
        return type(value) in ((int,) if self.whole else (int, float)) and 0 <= value <= self.high


NUMBERS = {
    "test_accuracy": Number(1),
    "test_loss": Number(),
    "test_error_percent": Number(100, needed=True),
    "test_error_flip_percent": Number(100),
    "test_top_5_error_percent": Number(100),
    "train_error_percent": Number(100),
    "validation_accuracy": Number(1),
    "validation_loss": Number(),
    "validation_error_percent": Number(100),
    "running_time_s": Number(needed=True),
    "first_step_s": Number(),
    "training_time_s": Number(),
    "images_per_s": Number(),
    "parameters": Number(whole=True, needed=True),
    "epochs": Number(whole=True),
    "seed": Number(whole=True),
}
TEXTS = ("dataset", "model", "learning", "backend", "device")


def read_history(path):
    """Return the columns of a history.csv as lists of numbers.

    If an epoch was repeated after an interruption, its last row counts. Without validation, Keras' `CSVLogger` fills
    the validation columns with NA; they are left out.

    Raises:
        InputError: the file has no rows, or an invalid value.
        OSError: it cannot be read.
    """
    try:
        rows = [_parse_row(row) for row in csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)]
        if not rows:
            raise ValueError("it has no rows")
    except (ValueError, csv.Error) as error:
        raise InputError(f"{format_path(path)} is not a history: {shorten(error)}") from None
    rows = {row["epoch"]: row for row in rows}
    columns = {name: [rows[epoch][name] for epoch in sorted(rows)] for name in next(iter(rows.values()))}
    return {name: values for name, values in columns.items() if None not in values}


def _parse_row(row):
    """Return a row of a history.csv with numbers as values, and None for NA.

    Raises:
        ValueError: a value is missing, superfluous or not a number. Only `images_per_second` may be NaN.
    """
    if "epoch" not in row:
        raise ValueError("it has no epoch column")
    values = {}
    for name, text in row.items():
        if not isinstance(name, str) or not isinstance(text, str):
            raise ValueError("a row has more or fewer values than the header")
        values[name] = value = None if text == "NA" else float(text)
        if value is not None and not abs(value) <= LARGEST and not (name == "images_per_second" and math.isnan(value)):
            raise ValueError(f"{name:.80} cannot be {text:.80}")
    epoch = values["epoch"]
    if epoch is None or epoch < 0 or epoch != int(epoch):
        raise ValueError(f"epoch cannot be {row['epoch']:.80}")
    return {**values, "epoch": int(epoch)}


def read_result(path):
    """Return the content of a `result.json`.

    Raises:
        InputError: it is not a JSON object, or has an invalid value.
        OSError: it cannot be read.
    """
    try:
        result = json.loads(read_text(path))
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{format_path(path)} is not JSON: {shorten(error)}") from None
    if not isinstance(result, dict):
        raise InputError(f"{format_path(path)} must be a JSON object, not {type(result).__name__}")
    for name, number in NUMBERS.items():
        if name not in result and number.needed:
            raise InputError(f"{format_path(path)} has no {name}")
        if not number.check(result.get(name)):
            raise InputError(f"{format_path(path)}: {name} cannot be {_show(result[name])}")
    for name in TEXTS:
        if not isinstance(result.get(name, ""), str):
            raise InputError(f"{format_path(path)}: {name} cannot be {_show(result[name])}")
    return result


def _show(value):
    """Return a JSON value as a short text; Python refuses to convert an int of thousands of digits."""
    return "a number of this size" if type(value) is int and abs(value) > LARGEST else f"{value!r:.80}"


def read_run(folder):
    """Return the run in a folder. Recipe fields that are newer than the run get the values that it used.

    Raises:
        InputError: a file is missing or is not what a run writes.
    """
    folder = Path(folder)
    try:
        recipe = dataclasses.asdict(Recipe.from_json(read_text(folder / "recipe.json")))
        return Run(folder, recipe, read_result(folder / "result.json"), read_history(folder / "history.csv"))
    except OSError as error:
        reason = f"{Path(error.filename or folder).name}: {error.strerror or error}"
        raise InputError(f"{format_path(folder)} is not a finished run: {reason}") from None
    except InputError as error:
        raise InputError(f"{format_path(folder)} is not a finished run: {error}") from None


def find(paths):
    """Return the runs in and below the paths as `(finished runs, folders of unfinished runs)`, ordered by path.

    Raises:
        InputError: a path does not exist, or contains no run.
    """
    runs, unfinished = {}, {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise InputError(f"{format_path(path)} is not a directory: expected a run's folder or a folder of runs")
        folders = sorted(each.parent for each in path.rglob("recipe.json"))
        if not folders:
            raise InputError(f"{format_path(path)} contains no run: there is no recipe.json in it or below it")
        for folder in folders:
            finished = (folder / "result.json").exists()
            (runs if finished else unfinished)[folder.resolve()] = read_run(folder) if finished else folder
    return list(runs.values()), list(unfinished.values())

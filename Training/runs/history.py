"""Finished and unfinished runs: their recipes, results and histories, read back."""

import csv
import dataclasses
import io
import json
from pathlib import Path
from typing import NamedTuple

from Training.errors import InputError
from Training.files import read_text
from Training.recipe import Recipe


class Run(NamedTuple):
    """A finished run: its folder, and its recipe, result and history as plain data."""

    folder: Path
    recipe: dict
    result: dict
    history: dict


def read_history(path):
    """The columns of a history.csv as lists of numbers.

    An epoch that was repeated after an interruption counts with its last row. Without validation Keras' `CSVLogger`
    still writes its columns, full of NA: they are left out.
    """
    rows = {int(row["epoch"]): row for row in csv.DictReader(io.StringIO(read_text(path), newline=""))}
    columns = {key: [rows[epoch][key] for epoch in sorted(rows)] for key in next(iter(rows.values()))}
    return {key: list(map(float, values)) for key, values in columns.items() if "NA" not in values}


def read_run(folder):
    """The run in a folder; what its recipe does not say, from an older version, takes its default.

    Raises:
        InputError: a file is missing or is not what a run writes.
    """
    folder = Path(folder)
    defaults = {item.name: item.default for item in dataclasses.fields(Recipe)}
    try:
        recipe = json.loads(read_text(folder / "recipe.json"))
        result = json.loads(read_text(folder / "result.json"))
        run = Run(folder, {**defaults, **recipe}, {**result}, read_history(folder / "history.csv"))
        sum(run.result[name] for name in ("test_error_percent", "running_time_s", "parameters"))  # three numbers
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration, OverflowError) as error:
        raise InputError(f"{folder} is no finished run: {type(error).__name__}: {str(error):.200}") from None
    return run


def find(paths):
    """Finished and unfinished runs in and below the paths, as `(runs, folders)`, by their folders' names.

    Raises:
        InputError: a path does not exist, or holds no run.
    """
    runs, unfinished = {}, {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise InputError(f"{path} is no folder: a run's folder, or one above it, is needed")
        folders = sorted(each.parent for each in path.rglob("recipe.json"))
        if not folders:
            raise InputError(f"{path} holds no run: there is no recipe.json in it or below it")
        for folder in folders:
            finished = (folder / "result.json").exists()
            (runs if finished else unfinished)[folder.resolve()] = read_run(folder) if finished else folder
    return list(runs.values()), list(unfinished.values())

"""Tables and curves of any set of runs, beside the published errors: `python -m Training.tools.report Logs/...`."""

import csv
import dataclasses
import io
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from Training.console import duration, end, one_line_errors
from Training.errors import InputError
from Training.flags import Parser
from Training.recipe import ASIDE, Recipe
from Training.visual.published import SOURCES, published

PROGRAM = "python -m Training.tools.report"
MOST_NAMED = 3  # values in a legend's line
NAMED = ("dataset", "model", "learning")  # always told of a run
ERRORS = {"test": "test_error_percent", "validation": "validation_error_percent", "train": "train_error_percent"}


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
    with open(path, newline="", encoding="utf-8") as file:
        rows = {int(row["epoch"]): row for row in csv.DictReader(file)}
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
        recipe = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        run = Run(folder, {**defaults, **recipe}, {**result}, read_history(folder / "history.csv"))
        sum(run.result[name] for name in ("test_error_percent", "running_time_s", "parameters"))  # three numbers
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
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


def grouped(runs):
    """Runs that differ in nothing but their seed, together, under what they differ in from the others.

    Returns:
        `{((field, value), ...): [run, ...]}`, with the fields of `NAMED` first.
    """
    fields = [name for name in runs[0].recipe if name not in (*NAMED, *ASIDE)] if runs else []
    varied = [name for name in fields if len({str(run.recipe.get(name)) for run in runs}) > 1]
    groups = {}
    for run in runs:
        key = tuple((name, run.recipe[name]) for name in (*NAMED, *varied))
        groups.setdefault(key, []).append(run)
    return groups


def mean_and_deviation(values, text="{:.2f}"):
    """The mean of values, with their sample standard deviation where there are several; "-" where one is missing."""
    if any(value is None for value in values):
        return "-"
    mean = text.format(np.mean(values))
    return f"{mean} ± {text.format(np.std(values, ddof=1))}" if len(values) > 1 else mean


def _published(recipe):
    return ", ".join(f"{each.error:.2f} ({each.source})" for each in published(recipe)) or "-"


def _called(name, value):
    """A field's value in a table."""
    if name == "model":
        return str(value).replace("attention", "Attention").replace("_", "-")
    return str(value).upper() if name == "learning" else str(value)


def run_table(groups):
    """Rows of texts, the header first: a row for each group, with errors in per cent, cost, and published errors."""
    names = [name for name, _ in next(iter(groups))]
    header = [*names, "runs", *(f"{part} error %" for part in ERRORS), "time", "parameters", "images/s", "published"]
    rows = []
    for key, runs in groups.items():
        results = [run.result for run in runs]
        rows.append([
            *(_called(name, value) for name, value in key),
            str(len(runs)),
            *(mean_and_deviation([result.get(name) for result in results]) for name in ERRORS.values()),
            duration(np.mean([result["running_time_s"] for result in results])),
            f"{results[0]['parameters']:,}",
            mean_and_deviation([result.get("images_per_s") for result in results], "{:.0f}"),
            _published(runs[0].recipe),
        ])  # fmt: skip
    return [header, *rows]


def pivot_table(groups, field):
    """Test errors with the values of one field side by side, as the paper's table 3 has ARL and NAL.

    Raises:
        InputError: the runs do not differ in this field.
    """
    values = list(dict.fromkeys(value for key in groups for name, value in key if name == field))
    if len(values) < 2:
        known = ", ".join(dict.fromkeys(name for key in groups for name, _ in key))
        raise InputError(f"--columns {field}: the runs do not differ in it; they are told apart by {known}")
    cells = {}
    for key, runs in groups.items():
        rest = tuple((name, value) for name, value in key if name != field)
        error = mean_and_deviation([run.result["test_error_percent"] for run in runs])
        cells.setdefault(rest, {})[dict(key)[field]] = (error, _published(runs[0].recipe))
    shown = [_called(field, value) for value in values]
    names = [name for name, _ in next(iter(cells))]
    header = [*names, *(f"{value} %" for value in shown), *(f"{value} published" for value in shown)]
    rows = []
    for rest, row in cells.items():
        found = [row.get(value, ("-", "-")) for value in values]
        rows.append(
            [*(_called(*each) for each in rest), *(error for error, _ in found), *(known for _, known in found)]
        )
    return [header, *rows]


def as_console(rows):
    """Rows of texts in aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows) + "\n"


def as_markdown(rows):
    """Rows of texts as a Markdown table, the sources of published errors below it."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    sources = [f"{name}: {source}" for name, source in SOURCES.items() if any(f"({name})" in line for line in lines)]
    return "\n".join(lines) + ("\n\nPublished: " + "; ".join(sources) + ".\n" if sources else "\n")


def as_csv(rows):
    """Rows of texts as CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


FORMATS = {"console": as_console, "markdown": as_markdown, "csv": as_csv}


def labels(groups):
    """Short names of groups for a legend: what differs, the network alone, or rows of the table where much differs."""
    different = [name for name, _ in next(iter(groups)) if len({dict(key)[name] for key in groups}) > 1] or ["model"]
    if len(different) > MOST_NAMED:
        return [f"row {row}" for row, _ in enumerate(groups, start=1)]
    return [", ".join(_called(name, dict(key)[name]) for name in different) for key in groups]


def write_curves(groups, path):
    """Training loss and errors of each group as a PNG file."""
    from Training.visual import plots

    histories = {label: [run.history for run in runs] for label, runs in zip(labels(groups), groups.values())}
    save_picture(plots.curves_figure(histories), path)


def save_picture(picture, path):
    """Write a uint8 picture as a PNG file.

    Raises:
        InputError: it cannot be written there.
    """
    from Training.visual import plots

    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(plots.png(picture))
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from None


def parse(arguments):
    parser = Parser(prog=PROGRAM, description=__doc__, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, or a folder of runs")
    parser.add_argument("--format", choices=tuple(FORMATS), default="console", help="of the table (default: console)")
    parser.add_argument("--columns", metavar="FIELD", help="test errors with this field's values side by side")
    parser.add_argument("--curves", metavar="FILE", help="also write the curves as a PNG file")
    return parser.parse_args(arguments)


def report(words):
    """The table that the words ask for, as text; writes the curves."""
    runs, unfinished = find(words.runs)
    if not runs:
        raise InputError(f"no run is finished; {len(unfinished)} are not: {', '.join(map(str, unfinished)):.200}")
    groups = grouped(runs)
    rows = pivot_table(groups, words.columns) if words.columns else run_table(groups)
    if words.curves:
        write_curves(groups, words.curves)
    return FORMATS[words.format](rows), unfinished


def main(arguments=None):
    words = parse(arguments)
    with one_line_errors(PROGRAM):
        text, unfinished = report(words)
    print(text, end="")
    if unfinished:
        end(1, f"{PROGRAM}: not finished and left out: {', '.join(map(str, unfinished))}")


if __name__ == "__main__":
    main()

"""Print tables and draw curves of runs, next to published errors: `python -m Training.tools.report Logs/...`.

Runs that differ only in their seed are one row, with the mean and the sample standard deviation of their errors. Runs
with the same seed and backend are repeats: they count as one run, with their mean.
"""

import csv
import io
import sys

import numpy as np

from Model.geometries import format_name
from Training.console import entry_point, exit_with, format_count, format_duration, report_errors, run_program
from Training.errors import InputError, format_path
from Training.flags import Parser
from Training.recipe import compared_fields
from Training.runs import history
from Training.visual.escaping import LONGEST_CELL, escape_console, escape_csv, make_markdown_table, shorten_name
from Training.visual.published import SOURCES, find_published

PROGRAM = "python -m Training.tools.report"
MOST_NAMED = 3  # values in a line of a legend
TIME = "time: that of the epochs, with their validation; starting, reading the data and the final test are left out"
NAMED = ("dataset", "model", "learning")  # fields that every row has
ERRORS = {"test": "test_error_percent", "validation": "validation_error_percent", "train": "train_error_percent"}


def group_runs(runs):
    """Group runs that differ only in their seed.

    Args:
        runs: list of `history.Run`.

    Returns:
        `{((field, value), ...): [run, ...]}`, with the fields in `NAMED` first, then those in which the runs differ.
    """
    fields = [name for name in compared_fields() if name not in NAMED]
    varied = [name for name in fields if len({str(run.recipe.get(name)) for run in runs}) > 1]
    groups = {}
    for run in runs:
        key = tuple((name, _make_hashable(run.recipe[name])) for name in (*NAMED, *varied))
        groups.setdefault(key, []).append(run)
    return groups


def _make_hashable(value):
    """Return the value of a field, as a text if it is not hashable because the recipe was edited."""
    return value if isinstance(value, str | int | float) else str(value)


def collect_samples(runs):
    """Return the runs of a group as independent samples: a list of runs for each seed and backend.

    A repeat with the same seed draws the same random numbers, so it says nothing about the spread over seeds.
    TensorFlow and JAX draw different numbers from the same seed.
    """
    samples = {}
    for run in runs:
        samples.setdefault((run.recipe.get("seed"), run.result.get("backend")), []).append(run)
    return list(samples.values())


def format_mean(samples, name, text="{:.2f}"):
    """Return the mean of a result over samples, with the standard deviation if there are several.

    Args:
        samples: list of lists of `history.Run`, see `collect_samples`.
        name: str, field of the result.
        text: str, format of a number.

    Returns:
        A text such as "5.52" or "5.52 ± 0.10"; "-" if a run has no such result.
    """
    values = [[run.result.get(name) for run in sample] for sample in samples]
    if any(value is None for sample in values for value in sample):
        return "-"
    means = [np.mean(sample) for sample in values]
    mean = text.format(np.mean(means))
    return f"{mean} ± {text.format(np.std(means, ddof=1))}" if len(means) > 1 else mean


def _format_published(recipe):
    return ", ".join(f"{each.error:.2f} ({each.source})" for each in find_published(recipe)) or "-"


def _format_value(name, value):
    """Return the value of a field as text for a table."""
    if name == "model":
        return format_name(str(value))
    return str(value).upper() if name == "learning" else str(value)


def _label_value(name, value):
    return _format_value(name, value) if name in NAMED else f"{name}={value}"


def _format_number_of_runs(samples):
    repeats = sum(map(len, samples)) - len(samples)
    return f"{len(samples)} (+{format_count(repeats, 'repeat')})" if repeats else str(len(samples))


def make_run_table(groups):
    """Return rows of texts: a header, then a row for each group with errors in per cent, cost and published errors."""
    names = [name for name, _ in next(iter(groups))]
    header = [*names, "runs", *(f"{part} error %" for part in ERRORS), "time", "parameters", "images/s", "published"]
    rows = []
    for key, runs in groups.items():
        samples = collect_samples(runs)
        rows.append([
            *(_format_value(name, value) for name, value in key),
            _format_number_of_runs(samples),
            *(format_mean(samples, name) for name in ERRORS.values()),
            format_duration(np.mean([run.result["running_time_s"] for run in runs])),
            f"{runs[0].result['parameters']:,}",
            format_mean(samples, "images_per_s", "{:.0f}"),
            _format_published(runs[0].recipe),
        ])  # fmt: skip
    return [header, *rows]


def list_values(groups, field):
    """Return the different values of a field in the keys of groups, in order."""
    return list(dict.fromkeys(value for key in groups for name, value in key if name == field))


def make_pivot_table(groups, field):
    """Return test errors with the values of one field side by side, like ARL and NAL in table 3 of the paper.

    Args:
        groups: see `group_runs`.
        field: str, a field in which the groups differ.
    """
    values = list_values(groups, field)
    cells = {}
    for key, runs in groups.items():
        rest = tuple((name, value) for name, value in key if name != field)
        error = format_mean(collect_samples(runs), ERRORS["test"])
        cells.setdefault(rest, {})[dict(key)[field]] = (error, _format_published(runs[0].recipe))
    shown = [_format_value(field, value) for value in values]
    names = [name for name, _ in next(iter(cells))]
    header = [*names, *(f"{value} %" for value in shown), *(f"{value} published" for value in shown)]
    rows = []
    for rest, row in cells.items():
        found = [row.get(value, ("-", "-")) for value in values]
        rows.append(
            [*(_format_value(*each) for each in rest), *(error for error, _ in found), *(known for _, known in found)]
        )
    return [header, *rows]


def format_console(rows):
    """Return rows of texts as aligned columns, with a line on what the time is if the table has it."""
    note = f"{TIME}\n" if "time" in rows[0] else ""
    rows = [[shorten_name(escape_console(cell), LONGEST_CELL) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return (
        "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)
        + "\n"
        + note
    )


def format_markdown(rows):
    """Return rows of texts as a Markdown table, with the meaning of times and the sources of errors below it."""
    table = make_markdown_table(rows[0], rows[1:])
    sources = [f"{name}: {source}" for name, source in SOURCES.items() if f"({name})" in table]
    notes = [f"{TIME[0].upper()}{TIME[1:]}."] if "time" in rows[0] else []
    notes += ["Published: " + "; ".join(sources) + "."] if sources else []
    return "\n\n".join([table, *notes]) + "\n"


def format_csv(rows):
    """Return rows of texts as CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(map(escape_csv, row) for row in rows)
    return text.getvalue()


FORMATS = {"console": format_console, "markdown": format_markdown, "csv": format_csv}


def label_groups(groups):
    """Return short names of groups for a legend.

    A name is the network and the values that differ or, if many differ, the number of the row in the table.
    """
    different = [name for name, _ in next(iter(groups)) if len({dict(key)[name] for key in groups}) > 1]
    if len(different) > MOST_NAMED:
        return [f"row {row}" for row, _ in enumerate(groups, start=1)]
    shown = ["model", *(name for name in different if name != "model")]
    return [", ".join(_label_value(name, dict(key)[name]) for name in shown) for key in groups]


def write_curves(groups, path):
    """Write training loss and errors of each group as a PNG file."""
    from Training.visual import plots

    histories = {label: [run.history for run in runs] for label, runs in zip(label_groups(groups), groups.values())}
    plots.save_picture(plots.draw_curves(histories), path)


def parse(arguments):
    parser = Parser(prog=PROGRAM, description=__doc__, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, or a folder of runs")
    parser.add_argument("--format", choices=tuple(FORMATS), default="console", help="of the table (default: console)")
    parser.add_argument(
        "--columns",
        metavar="FIELD",
        choices=compared_fields(),
        help="print test errors with the values of this field of the recipe side by side, such as learning",
    )
    parser.add_argument("--curves", metavar="FILE", help="also write the curves as a PNG file")
    return parser.parse_args(arguments)


def report(options):
    """Write the curves; return the table as text, the folders of unfinished runs, and notes for the user."""
    runs, unfinished = history.find(options.runs)
    if not runs:
        named = ", ".join(map(format_path, unfinished))
        raise InputError(f"no finished run; {len(unfinished)} unfinished: {named:.200}")
    groups, notes = group_runs(runs), []
    if options.columns and len(list_values(groups, options.columns)) > 1:
        rows = make_pivot_table(groups, options.columns)
    else:
        rows = make_run_table(groups)
        if options.columns:
            notes.append(f"--columns {options.columns}: the runs do not differ in it; this is the table of runs")
    if options.curves:
        write_curves(groups, options.curves)
        notes.append(f"{format_path(options.curves)} written")
    return FORMATS[options.format](rows), unfinished, notes


@entry_point(PROGRAM)
def main(arguments=None):
    options = parse(arguments)
    with report_errors(PROGRAM):
        text, unfinished, notes = report(options)
    print(text, end="")
    for note in notes:
        sys.stderr.write(f"{PROGRAM}: {note}\n")
    if unfinished:
        exit_with(1, f"{PROGRAM}: not finished and left out: {', '.join(map(format_path, unfinished))}")


if __name__ == "__main__":
    run_program(main)

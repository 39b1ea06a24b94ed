"""Tables and curves of any set of runs, beside the published errors: `python -m Training.tools.report Logs/...`."""

import csv
import io

import numpy as np

from Training.console import entry_point, exit_with, format_duration, report_errors, run_program
from Training.errors import InputError
from Training.flags import Parser
from Training.recipe import compared_fields
from Training.runs import history
from Training.visual.published import SOURCES, find_published

PROGRAM = "python -m Training.tools.report"
MOST_NAMED = 3  # values in a legend's line
NAMED = ("dataset", "model", "learning")  # always told of a run
ERRORS = {"test": "test_error_percent", "validation": "validation_error_percent", "train": "train_error_percent"}


def group_runs(runs):
    """Runs that differ in nothing but their seed, together, under what they differ in from the others.

    Returns:
        `{((field, value), ...): [run, ...]}`, with the fields of `NAMED` first.
    """
    fields = [name for name in compared_fields() if name not in NAMED]
    varied = [name for name in fields if len({str(run.recipe.get(name)) for run in runs}) > 1]
    groups = {}
    for run in runs:
        key = tuple((name, run.recipe[name]) for name in (*NAMED, *varied))
        groups.setdefault(key, []).append(run)
    return groups


def format_mean(values, text="{:.2f}"):
    """The mean of values, with their sample standard deviation where there are several; "-" where one is missing."""
    if any(value is None for value in values):
        return "-"
    mean = text.format(np.mean(values))
    return f"{mean} ± {text.format(np.std(values, ddof=1))}" if len(values) > 1 else mean


def _published(recipe):
    return ", ".join(f"{each.error:.2f} ({each.source})" for each in find_published(recipe)) or "-"


def _format_value(name, value):
    """A field's value in a table."""
    if name == "model":
        return str(value).replace("attention", "Attention").replace("_", "-")
    return str(value).upper() if name == "learning" else str(value)


def make_run_table(groups):
    """Rows of texts, the header first: a row for each group, with errors in per cent, cost, and published errors."""
    names = [name for name, _ in next(iter(groups))]
    header = [*names, "runs", *(f"{part} error %" for part in ERRORS), "time", "parameters", "images/s", "published"]
    rows = []
    for key, runs in groups.items():
        results = [run.result for run in runs]
        rows.append([
            *(_format_value(name, value) for name, value in key),
            str(len(runs)),
            *(format_mean([result.get(name) for result in results]) for name in ERRORS.values()),
            format_duration(np.mean([result["running_time_s"] for result in results])),
            f"{results[0]['parameters']:,}",
            format_mean([result.get("images_per_s") for result in results], "{:.0f}"),
            _published(runs[0].recipe),
        ])  # fmt: skip
    return [header, *rows]


def make_pivot_table(groups, field):
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
        error = format_mean([run.result["test_error_percent"] for run in runs])
        cells.setdefault(rest, {})[dict(key)[field]] = (error, _published(runs[0].recipe))
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
    """Rows of texts in aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows) + "\n"


def format_markdown(rows):
    """Rows of texts as a Markdown table, the sources of published errors below it."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    sources = [f"{name}: {source}" for name, source in SOURCES.items() if any(f"({name})" in line for line in lines)]
    return "\n".join(lines) + ("\n\nPublished: " + "; ".join(sources) + ".\n" if sources else "\n")


def format_csv(rows):
    """Rows of texts as CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


FORMATS = {"console": format_console, "markdown": format_markdown, "csv": format_csv}


def label_groups(groups):
    """Short names of groups for a legend: what differs, the network alone, or rows of the table where much differs."""
    different = [name for name, _ in next(iter(groups)) if len({dict(key)[name] for key in groups}) > 1] or ["model"]
    if len(different) > MOST_NAMED:
        return [f"row {row}" for row, _ in enumerate(groups, start=1)]
    return [", ".join(_format_value(name, dict(key)[name]) for name in different) for key in groups]


def write_curves(groups, path):
    """Training loss and errors of each group as a PNG file."""
    from Training.visual import plots

    histories = {label: [run.history for run in runs] for label, runs in zip(label_groups(groups), groups.values())}
    plots.save_picture(plots.draw_curves(histories), path)


def parse(arguments):
    parser = Parser(prog=PROGRAM, description=__doc__, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, or a folder of runs")
    parser.add_argument("--format", choices=tuple(FORMATS), default="console", help="of the table (default: console)")
    parser.add_argument("--columns", metavar="FIELD", help="test errors with this field's values side by side")
    parser.add_argument("--curves", metavar="FILE", help="also write the curves as a PNG file")
    return parser.parse_args(arguments)


def report(words):
    """The table that the words ask for, as text; writes the curves."""
    runs, unfinished = history.find(words.runs)
    if not runs:
        raise InputError(f"no run is finished; {len(unfinished)} are not: {', '.join(map(str, unfinished)):.200}")
    groups = group_runs(runs)
    rows = make_pivot_table(groups, words.columns) if words.columns else make_run_table(groups)
    if words.curves:
        write_curves(groups, words.curves)
    return FORMATS[words.format](rows), unfinished


@entry_point(PROGRAM)
def main(arguments=None):
    words = parse(arguments)
    with report_errors(PROGRAM):
        text, unfinished = report(words)
    print(text, end="")
    if unfinished:
        exit_with(1, f"{PROGRAM}: not finished and left out: {', '.join(map(str, unfinished))}")


if __name__ == "__main__":
    run_program(main)

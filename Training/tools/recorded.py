"""Print two comparisons of the paper with the runs in this repository: `python -m Training.tools.recorded`.

It compares ARL with NAL (test errors), and Attention-56 with Attention-92 (errors and training time), next to the
published values. The runs are those in `benchmarks/results` and `weights`. If there are several comparisons, the one
with the lowest test error is printed.
"""

from pathlib import Path

from Model import weights
from Training.console import entry_point, format_count, report_errors, run_program
from Training.errors import InputError
from Training.flags import Parser
from Training.recipe import compared_fields
from Training.runs import history
from Training.tools import report
from Training.visual.published import find_published_cost

PROGRAM = "python -m Training.tools.recorded"
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
NETWORKS = ("attention_56", "attention_92")
NO_PAIR = "no recorded runs differ only in {}"


def read_all():
    """Return the finished runs in `benchmarks/results` and in `weights`; a run may be in both."""
    results = [path for folder in (RESULTS, weights.FOLDER) for path in sorted(folder.rglob("result.json"))]
    return [history.read_run(path.parent) for path in results if path.with_name("recipe.json").exists()]


def find_recorded():
    """Return the finished runs in the repository without duplicates: runs with equal results are the same run."""
    runs = []
    for run in read_all():
        if all(run.result != other.result for other in runs):
            runs.append(run)
    return runs


def choose_comparison(runs, field, **fixed):
    """Return runs that differ only in one field and the seed.

    If there are several such sets of runs, the one with the lowest test error is returned.

    Args:
        runs: list of `history.Run`.
        field: str, a field of the recipe, such as "learning".
        fixed: required values of other fields of the recipe, such as `model="attention_56"`.

    Returns:
        A list of runs, sorted by the value of the field; empty if there are none.
    """
    fields = [name for name in compared_fields() if name != field]
    groups = {}
    for run in runs:
        if all(run.recipe.get(name) == value for name, value in fixed.items()):
            groups.setdefault(tuple(str(run.recipe.get(name)) for name in fields), []).append(run)
    pairs = [group for group in groups.values() if len({str(run.recipe[field]) for run in group}) > 1]
    best = min(pairs, key=lambda group: min(run.result["test_error_percent"] for run in group), default=[])
    return sorted(best, key=lambda run: str(run.recipe[field]))


def choose_depths(runs):
    """Return runs of Attention-56 and Attention-92, with ARL, that differ only in the network and the seed."""
    return choose_comparison([run for run in runs if run.recipe["model"] in NETWORKS], "model", learning="arl")


def describe(runs):
    """Return one line about the training that the runs of a comparison have in common."""
    recipe = runs[0].recipe
    images = format_count(recipe["samples"], "training image") if recipe["samples"] else "all images"
    seeds = sorted({run.result["seed"] for run in runs})
    seed = f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
    start = f" from {recipe['weights']}" if recipe.get("weights") else ""
    epochs = runs[0].result.get("epochs") or recipe["epochs"]  # a run with a time limit decides by itself
    return f"{format_count(epochs, 'epoch')}{start}, {images}, {recipe['geometry']} geometry, {seed}"


def name_devices(runs):
    """Return the names of the devices on which the runs were trained."""
    return "; ".join(sorted({run.result["device"] for run in runs}))


def make_learning_table(runs):
    """Return rows of texts, one per network: test errors of ARL and NAL, ours and published.

    Raises:
        InputError: there are no such runs.
    """
    rows = []
    for model in NETWORKS:
        chosen = choose_comparison(runs, "learning", model=model)
        if chosen:
            header, *found = report.make_pivot_table(report.group_runs(chosen), "learning")
            rows += [[*row, describe(chosen), name_devices(chosen)] for row in found]
    if not rows:
        raise InputError(NO_PAIR.format("learning"))
    return [[*header, "our runs", "on"], *rows]


def make_depth_table(runs):
    """Return rows of texts, one per network: errors in per cent and training time, ours and published.

    Raises:
        InputError: there are no such runs.
    """
    chosen = choose_depths(runs)
    if not chosen:
        raise InputError(NO_PAIR.format("the network"))
    parts = ("train error %", "validation error %", "test error %", "time")
    header, *found = report.make_run_table(report.group_runs(chosen))
    rows = []
    for row in found:
        cells = dict(zip(header, row))
        cost = find_published_cost(cells["model"].lower().replace("-", "_"))
        known = [f"{cost.train_error:.2f}", f"{cost.validation_error:.2f}", f"{cost.minutes} min"]
        train, validation, minutes = (f"{value} ({cost.source})" for value in known)
        published = (train, validation, cells["published"], minutes)
        both = [cell for part, theirs in zip(parts, published) for cell in (cells[part], theirs)]
        rows.append([cells["dataset"], cells["model"], *both, describe(chosen), name_devices(chosen)])
    names = [name for part in parts for name in (part, f"{part.removesuffix(' %')} published")]
    return [["dataset", "model", *names, "our runs", "on"], *rows]


def find_predictions(run):
    """Return the path of a run's recorded predictions for the test set, or None.

    They are in the folder of the run, or of another recorded run with the same result.
    """
    same = [run, *(other for other in read_all() if other.result == run.result)]
    paths = [each.folder / "predictions.csv" for each in same]
    return next((path for path in paths if path.is_file()), None)


@entry_point(PROGRAM)
def main(arguments=None):
    parser = Parser(prog=PROGRAM, description=__doc__, allow_abbrev=False)
    parser.add_argument("--format", choices=tuple(report.FORMATS), default="console", help="(default: console)")
    options = parser.parse_args(arguments)
    with report_errors(PROGRAM):
        runs = find_recorded()
        for make in (make_learning_table, make_depth_table):
            print(report.FORMATS[options.format](make(runs)))


if __name__ == "__main__":
    run_program(main)

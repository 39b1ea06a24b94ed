"""Run a comparison, such as those of the paper: `python -m Training.tools.experiments NAME`.

The same command continues an experiment: finished runs are skipped, and an interrupted run is resumed.
"""

import argparse
import dataclasses
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from Training.console import SIGNALS, entry_point, exit_with, format_duration, report_errors, run_program
from Training.errors import format_path
from Training.files import read_text, replace_file
from Training.flags import Parser
from Training.recipe import OPTIMIZERS, RECIPES, Recipe, make_recipe, movable_fields
from Training.runs import history
from Training.tools import report
from Training.visual.escaping import escape_console

PROGRAM = "python -m Training.tools.experiments"
SCRIPT = Path(__file__).parents[2] / "training_cifar10.py"


class Experiment(NamedTuple):
    """A set of runs that differ in one or two fields."""

    about: str
    varied: tuple[dict, ...]  # the fields in which each run differs from the common recipe
    columns: str = ""  # field whose values are side by side in the table
    quick: dict = {}  # additional fields with `--quick`, see QUICK
    quick_varied: tuple[dict, ...] | None = None  # the runs with `--quick`, if not all fit into 15 minutes
    equal_cost: bool = False  # the epochs are those of REFERENCE; other networks get the same number of multiply-adds


def combine(**fields):
    """Return all combinations of values, the last field varying fastest: `combine(a=(1, 2), b=(3,))`."""
    combined = [{}]
    for name, values in fields.items():
        combined = [{**each, name: value} for each in combined for value in values]
    return tuple(combined)


def list_networks(*depths):
    """Return the names of networks of these depths."""
    return tuple(f"attention_{depth}" for depth in depths)


# Multiply-adds for one image, in millions, by network and geometry; a test compares them with `Model.count`.
COSTS = {
    ("attention_56", "paper"): 122.8,
    ("attention_92", "paper"): 211.9,
    ("attention_128", "paper"): 301.0,
    ("attention_56", "compact"): 171.2,
    ("attention_92", "compact"): 258.2,
    ("attentionnext_56", "compact"): 171.4,
    ("attentioninception_56", "compact"): 169.5,
    ("attention_56", "full"): 676.0,
}
REFERENCE = ("attention_56", "paper")


def list_architectures(*architectures):
    """Return the fields of runs of these networks, given as `(name, geometry)`."""
    return tuple({"model": model, "geometry": geometry} for model, geometry in architectures)


def list_optimizers():
    """Return the fields of a run with each optimizer, at its default learning rate; decoupled weight decay is 0.05."""
    common = {"learning_rate": 0.0, "weight_decay_kind": "auto"}
    decay = {name: {} if row.l2 else {"weight_decay": 0.05} for name, row in OPTIMIZERS.items()}
    return tuple({"optimizer": name, **common, **decay[name]} for name in OPTIMIZERS)


# For about 15 minutes on 2 cores: the paper's networks, with few images of CIFAR-10 and few epochs.
QUICK = {
    **RECIPES["quick"], "geometry": "paper", "samples": 2000, "epochs": 6, "validation_split": 0.02, "masks_every": 3,
}  # fmt: skip

EXPERIMENTS = {
    "arl-nal": Experiment(
        "attention residual learning compared with naive attention learning (table 3)",
        combine(model=list_networks(56, 92, 128, 164), learning=("arl", "nal")),
        columns="learning",
        quick={"samples": 1500},
        quick_varied=combine(model=list_networks(56, 92), learning=("arl", "nal")),
    ),
    "attention-type": Experiment(
        "mixed, channel and spatial attention (table 1)",
        combine(model=list_networks(56), attention=("mixed", "channel", "spatial")),
        quick={"samples": 3000},
    ),
    "mask": Experiment(
        "encoder-decoder masks compared with masks of local convolutions (table 4)",
        combine(model=list_networks(56), mask=("encoder_decoder", "local")),
        quick={"samples": 4000},
    ),
    "label-noise": Experiment(
        "different shares of wrong training labels (table 5)",
        combine(model=list_networks(92), label_noise=(0.1, 0.3, 0.5, 0.7)),
        quick={"samples": 2000},
        quick_varied=combine(model=list_networks(56), label_noise=(0.1, 0.3, 0.5, 0.7)),
    ),
    "depth": Experiment(
        "networks of different depths (tables 3 and 6)",
        combine(model=list_networks(56, 92, 128, 164, 236, 452)),
        quick={"samples": 1000},
        quick_varied=combine(model=list_networks(56, 92, 128)),
    ),
    "optimizers": Experiment(
        "all optimizers, each at its default learning rate",
        list_optimizers(),
        quick={"samples": 1000},
    ),
    "architectures": Experiment(
        "geometries and families, trained with equal numbers of multiply-adds",
        list_architectures(*COSTS),
        quick={"samples": 800, "epochs": 12},
        quick_varied=list_architectures(
            ("attention_56", "paper"),
            ("attention_92", "paper"),
            ("attention_56", "compact"),
            ("attentionnext_56", "compact"),
            ("attentioninception_56", "compact"),
        ),
        equal_cost=True,
    ),
}


def plan_recipes(name, quick=False, seeds=1, **given):
    """Return the recipes of an experiment's runs, in order.

    Args:
        name: str, key of `EXPERIMENTS`.
        quick: bool, whether to train with few images and epochs.
        seeds: int, runs of each recipe, with seeds 0 to `seeds - 1`.
        given: fields of the recipe, which override those that all runs share.

    Raises:
        InputError: a value is invalid.
    """
    experiment = EXPERIMENTS[name]
    common = {**QUICK, **experiment.quick} if quick else RECIPES["paper"]
    varied = experiment.quick_varied or experiment.varied if quick else experiment.varied
    planned = []
    for seed in range(seeds):
        for each in varied:
            fields, own = {**common, **each}, {**given, "seed": seed}
            if experiment.equal_cost:
                share = COSTS[REFERENCE] / COSTS[fields["model"], fields["geometry"]]
                own["epochs"] = max(round(given.get("epochs", fields["epochs"]) * share), 2)
            planned.append(make_recipe(fields, own))
    return planned


def find_run(logs, recipe):
    """Return the folder of a run with this recipe in `logs`, preferably a finished one, or None.

    Fields that a resumed run may change, such as `data_dir`, are not compared.
    """
    found = []
    for path in sorted(Path(logs).glob("*/recipe.json")):
        try:
            if set(find_changes(Recipe.from_json(read_text(path)), recipe)) <= set(movable_fields()):
                found.append(path.parent)
        except (OSError, ValueError):
            continue  # not a recipe, so not one of these runs
    return next((run for run in found if is_finished(run)), found[-1] if found else None)


def is_finished(run):
    """Return whether a run has a result."""
    return (run / "result.json").exists()


def find_changes(before, after):
    """Return the fields in which a recipe differs from the one before, `{name: value}`."""
    names = [item.name for item in dataclasses.fields(Recipe)]
    return {name: getattr(after, name) for name in names if getattr(before, name) != getattr(after, name)}


def make_command(recipe, run=None):
    """Return the command line that trains a recipe, or that resumes the run in a folder from where its data is now."""
    if run:
        begin, fields = ["--resume", str(run)], find_changes(Recipe.from_json(read_text(run / "recipe.json")), recipe)
    else:
        defaults = {item.name: item.default for item in dataclasses.fields(recipe)}
        begin, fields = [], {name: value for name, value in vars(recipe).items() if value != defaults[name]}
    options = [  # as one word each: argparse would take a value that starts with a dash for a flag
        f"--{name.replace('_', '-')}={str(value).lower() if isinstance(value, bool) else value}"
        for name, value in fields.items()
    ]
    return [sys.executable, str(SCRIPT), *begin, *options]


def run_command(command):
    """Run a command and return its exit code; pass signals on, and wait until the run has saved itself.

    The command gets a session of its own, so that a terminal's signal reaches it once, through this process. A second
    one would end it at once.
    """
    children, early = [], []

    def pass_on(number, _frame):
        if not children:
            early.append(number)
        for child in children:
            child.send_signal(number)

    caught = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # as SIGHUP under nohup
    before = {number: signal.signal(number, pass_on) for number in caught}
    try:
        children.append(subprocess.Popen(command, start_new_session=True))
        for number in early:
            children[0].send_signal(number)
        code = children[0].wait()
        return 128 - code if code < 0 else code
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_all(planned, logs):
    """Train all unfinished runs, one process after the other; end this process if one of them fails."""
    for number, recipe in enumerate(planned, start=1):
        run = find_run(logs, recipe)
        if run and is_finished(run):
            print(f"{number} of {len(planned)}: already finished, {format_path(run)}", flush=True)
            continue
        print(f"{number} of {len(planned)}: {escape_console(shlex.join(make_command(recipe, run)[1:]))}", flush=True)
        code = run_command(make_command(recipe, run))
        if code:
            exit_with(code, f"{PROGRAM}: stopped at run {number} of {len(planned)}; the same command continues there")


def summarize(name, planned, logs):
    """Return the table of an experiment as text, and write it and the curves to the folder of the runs."""
    runs = [history.read_run(find_run(logs, recipe)) for recipe in planned]
    groups = report.group_runs(runs)
    columns = EXPERIMENTS[name].columns
    tables = [report.make_pivot_table(groups, columns)] if columns else []
    tables.append(report.make_run_table(groups))
    replace_file(Path(logs) / "report.md", "\n".join(map(report.format_markdown, tables)).encode())
    replace_file(Path(logs) / "report.csv", report.format_csv(tables[-1]).encode())
    report.write_curves(groups, Path(logs) / "curves.png")
    spent = format_duration(sum(run.result["running_time_s"] for run in runs))
    return (
        "\n".join(map(report.format_console, tables))
        + f"{spent} of training; tables and curves in {format_path(logs)}\n"
    )


def parse(arguments):
    about = "\n".join(f"  {name:<15} {each.about}" for name, each in EXPERIMENTS.items())
    parser = Parser(prog=PROGRAM, description=f"{__doc__}\n{about}", allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("name", choices=tuple(EXPERIMENTS), metavar="NAME", help=", ".join(EXPERIMENTS))
    parser.add_argument("--quick", action="store_true", help="few images and epochs: about 15 minutes on 2 cores")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="runs of each recipe, seeds 0 to N - 1")
    parser.add_argument(
        "--logs", default="Logs", help="folder in which the folder of the experiment is created (default: Logs)"
    )
    parser.add_argument("--data-dir", default="", help="as in training_cifar10.py")
    parser.add_argument("--dataset", default="cifar10", choices=("cifar10", "cifar100"), help="(default: cifar10)")
    parser.add_argument("--epochs", type=int, help="instead of the experiment's number")
    parser.add_argument("--samples", type=int, help="limit of training images, instead of the experiment's")
    parser.add_argument("--eval-samples", type=int, help="limit of validation and of test images (default: none)")
    options = parser.parse_args(arguments)
    if options.seeds < 1:
        parser.error(f"--seeds must be 1 or more, received {options.seeds}")
    return options


@entry_point(PROGRAM)
def main(arguments=None):
    options = parse(arguments)
    with report_errors(PROGRAM, "Stopped."):
        logs = Path(options.logs) / (options.name + ("-quick" if options.quick else ""))
        given = {"logs": str(logs), "data_dir": options.data_dir, "dataset": options.dataset}
        limits = ("epochs", "samples", "eval_samples")
        given |= {name: getattr(options, name) for name in limits if getattr(options, name) is not None}
        planned = plan_recipes(options.name, options.quick, options.seeds, **given)
        run_all(planned, logs)
        print(summarize(options.name, planned, logs), end="")


if __name__ == "__main__":
    run_program(main)

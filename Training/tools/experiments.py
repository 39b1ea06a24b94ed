"""The paper's comparisons as named sets of runs, one command each: `python -m Training.tools.experiments NAME`.

What is finished is skipped, what was interrupted is resumed: the same command, given again, goes on.
"""

import argparse
import dataclasses
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from Training.console import entry_point, exit_with, format_duration, report_errors, run_program
from Training.files import read_text
from Training.flags import Parser
from Training.recipe import RECIPES, Recipe, make_recipe
from Training.runs import history
from Training.tools import report

PROGRAM = "python -m Training.tools.experiments"
SCRIPT = Path(__file__).parents[2] / "training_cifar10.py"


class Experiment(NamedTuple):
    """Runs that differ in one thing or two."""

    about: str
    varied: tuple[dict, ...]  # what each run adds to the common recipe
    columns: str = ""  # the field whose values stand side by side in the table
    quick: dict = {}  # what `--quick` adds to QUICK
    quick_varied: tuple[dict, ...] | None = None  # where not all of the runs fit into 15 minutes


def combine(**fields):
    """All combinations of values, the last field varying fastest: `every(a=(1, 2), b=(3,))`."""
    combined = [{}]
    for name, values in fields.items():
        combined = [{**each, name: value} for each in combined for value in values]
    return tuple(combined)


def networks(*depths):
    return tuple(f"attention_{depth}" for depth in depths)


# Within 15 minutes on 2 cores: the paper's networks, but few images of CIFAR-10 and few epochs.
QUICK = {
    **RECIPES["quick"], "geometry": "paper", "samples": 2000, "epochs": 6, "validation_split": 0.02, "masks_every": 3,
}  # fmt: skip

EXPERIMENTS = {
    "arl-nal": Experiment(
        "attention residual against naive attention learning (table 3)",
        combine(model=networks(56, 92, 128, 164), learning=("arl", "nal")),
        columns="learning",
        quick={"samples": 1500},
        quick_varied=combine(model=networks(56, 92), learning=("arl", "nal")),
    ),
    "attention-type": Experiment(
        "mixed, channel and spatial attention (table 1)",
        combine(model=networks(56), attention=("mixed", "channel", "spatial")),
        quick={"samples": 3000},
    ),
    "mask": Experiment(
        "encoder-decoder against local convolutions in the mask (table 4)",
        combine(model=networks(56), mask=("encoder_decoder", "local")),
        quick={"samples": 4000},
    ),
    "label-noise": Experiment(
        "training labels replaced with the paper's confusion matrix (table 5)",
        combine(model=networks(92), label_noise=(0.1, 0.3, 0.5, 0.7)),
        quick={"samples": 2000},
        quick_varied=combine(model=networks(56), label_noise=(0.1, 0.3, 0.5, 0.7)),
    ),
    "depth": Experiment(
        "how deep (tables 3 and 6)",
        combine(model=networks(56, 92, 128, 164, 236, 452)),
        quick={"samples": 1000},
        quick_varied=combine(model=networks(56, 92, 128)),
    ),
    "optimizers": Experiment(
        "SGD, Adam, AdamW and RMSprop (the reference re-implementation's comparison)",
        (
            {"optimizer": "sgd", "learning_rate": 0.1},
            {"optimizer": "adam", "learning_rate": 1e-3},
            {"optimizer": "adamw", "learning_rate": 1e-3, "weight_decay_kind": "decoupled", "weight_decay": 0.05},
            {"optimizer": "rmsprop", "learning_rate": 1e-4},
        ),
        quick={"samples": 2000},
    ),
}


def plan_recipes(name, quick=False, seeds=1, **given):
    """The recipes of an experiment's runs, in their order; `given` fields override what all of them share.

    Raises:
        InputError: a value that cannot be.
    """
    experiment = EXPERIMENTS[name]
    common = {**QUICK, **experiment.quick} if quick else RECIPES["paper"]
    varied = experiment.quick_varied or experiment.varied if quick else experiment.varied
    return [make_recipe({**common, **each}, {**given, "seed": seed}) for seed in range(seeds) for each in varied]


def find_run(logs, recipe):
    """The folder of the run of this recipe, the finished one first, or None: found by the recipes in `logs`."""
    found = []
    for path in sorted(Path(logs).glob("*/recipe.json")):
        try:
            if Recipe.from_json(read_text(path)) == recipe:
                found.append(path.parent)
        except (OSError, ValueError):
            continue  # a file that is no recipe is no run of ours
    return next((run for run in found if is_finished(run)), found[-1] if found else None)


def is_finished(run):
    return (run / "result.json").exists()


def make_command(recipe, run=None):
    """The command line that trains a recipe, or that goes on with a run's folder."""
    if run:
        return [sys.executable, str(SCRIPT), "--resume", str(run)]
    words = []
    for item in dataclasses.fields(recipe):
        value = getattr(recipe, item.name)
        if value != item.default:
            words += ["--" + item.name.replace("_", "-"), str(value).lower() if item.type is bool else str(value)]
    return [sys.executable, str(SCRIPT), *words]


def run_command(words):
    """Exit code of a command, which is waited for to its end, also after Ctrl-C: a run then saves itself."""
    child = subprocess.Popen(words)
    before = signal.signal(signal.SIGTERM, lambda *_: child.terminate())  # Ctrl-C reaches the child by itself
    try:
        while True:
            try:
                code = child.wait()
                return 128 - code if code < 0 else code
            except KeyboardInterrupt:
                continue
    finally:
        signal.signal(signal.SIGTERM, before)


def run_all(planned, logs):
    """Train what is not finished, one process after the other; ends the process where one of them fails."""
    for number, recipe in enumerate(planned, start=1):
        run = find_run(logs, recipe)
        if run and is_finished(run):
            print(f"{number} of {len(planned)}: done before, {run}", flush=True)
            continue
        print(f"{number} of {len(planned)}: {' '.join(make_command(recipe, run)[1:])}", flush=True)
        code = run_command(make_command(recipe, run))
        if code:
            exit_with(
                code, f"{PROGRAM}: stopped at run {number} of {len(planned)}; the same command goes on from there"
            )


def summarize(name, planned, logs):
    """The experiment's table as text; written beside the runs, with the curves."""
    runs = [history.read_run(find_run(logs, recipe)) for recipe in planned]
    groups = report.group_runs(runs)
    columns = EXPERIMENTS[name].columns
    tables = [report.make_pivot_table(groups, columns)] if columns else []
    tables.append(report.make_run_table(groups))
    (Path(logs) / "report.md").write_text("\n".join(map(report.format_markdown, tables)), encoding="utf-8")
    (Path(logs) / "report.csv").write_text(report.format_csv(tables[-1]), encoding="utf-8")
    report.write_curves(groups, Path(logs) / "curves.png")
    spent = format_duration(sum(run.result["running_time_s"] for run in runs))
    return "\n".join(map(report.format_console, tables)) + f"{spent} of training; tables and curves in {logs}\n"


def parse(arguments):
    about = "\n".join(f"  {name:<15} {each.about}" for name, each in EXPERIMENTS.items())
    parser = Parser(prog=PROGRAM, description=f"{__doc__}\n{about}", allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("name", choices=tuple(EXPERIMENTS), metavar="NAME", help=", ".join(EXPERIMENTS))
    parser.add_argument("--quick", action="store_true", help="few images and epochs: 15 minutes on 2 cores")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="runs of each, with seeds 0 to N - 1")
    parser.add_argument("--logs", default="Logs", help="gets a folder for the experiment (default: Logs)")
    parser.add_argument("--data-dir", default="", help="as in training_cifar10.py")
    parser.add_argument("--dataset", default="cifar10", choices=("cifar10", "cifar100"), help="(default: cifar10)")
    parser.add_argument("--epochs", type=int, help="another number than the experiment's own")
    parser.add_argument("--samples", type=int, help="another limit of training images than the experiment's own")
    words = parser.parse_args(arguments)
    if words.seeds < 1:
        parser.error(f"--seeds must be 1 or more, received {words.seeds}")
    return words


@entry_point(PROGRAM)
def main(arguments=None):
    words = parse(arguments)
    with report_errors(PROGRAM, "Stopped."):
        logs = Path(words.logs) / (words.name + ("-quick" if words.quick else ""))
        given = {"logs": str(logs), "data_dir": words.data_dir, "dataset": words.dataset}
        given |= {name: getattr(words, name) for name in ("epochs", "samples") if getattr(words, name) is not None}
        planned = plan_recipes(words.name, words.quick, words.seeds, **given)
        run_all(planned, logs)
        print(summarize(words.name, planned, logs), end="")


if __name__ == "__main__":
    run_program(main)

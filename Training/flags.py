"""Parses the command line: one flag for each field of the recipe, `--recipe` and `--resume`."""

import argparse
import contextlib
import dataclasses
import difflib
import os
import re
import sys

from Training import devices
from Training.errors import InputError, escape, format_path
from Training.files import read_text
from Training.recipe import RECIPES, Recipe, dataset_names, find_dataset, make_recipe, movable_fields

# The first field of each group of flags in `--help`; fields are in the order of `Recipe`.
GROUPS = {
    "dataset": "data",
    "model": "network",
    "epochs": "length, optimizer, learning rate",
    "class_weights": "loss and regularization",
    "augmentation": "augmentation of the training images",
    "test_flip": "evaluation",
    "seed": "seed, arithmetic, devices",
    "logs": "files and TensorBoard",
}
METAVARS = {int: "N", float: "X", str: "TEXT"}
OWN_METAVARS = {"dataset": "NAME", "model": "NAME", "weights": "NAME|RUN|FILE", "profile": "N-M", "step_at": "X,..."}
OWN_METAVARS |= dict.fromkeys(("data_dir", "cache", "compile_cache", "logs"), "DIR")
EXAMPLES = """examples:
  python training_cifar10.py --dataset digits --recipe quick           minutes on a CPU, no download
  python training_cifar10.py --recipe quick --data-dir DIR             CIFAR-10, 8 epochs
  python training_cifar10.py --dataset folder --data-dir pictures      your own images, in train/<class>/
  python training_cifar10.py --resume Logs/<run>
"""


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, suggestions for misspelt flags, and `~` expanded in `--flag=~/path`."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {escape(message)} (--help lists every flag)\n")

    def parse_known_args(self, args=None, namespace=None):
        given = sys.argv[1:] if args is None else args
        return super().parse_known_args([_expand_home(each) for each in given], namespace)

    def parse_args(self, args=None, namespace=None):
        known, unknown = self.parse_known_args(args, namespace)
        self.refuse_unknown(unknown)
        return known

    def refuse_unknown(self, arguments):
        if not arguments:
            return
        flags = [flag for action in self._actions for flag in action.option_strings]
        near = difflib.get_close_matches(arguments[0].split("=")[0], flags, n=1)
        self.error(f"unknown argument {arguments[0]!r}" + (f", did you mean {near[0]}?" if near else ""))


def add_data_flags(parser):
    """Add `--dataset` and `--data-dir` to a command for a saved network, whose run knows its own data set."""
    known = dataset_names()
    parser.add_argument("--dataset", type=_read_dataset, metavar="NAME", help=f"{known} (default: that of the run)")
    parser.add_argument("--data-dir", metavar="DIR", help="folder of the data set, as in training (default: the run's)")


def _read_dataset(name):
    try:
        find_dataset(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return name


class _Help(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the examples, and gives the help texts more room."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=30)


def _expand_home(argument):
    """Expand the ~ in `--flag=~/path`: shells only do so at the start of an argument."""
    flag = re.match(r"--[\w-]+=(?=~)", argument)
    return flag[0] + os.path.expanduser(argument[flag.end() :]) if flag else argument


def _boolean(text):
    values = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"must be true or false, received {text!r}")
    return values[text.lower()]


def add_flags(parser):
    """Add one flag for each field of `Recipe` to the parser; flags that are not given set nothing."""
    group = parser
    for item in dataclasses.fields(Recipe):
        if item.name in GROUPS:
            group = parser.add_argument_group(GROUPS[item.name])
        flag = "--" + item.name.replace("_", "-")
        extra = dict(help=_describe(item).replace("%", "%%"), default=argparse.SUPPRESS, dest=item.name)
        if item.type is bool:
            group.add_argument(flag, nargs="?", const=True, type=_boolean, metavar="true|false", **extra)
        elif item.metadata["choices"]:
            group.add_argument(flag, choices=item.metadata["choices"], **extra)
        else:
            metavar = OWN_METAVARS.get(item.name, METAVARS[item.type])
            group.add_argument(flag, type=item.type, metavar=metavar, **extra)


def _describe(item):
    """Return the help text of a field of the recipe, with its default unless that is empty."""
    text = item.metadata["help"]
    text = text() if callable(text) else text
    default = str(item.default).lower() if item.type is bool else item.default
    return text if default == "" else f"{text} (default: {default})"


def parse(arguments, description):
    """Parse a command line into `(recipe, resume)`; `resume` is a run's folder or None.

    With `--resume`, the recipe is that of the folder. Only more `--epochs` and fields that a resumed run may change can
    be given with it. Errors end the process with one line on standard error and exit code 2.
    """
    parser = Parser(
        prog="training_cifar10.py",
        usage="%(prog)s [--recipe NAME] [--dataset NAME] [--model NAME] [flag ...]",
        description=description,
        epilog=EXAMPLES,
        formatter_class=_Help,
        allow_abbrev=False,
    )
    parser.add_argument("--recipe", choices=tuple(RECIPES), help="a named set of values; other flags override it")
    parser.add_argument("--resume", metavar="RUN", help="resume the run in this folder")
    add_flags(parser)
    given = vars(parser.parse_args(arguments))
    name, resume = given.pop("recipe"), given.pop("resume")
    try:
        if resume is not None:
            return _resume(resume, name, given), resume
        return make_recipe(RECIPES.get(name, {}), given), None
    except InputError as error:
        parser.error(str(error))


def _resolve(base, given, recipe):
    """Return the values that a command gives, except `epochs`, as the recipe of a new run would have them.

    A run's recipe has a shortened warm-up, the precision that `auto` chose, and no options that its mode of
    distribution lacks.
    """
    values = {name: value for name, value in {**base, **given}.items() if name != "epochs"}
    with contextlib.suppress(InputError):  # values that only fit to others of the run are compared as they are
        made = devices.drop_unsupported(make_recipe(base, {**given, "epochs": recipe.epochs}), lambda *_, **__: None)
        values = {key: getattr(made, key) for key in values}
    if values.get("precision") == "auto":
        del values["precision"]
    return values


def _resume(folder, name, given):
    """Return the recipe of the run in `folder`, with more epochs or other folders if they are given."""
    if not folder:  # --resume "$RUN" with an unset variable must not start a new run
        raise InputError("--resume needs a run's folder, received ''")
    path = os.path.join(folder, "recipe.json")
    try:
        recipe = Recipe.from_json(read_text(path))
    except OSError as error:
        reason = f"{format_path(path)} cannot be read: {error.strerror}"
        raise InputError(f"--resume needs a run's folder, and {reason}") from None
    values = _resolve(RECIPES.get(name, {}), given, recipe)
    changed = {key: value for key, value in values.items() if value != getattr(recipe, key)}
    other = [f"{key} (run: {getattr(recipe, key)!r}, given: {value!r})"
             for key, value in changed.items() if key not in movable_fields()]  # fmt: skip
    if other:
        raise InputError(f"--resume uses the recipe of the run, which differs in {', '.join(other)}")
    if recipe.minutes and given.get("epochs", recipe.epochs) != recipe.epochs:
        raise InputError(
            f"--epochs cannot change on --resume: --minutes {recipe.minutes:g} decided the length of the run"
        )
    if given.get("epochs", recipe.epochs) < recipe.epochs:
        raise InputError(f"--resume can only add epochs: the run has {recipe.epochs}, received {given['epochs']}")
    moved = {key: given[key] for key in ("epochs", *movable_fields()) if key in given}
    return dataclasses.replace(recipe, **moved)

"""The command line: one flag for each field of the recipe, and what `--recipe` and `--resume` make of them."""

import argparse
import dataclasses
import difflib

from Training.errors import InputError, escape
from Training.files import read_text
from Training.recipe import RECIPES, Recipe


class Parser(argparse.ArgumentParser):
    """argparse, with every refusal in one line and a guess at a misspelt flag."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {escape(message)} (--help lists every flag)\n")

    def parse_args(self, args=None, namespace=None):
        known, unknown = self.parse_known_args(args, namespace)
        self.refuse_unknown(unknown)
        return known

    def refuse_unknown(self, words):
        if not words:
            return
        flags = [flag for action in self._actions for flag in action.option_strings]
        near = difflib.get_close_matches(words[0].split("=")[0], flags, n=1)
        self.error(f"unknown argument {words[0]!r}" + (f", did you mean {near[0]}?" if near else ""))


def _boolean(text):
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"must be true or false, received {text!r}")
    return words[text.lower()]


def add_flags(parser):
    """Give the parser one flag for each field of `Recipe`; a flag that is not given sets nothing."""
    for item in dataclasses.fields(Recipe):
        flag = "--" + item.name.replace("_", "-")
        text = item.metadata["help"]
        text = f"{text() if callable(text) else text} (default: {item.default!r})".replace("%", "%%")
        extra = dict(help=text, default=argparse.SUPPRESS, dest=item.name)
        if item.type is bool:
            parser.add_argument(flag, nargs="?", const=True, type=_boolean, metavar="true|false", **extra)
        elif item.metadata["choices"]:
            parser.add_argument(flag, choices=item.metadata["choices"], **extra)
        else:
            parser.add_argument(flag, type=item.type, metavar=item.type.__name__.upper(), **extra)


def parse(arguments, description):
    """Turn command-line words into `(recipe, resume)`; `resume` is a run folder or None.

    With `--resume` the recipe is the folder's own; only `--epochs` may be given beside it. Refusals are one line on
    the standard error and exit code 2.
    """
    parser = Parser(prog="training_cifar10.py", description=description, allow_abbrev=False)
    parser.add_argument(
        "--recipe", choices=tuple(RECIPES), help="a named set of values; flags given beside it override it"
    )
    parser.add_argument("--resume", metavar="RUN", help="go on with the run in this folder")
    add_flags(parser)
    given = vars(parser.parse_args(arguments))
    name, resume = given.pop("recipe"), given.pop("resume")
    try:
        if resume is not None:
            return _resumed(resume, name, given), resume
        return Recipe(**{**RECIPES.get(name, {}), **given}), None
    except InputError as error:
        parser.error(str(error))


def _resumed(folder, name, given):
    """The recipe of the run in `folder`, with at most more epochs."""
    if not folder:  # what a shell makes of "$RUN" where RUN is not set: no wish for a run of its own
        raise InputError("--resume needs a run's folder, received ''")
    try:
        recipe = Recipe.from_json(read_text(f"{folder}/recipe.json"))
    except OSError as error:
        raise InputError(
            f"--resume needs a run's folder, and {folder}/recipe.json cannot be read: {error.strerror}"
        ) from None
    values = {**RECIPES.get(name, {}), **given}
    other = [f"{key} (run: {getattr(recipe, key)!r}, given: {values[key]!r})"
             for key in values if key != "epochs" and values[key] != getattr(recipe, key)]  # fmt: skip
    if other:
        raise InputError(f"--resume takes the recipe of the run, which differs in {', '.join(other)}")
    if recipe.minutes and given.get("epochs", recipe.epochs) != recipe.epochs:
        raise InputError(f"--epochs cannot change on --resume: --minutes {recipe.minutes:g} decided the run's length")
    if given.get("epochs", recipe.epochs) < recipe.epochs:
        raise InputError(f"--epochs may only grow on --resume: the run has {recipe.epochs}, received {given['epochs']}")
    return dataclasses.replace(recipe, epochs=given.get("epochs", recipe.epochs))

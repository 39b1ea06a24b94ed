"""The recipe of a run: every hyper-parameter once, with its flag, its help and its range."""

import argparse
import dataclasses
import difflib
import json
import math
from dataclasses import dataclass, field

from Model.geometries import ATTENTION, GEOMETRIES, LEARNING, MASKS, NETWORKS, parse_name


class InputError(ValueError):
    """Something the user gave cannot be used; the message is one line that says what would be right."""


def option(default, text, choices=None, low=None, high=None, check=None):
    """A field of the recipe: default, help text, and its choices, its closed range, or what raises for a bad value."""
    limits = {"choices": choices, "low": low, "high": high, "check": check}
    return field(default=default, metadata={"help": text, **limits})


@dataclass(frozen=True)
class Recipe:
    """Every hyper-parameter of a training run. Flags, `--help` and `recipe.json` are made from this class.

    Raises:
        InputError: a value outside its choices or range, or two values that exclude each other.
    """

    # What is trained
    dataset: str = option("cifar10", "data set", choices=("cifar10", "cifar100", "digits"))
    data_dir: str = option("", "folder with the official archive or its unpacked folder")
    samples: int = option(0, "limit of training images, the same share of each class; 0 is no limit", low=0)
    validation_split: float = option(0.1, "share of the training set held out, stratified", low=0.0, high=0.9)
    model: str = option("attention_56", f"network: {', '.join(NETWORKS)}, or another depth 36 m + 20", check=parse_name)
    geometry: str = option("compact", "what stands around the blocks", choices=tuple(GEOMETRIES))
    learning: str = option("arl", "attention residual or naive attention learning", choices=LEARNING)
    attention: str = option("mixed", "activation of the masks", choices=ATTENTION)
    mask: str = option("encoder_decoder", "structure of the masks", choices=MASKS)
    p: int = option(0, "residual units before and after a block's branches; 0 is the network's own", low=0, high=16)
    t: int = option(0, "residual units in the trunk of a block; 0 is the network's own", low=0, high=16)
    r: int = option(0, "residual units between poolings of a mask; 0 is the network's own", low=0, high=16)
    dropout: float = option(0.2, "share of features dropped before the classifier", low=0.0, high=0.99)
    classifier_l2: float = option(1e-4, "L2 penalty on the classifier's kernel", low=0.0, high=1.0)
    # How it is trained
    epochs: int = option(200, "passes over the training set", low=1, high=100_000)
    batch_size: int = option(64, "images a step", low=1, high=65_536)
    optimizer: str = option("sgd", "sgd is Nesterov's", choices=("sgd", "adam", "adamw", "rmsprop"))
    learning_rate: float = option(0.1, "highest learning rate", low=1e-9, high=100.0)
    momentum: float = option(0.9, "momentum of sgd", low=0.0, high=0.9999)
    schedule: str = option(
        "cosine",
        "learning rate: step divides by 10 at 40 and 60 % of the run, cosine falls to 0, plateau divides by 10 "
        "after 10 epochs without a lower validation loss",
        choices=("step", "cosine", "constant", "plateau"),
    )
    warmup_epochs: float = option(5.0, "epochs of linear warm-up from 0; with cosine only", low=0.0, high=1000.0)
    weight_decay: float = option(1e-4, "weight decay", low=0.0, high=10.0)
    weight_decay_kind: str = option(
        "l2",
        "l2 adds decay * weight to the gradient (the paper's); decoupled shrinks weights by rate * decay a step",
        choices=("l2", "decoupled"),
    )
    decay_all: bool = option(True, "decay batch normalization and biases too (the paper's way)")
    augmentation: str = option(
        "affine",
        "affine: rotation, shift, flip (the reference's); crop: pad 4, crop, flip (the paper's)",
        choices=("affine", "crop", "none"),
    )
    rotation: float = option(15.0, "affine: largest rotation, in degrees", low=0.0, high=180.0)
    shift: float = option(0.1, "affine: largest shift, as a share of height and width", low=0.0, high=1.0)
    flip: bool = option(True, "flip half of the images left to right; never done to digits")
    patience: int = option(
        0, "stop after so many epochs without a lower validation loss; 0 is never", low=0, high=100_000
    )
    seed: int = option(0, "seed of weights, order and augmentation", low=0, high=2**31 - 1)
    # How it is computed
    precision: str = option("float32", "arithmetic", choices=("float32", "mixed_bfloat16", "mixed_float16"))
    jit: bool = option(False, "compile the step with XLA (JAX always does)")
    steps_per_execution: int = option(1, "steps in one call of the compiled function", low=1, high=10_000)
    # What is written
    logs: str = option("Logs", "folder that gets the run's folder")
    checkpoint_steps: int = option(0, "steps between checkpoints within an epoch; 0 saves at its end alone", low=0)
    masks_every: int = option(5, "epochs between pictures of the soft masks in TensorBoard; 0 is never", low=0)
    histograms: bool = option(False, "histograms of the weights in TensorBoard, each epoch")

    def __post_init__(self):
        for item in dataclasses.fields(self):
            _check(item, getattr(self, item.name))
        if self.optimizer == "adamw" and self.weight_decay_kind == "l2":
            raise InputError("optimizer=adamw decouples its weight decay: give --weight-decay-kind decoupled")
        if self.warmup_epochs and self.schedule != "cosine":
            raise InputError(
                f"warmup_epochs={self.warmup_epochs:g} needs schedule=cosine, received schedule={self.schedule}: "
                "give --warmup-epochs 0"
            )
        if self.schedule == "cosine" and self.warmup_epochs >= self.epochs:
            raise InputError(f"warmup_epochs must be less than epochs={self.epochs}, received {self.warmup_epochs:g}")
        if not self.validation_split and (self.schedule == "plateau" or self.patience):
            raise InputError(
                "schedule=plateau and patience watch the validation loss: give a --validation-split above 0"
            )

    def to_json(self):
        """The recipe as JSON text, one field a line."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text):
        """The recipe that `to_json` wrote.

        Raises:
            InputError: no JSON object, an unknown field, or a value that cannot be.
        """
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"the recipe is no JSON: {error}") from None
        if not isinstance(values, dict):
            raise InputError(f"the recipe must be a JSON object, received {type(values).__name__}")
        unknown = sorted(set(values) - {item.name for item in dataclasses.fields(cls)})
        if unknown:
            raise InputError(f"the recipe has unknown fields: {', '.join(unknown):.200}")
        return cls(**values)


def _check(item, value):
    """Refuse a value of the wrong type, outside its choices or outside its range."""
    expected, limits = item.type, item.metadata
    shown = f"{value!r:.80}"
    if expected is float and type(value) is int:
        value = float(value)
    if type(value) is not expected:
        raise InputError(f"{item.name} must be of type {expected.__name__}, received {shown}")
    if limits["choices"] and value not in limits["choices"]:
        raise InputError(f"{item.name} must be one of {', '.join(limits['choices'])}, received {shown}")
    if expected is float and not math.isfinite(value):
        raise InputError(f"{item.name} must be finite, received {shown}")
    if limits["check"]:
        try:
            limits["check"](value)
        except ValueError as error:
            raise InputError(f"{item.name}: {str(error):.400}") from None
    if limits["low"] is not None and value < limits["low"]:
        raise InputError(f"{item.name} must be {limits['low']} or more, received {shown}")
    if limits["high"] is not None and value > limits["high"]:
        raise InputError(f"{item.name} must be {limits['high']} or less, received {shown}")


# Named recipes: what differs from the defaults above.
RECIPES = {
    # Wang et al. 2017, section 4.1; 160k steps of 64 images are 204.8 epochs of 50,000.
    "paper": dict(
        epochs=205, batch_size=64, learning_rate=0.1, schedule="step", warmup_epochs=0.0, weight_decay=1e-4,
        augmentation="crop", dropout=0.0, classifier_l2=0.0, validation_split=0.0,
    ),
    # The reference re-implementation: rotation, shift and flip, dropout and L2 at the classifier. It does not state
    # its optimizer and rates: Adam is our choice.
    "reference": dict(
        epochs=100, batch_size=64, optimizer="adam", learning_rate=1e-3, schedule="plateau", warmup_epochs=0.0,
        weight_decay=0.0, augmentation="affine", classifier_l2=1e-2,
    ),
    # A few epochs on a CPU.
    "quick": dict(epochs=8, warmup_epochs=1.0, weight_decay=5e-4, rotation=5.0, shift=0.1, dropout=0.0, masks_every=1),
}  # fmt: skip


class Parser(argparse.ArgumentParser):
    """argparse, with every refusal in one line and a guess at a misspelt flag."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (--help lists every flag)\n")

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
        text = f"{item.metadata['help']} (default: {item.default!r})".replace("%", "%%")
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
    known, unknown = parser.parse_known_args(arguments)
    parser.refuse_unknown(unknown)
    given = vars(known)
    name, resume = given.pop("recipe"), given.pop("resume")
    try:
        if resume:
            return _resumed(resume, name, given), resume
        return Recipe(**{**RECIPES.get(name, {}), **given}), None
    except InputError as error:
        parser.error(str(error))


def _resumed(folder, name, given):
    """The recipe of the run in `folder`, with at most more epochs."""
    try:
        with open(f"{folder}/recipe.json", encoding="utf-8") as file:
            recipe = Recipe.from_json(file.read())
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise InputError(f"--resume needs a run's folder, and {folder}/recipe.json cannot be read: {reason}") from None
    values = {**RECIPES.get(name, {}), **given}
    other = [f"{key} (run: {getattr(recipe, key)!r}, given: {values[key]!r})"
             for key in values if key != "epochs" and values[key] != getattr(recipe, key)]  # fmt: skip
    if other:
        raise InputError(f"--resume takes the recipe of the run, which differs in {', '.join(other)}")
    if given.get("epochs", recipe.epochs) < recipe.epochs:
        raise InputError(f"--epochs may only grow on --resume: the run has {recipe.epochs}, received {given['epochs']}")
    return dataclasses.replace(recipe, epochs=given.get("epochs", recipe.epochs))

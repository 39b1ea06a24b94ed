"""The recipe of a run: every hyper-parameter once, with its help text and its range."""

import dataclasses
import json
import math
import re
from dataclasses import dataclass, field

from Model.geometries import ATTENTION, GEOMETRIES, LEARNING, MASKS, NETWORKS, parse_name
from Training.errors import InputError
from Training.recipe.choices import (
    AUGMENTATIONS,
    OPTIMIZERS,
    describe_augmentations,
    describe_datasets,
    describe_optimizers,
    find_dataset,
    is_streamed,
)

_WARMUP_FIELDS = ("warmup_epochs", "epochs", "schedule")
SCHEDULES_WITHOUT_WARMUP = ("step", "constant", "plateau")  # schedules


def option(
    default,
    text,
    choices=None,
    low=None,
    high=None,
    check=None,
    compared=True,
    streamed_only=False,
    movable=False,
    before=None,
):
    """Declare a field of the recipe.

    Args:
        default: the default value.
        text: help text, or a function that returns it, for texts made from tables that others may extend.
        choices: values that are allowed.
        low, high: smallest and largest value.
        check: function that raises `ValueError` for a bad value.
        compared: bool, whether runs with different values were trained differently. False for fields that only say
            where and how a run was computed or written.
        streamed_only: bool, whether only streamed pictures have a use for it.
        movable: bool, whether a resumed run may change it.
        before: value in recipes that were written before the field existed, so that such runs resume as they began;
            None is the default value.
    """
    limits = {"choices": choices, "low": low, "high": high, "check": check}
    roles = {"compared": compared, "streamed_only": streamed_only, "movable": movable}
    roles["before"] = default if before is None else before
    return field(default=default, metadata={"help": text, **limits, **roles})


def parse_shares(text):
    """Return the numbers in a text such as "0.4,0.6".

    Raises:
        ValueError: they are not numbers between 0 and 1 that rise.
    """
    try:
        values = [float(word) for word in text.split(",")]
    except ValueError:
        values = [math.nan]
    if not all(a < b for a, b in zip([0, *values], [*values, 1])):
        raise ValueError(f"must be rising shares between 0 and 1, such as 0.4,0.6, received {text!r:.80}")
    return values


def parse_steps(text):
    """Return the first and the last step in a text such as "10-20", or None for "".

    Raises:
        ValueError: they are not two whole numbers from 1 on that do not fall.
    """
    if not text:
        return None
    found = re.fullmatch(r"([0-9]{1,9})-([0-9]{1,9})", text)
    first, last = map(int, found.groups()) if found else (0, 0)
    if not 1 <= first <= last:
        raise ValueError(f"must be the first and the last step, such as 10-20, received {text!r:.80}")
    return first, last


@dataclass(frozen=True)
class Recipe:
    """Every hyper-parameter of a training run. Flags, `--help` and `recipe.json` are made from this class.

    Raises:
        InputError: a value outside its choices or range, or two values that exclude each other.
    """

    # What is trained
    dataset: str = option("cifar10", describe_datasets, check=find_dataset)
    data_dir: str = option(
        "",
        "folder with the official archive or its unpacked folder; with train/<class>/; of shards",
        compared=False,
        movable=True,
    )
    image_size: int = option(
        0, "streamed pictures: height and width; 0 is the geometry's default", low=0, high=4096, streamed_only=True
    )
    broken: str = option(
        "skip",
        "folder: what to do with pictures that cannot be read",
        choices=("skip", "refuse"),
        compared=False,
        streamed_only=True,
    )
    cache: str = option(
        "",
        "streamed pictures: folder that keeps them decoded, as size * size * 3 bytes each",
        compared=False,
        streamed_only=True,
        movable=True,
    )
    workers: int = option(
        0,
        "streamed pictures: threads that decode; 0 is one per core",
        low=0,
        high=1024,
        compared=False,
        streamed_only=True,
        movable=True,
    )
    shards_at_once: int = option(
        0, "shards: number that is shuffled together, so that reading stays sequential; 0 is all", low=0
    )
    mean: str = option(
        "auto",
        "mean to subtract: pixel, the mean image; channel, mean and deviation of 256 images; imagenet, ImageNet's; "
        "auto is channel for streamed pictures, otherwise pixel",
        choices=("auto", "pixel", "channel", "imagenet"),
    )
    samples: int = option(0, "limit of training images, the same share of each class; 0 is no limit", low=0)
    validation_split: float = option(0.1, "share of the training set held out, stratified", low=0.0, high=0.9)
    model: str = option("attention_56", f"network: {', '.join(NETWORKS)}, or another depth 36 m + 20", check=parse_name)
    geometry: str = option(
        "compact", "parts around the attention blocks: stem, widths, last units", choices=tuple(GEOMETRIES)
    )
    learning: str = option("arl", "attention residual or naive attention learning", choices=LEARNING)
    attention: str = option("mixed", "activation of the masks", choices=ATTENTION)
    mask: str = option("encoder_decoder", "structure of the masks", choices=MASKS)
    p: int = option(0, "residual units before and after a block's branches; 0 is the network's default", low=0, high=16)
    t: int = option(0, "residual units in the trunk of a block; 0 is the network's default", low=0, high=16)
    r: int = option(0, "residual units between poolings of a mask; 0 is the network's default", low=0, high=16)
    dropout: float = option(0.2, "share of features dropped before the classifier", low=0.0, high=0.99)
    classifier_l2: float = option(1e-4, "L2 penalty on the classifier's kernel", low=0.0, high=1.0)
    weights: str = option(
        "",
        "weights to start from: those that come with the project (cifar10), a run's folder or a .keras file; the "
        "classifier starts over if the classes are others",
    )
    freeze: str = option("", "stem, stage_1, ... or a layer's name: the network up to it keeps its weights")
    # How it is trained
    epochs: int = option(200, "passes over the training set", low=1, high=100_000)
    minutes: float = option(
        0.0,
        "train as many epochs as fit into these minutes, decided after the first epoch; the learning rate then runs "
        "through the schedule of --epochs in that many; 0 is no limit",
        low=0.0,
        high=1e6,
    )
    batch_size: int = option(64, "images per step", low=1, high=65_536)
    optimizer: str = option("sgd", "optimizer; sgd has Nesterov momentum", choices=OPTIMIZERS)
    learning_rate: float = option(0.0, describe_optimizers, low=0.0, high=100.0)
    momentum: float = option(0.9, "momentum of sgd", low=0.0, high=0.9999)
    accumulate: int = option(
        1, "steps over which gradients are averaged before each update of the weights", low=1, high=10_000
    )
    clip_norm: float = option(
        0.0, "largest global norm of the gradients, which are scaled down to it; 0 is no limit", low=0.0, high=1e6
    )
    schedule: str = option(
        "cosine",
        "learning rate: step divides by 10 at the shares step_at of the run, cosine and linear fall to 0, plateau "
        "divides by 10 after 10 epochs without a lower validation loss",
        choices=("step", "cosine", "linear", "constant", "plateau"),
    )
    step_at: str = option("0.4,0.6", "schedule step: shares of the run, rising, between 0 and 1", check=parse_shares)
    warmup_epochs: float = option(
        5.0, "epochs of linear warm-up from 0; with cosine and linear only", low=0.0, high=1000.0
    )
    weight_decay: float = option(1e-4, "weight decay", low=0.0, high=10.0)
    weight_decay_kind: str = option(
        "auto",
        "l2 adds decay * weight to the gradient (the paper's); decoupled shrinks weights by rate * decay a step; auto "
        f"is decoupled for {', '.join(name for name, row in OPTIMIZERS.items() if not row.l2)}, otherwise l2",
        choices=("auto", "l2", "decoupled"),
    )
    decay_all: bool = option(True, "decay batch normalization and biases too (the paper's way)")
    class_weights: str = option(
        "none",
        "balanced weighs the loss of each image by the inverse frequency of its class, with a mean of 1",
        choices=("none", "balanced"),
    )
    label_smoothing: float = option(0.0, "share of each label spread evenly over all classes", low=0.0, high=0.99)
    label_noise: float = option(
        0.0, "share of the training labels replaced by another class, as in the paper's table 5", low=0.0, high=1.0
    )
    ema: float = option(
        0.0,
        "decay per step of an average of the weights, kept at the end of the run; 0 is none",
        low=0.0,
        high=0.99999,
    )
    augmentation: str = option("affine", describe_augmentations, choices=AUGMENTATIONS)
    rotation: float = option(15.0, "affine: largest rotation, in degrees", low=0.0, high=180.0)
    shift: float = option(0.1, "affine: largest shift, as a share of height and width", low=0.0, high=1.0)
    flip: bool = option(True, "flip half of the images left to right; never done to digits")
    alternate_flip: bool = option(
        False, "flip each image in every second epoch, starting with half of them, instead of at random"
    )
    cutout: int = option(0, "side of a square that is blanked in each image, in pixels; 0 is none", low=0, high=1024)
    mix: str = option(
        "none", "mix each image and its label with another: whole (mixup) or a window (cutmix), in a uniform share",
        choices=("none", "mixup", "cutmix"),
    )  # fmt: skip
    mix_until: float = option(1.0, "share of the epochs after which images are no longer mixed", low=0.0, high=1.0)
    test_flip: bool = option(
        False, "also test with each image and its mirror image averaged; reported in addition", compared=False
    )
    statistics_share: float = option(
        0.05,
        "share of the training images (a batch to 10,000) over which normalization statistics are recomputed before "
        "each validation and at the end; with --ema, the averaged weights are validated; 0 keeps moving statistics",
        low=0.0,
        high=1.0,
        before=0.0,
    )
    patience: int = option(
        0, "stop after this many epochs without a lower validation loss; 0 is never", low=0, high=100_000
    )
    seed: int = option(0, "seed of weights, order and augmentation", low=0, high=2**31 - 1, compared=False)
    # How it is computed
    precision: str = option(
        "float32",
        "arithmetic; auto is mixed_bfloat16 where the GPU or, on TensorFlow, the processor multiplies in it, otherwise "
        "float32, and is recorded as what it was",
        choices=("float32", "mixed_bfloat16", "mixed_float16", "auto"),
    )
    jit: bool = option(False, "compile the step with XLA (JAX always does)", compared=False)
    compile_cache: str = option(
        "",
        "folder that keeps what XLA compiles for later runs: on JAX, and on TensorFlow with --jit",
        compared=False,
        movable=True,
    )
    steps_per_execution: int = option(
        1, "steps in one call of the compiled function", low=1, high=10_000, compared=False
    )
    distribute: str = option(
        "none",
        "split each batch over all devices: mirrored on TensorFlow (one machine), data on JAX (one or many)",
        choices=("none", "mirrored", "data"),
        compared=False,
    )
    data_on_device: bool = option(
        False, "keep all images on the device, as bytes; only indices are sent in each step", compared=False
    )
    # What is written
    logs: str = option("Logs", "folder in which the run's folder is created", compared=False, movable=True)
    checkpoint_steps: int = option(
        0, "steps between checkpoints within an epoch; 0 saves only at its end", low=0, compared=False
    )
    checkpoint_epochs: int = option(
        1, "epochs between checkpoints; the last epoch is always saved", low=1, compared=False
    )
    masks_every: int = option(
        5, "epochs between pictures of the soft masks in TensorBoard; 0 is never", low=0, compared=False
    )
    histograms: bool = option(False, "histograms of the weights in TensorBoard, each epoch", compared=False)
    projector: bool = option(
        False,
        "features of up to 2,000 test images on TensorBoard's page PROJECTOR, at the end",
        compared=False,
        movable=True,
    )
    mistakes: int = option(
        0,
        "most confidently wrong test images that TensorBoard shows at the end; 0 is none",
        low=0,
        high=100,
        compared=False,
        movable=True,
    )
    profile: str = option(
        "",
        "N-M: trace these training steps, counted from 1, for TensorBoard's page PROFILE (which needs the package "
        "tensorboard-plugin-profile)",
        check=parse_steps,
        compared=False,
        movable=True,
    )

    def __post_init__(self):
        for item in dataclasses.fields(self):
            _check(item, getattr(self, item.name))
        self._resolve_defaults()
        self._check_optimizer()
        self._check_length()
        self._check_pictures()

    def _resolve_defaults(self):
        """Replace the values that stand for the optimizer's defaults."""
        row = OPTIMIZERS[self.optimizer]
        if not self.learning_rate:
            object.__setattr__(self, "learning_rate", row.rate)  # the class is frozen for all others
        if self.weight_decay_kind == "auto":
            object.__setattr__(self, "weight_decay_kind", "l2" if row.l2 else "decoupled")

    def _check_optimizer(self):
        if not OPTIMIZERS[self.optimizer].l2 and self.weight_decay_kind == "l2":
            raise InputError(
                f"optimizer={self.optimizer} decouples its weight decay: give --weight-decay-kind decoupled"
            )
        if self.accumulate > 1 and self.distribute == "mirrored":
            raise InputError(
                f"accumulate={self.accumulate} cannot be combined with distribute=mirrored, whose replicas cannot "
                "update weights conditionally: give a larger --batch-size"
            )
        if self.mix_until < 1 and self.mix == "none":
            raise InputError(f"mix_until={self.mix_until:g} needs --mix mixup or cutmix, received mix=none")

    def _check_length(self):
        """Refuse schedules, limits and validation that exclude each other."""
        if self.warmup_epochs and self.schedule not in ("cosine", "linear"):
            raise InputError(
                f"warmup_epochs={self.warmup_epochs:g} needs schedule=cosine or linear, received "
                f"schedule={self.schedule}: give --warmup-epochs 0"
            )
        if self.schedule in ("cosine", "linear") and self.warmup_epochs >= self.epochs:
            raise InputError(f"warmup_epochs must be less than epochs={self.epochs}, received {self.warmup_epochs:g}")
        if self.freeze and not self.weights:
            raise InputError("freeze keeps weights that are already trained: give --weights, too")
        if not self.validation_split and (self.schedule == "plateau" or self.patience):
            raise InputError(
                "schedule=plateau and patience watch the validation loss: give a --validation-split above 0"
            )

    def _check_pictures(self):
        """Refuse options that this kind of data set does not have."""
        if not is_streamed(self.dataset):
            for item in dataclasses.fields(self):
                if item.metadata["streamed_only"] and getattr(self, item.name) != item.default:
                    raise InputError(f"{item.name} is for folder, shards or tfds:NAME, received dataset={self.dataset}")
            if AUGMENTATIONS[self.augmentation].random_crops:
                raise InputError(
                    f"augmentation={self.augmentation} cuts its crops from whole pictures: give --dataset folder, "
                    f"shards or tfds:NAME, received dataset={self.dataset}"
                )
        elif self.data_on_device or self.alternate_flip:
            name = "data_on_device" if self.data_on_device else "alternate_flip"
            raise InputError(f"{name} is for images held in memory; dataset={self.dataset} is streamed")
        if self.alternate_flip and (not self.flip or self.augmentation == "none"):
            raise InputError(
                "alternate_flip says how to flip: give --flip true and --augmentation affine or crop, received "
                f"flip={str(self.flip).lower()}, augmentation={self.augmentation}"
            )
        if self.shards_at_once and self.dataset != "shards":
            raise InputError(f"shards_at_once is for dataset=shards, received dataset={self.dataset}")

    @property
    def flips(self):
        """Whether images are mirrored: only if a mirror image belongs to the same class."""
        return self.flip and find_dataset(self.dataset).mirrored

    @property
    def random_crops(self):
        """Whether decoding cuts random parts out of the training pictures."""
        return AUGMENTATIONS[self.augmentation].random_crops

    def to_json(self):
        """Return the recipe as JSON text, one field per line."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text):
        """Return the recipe that `to_json` wrote.

        Raises:
            InputError: not a JSON object, an unknown field, or a value out of its range.
        """
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"the recipe is not valid JSON: {error}") from None
        if not isinstance(values, dict):
            raise InputError(f"the recipe must be a JSON object, received {type(values).__name__}")
        unknown = sorted(set(values) - {item.name for item in dataclasses.fields(cls)})
        if unknown:
            raise InputError(f"the recipe has unknown fields: {', '.join(unknown):.200}")
        return cls(**{**values_before(), **values})


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


def make_recipe(base, given):
    """Return a recipe of common values and of those that the user gave, which take precedence.

    A warm-up that the user did not give is left out if the schedule has none, and shortened to half of the run if the
    run is not longer than it. One that the user gave is never changed.

    Args:
        base: dictionary of fields, such as a named recipe; other fields have their defaults.
        given: dictionary of fields that the user gave.

    Raises:
        InputError: a value outside its choices or range, or values that exclude each other.
    """
    values = {**base, **given}
    if "warmup_epochs" not in given:
        chosen = {name: values.get(name, Recipe.__dataclass_fields__[name].default) for name in _WARMUP_FIELDS}
        warmup, epochs, schedule = chosen.values()
        if schedule in SCHEDULES_WITHOUT_WARMUP and "schedule" in given:
            values["warmup_epochs"] = 0.0
        elif type(epochs) is int and warmup >= epochs > 0 and schedule not in SCHEDULES_WITHOUT_WARMUP:
            values["warmup_epochs"] = epochs / 2
    return Recipe(**values)


def values_before():
    """Return the value of each field in recipes that were written before the field existed."""
    return {item.name: item.metadata["before"] for item in dataclasses.fields(Recipe)}


def compared_fields():
    """Return the names of the fields that determine what was trained, not only where and how it was computed."""
    return [item.name for item in dataclasses.fields(Recipe) if item.metadata["compared"]]


def movable_fields():
    """Return the names of the fields that a resumed run may change: places and threads, not the training."""
    return [item.name for item in dataclasses.fields(Recipe) if item.metadata["movable"]]

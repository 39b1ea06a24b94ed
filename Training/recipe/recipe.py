"""The recipe of a run: all hyper-parameters, with their help texts and ranges."""

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
SCHEDULES_WITHOUT_WARMUP = ("step", "constant", "plateau")


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
        text: help text, or a function that returns it if it depends on a table that can be extended.
        choices: valid values.
        low, high: smallest and largest valid value.
        check: function that raises `ValueError` for an invalid value.
        compared: bool, whether a different value means different training. False for fields that only say where and
            how a run is computed or written.
        streamed_only: bool, whether the field is only for streamed pictures.
        movable: bool, whether a resumed run may change it.
        before: value for recipes that were written before the field existed, so that such runs resume as they began;
            None for the default value.
    """
    limits = {"choices": choices, "low": low, "high": high, "check": check}
    roles = {"compared": compared, "streamed_only": streamed_only, "movable": movable}
    roles["before"] = default if before is None else before
    return field(default=default, metadata={"help": text, **limits, **roles})


def parse_shares(text):
    """Return the numbers in a text such as "0.4,0.6".

    Raises:
        ValueError: they are not increasing numbers between 0 and 1.
    """
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = [math.nan]
    if not all(a < b for a, b in zip([0, *values], [*values, 1])):
        raise ValueError(f"must be increasing shares between 0 and 1, such as 0.4,0.6, received {text!r:.80}")
    return values


def parse_steps(text):
    """Return the first and the last step in a text such as "10-20", or None for "".

    Raises:
        ValueError: they are not two whole numbers, the first at least 1, the second not below the first.
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
    """All hyper-parameters of a training run. Flags, `--help` and `recipe.json` are generated from this class.

    Raises:
        InputError: a value is outside its choices or range, or two values exclude each other.
    """

    # What is trained
    dataset: str = option("cifar10", describe_datasets, check=find_dataset)
    data_dir: str = option(
        "",
        "cifar10, cifar100: folder with the official archive or its unpacked folder; folder: folder with "
        "train/<class>/; shards: folder with the shards; tfds: folder of prepared data sets",
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
        "streamed pictures: folder in which decoded pictures are kept, size * size * 3 bytes each",
        compared=False,
        streamed_only=True,
        movable=True,
    )
    workers: int = option(
        0,
        "streamed pictures: number of decoding threads; 0 is one per core, but at least 2",
        low=0,
        high=1024,
        compared=False,
        streamed_only=True,
        movable=True,
    )
    shards_at_once: int = option(
        0, "shards: number of shards that are shuffled together, so that reading stays sequential; 0 is all", low=0
    )
    mean: str = option(
        "auto",
        "mean to subtract: pixel, the mean image; channel, mean and deviation of each channel over 256 images; "
        "imagenet, those of ImageNet; auto is channel for streamed pictures, otherwise pixel",
        choices=("auto", "pixel", "channel", "imagenet"),
    )
    samples: int = option(0, "limit of training images, with the same fraction of each class; 0 is no limit", low=0)
    eval_samples: int = option(
        0, "limit of validation images and of test images, with the same fraction of each class; 0 is no limit", low=0
    )
    validation_split: float = option(
        0.1, "fraction of the training set held out for validation, stratified", low=0.0, high=0.9
    )
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
    dropout: float = option(0.2, "fraction of the features that is dropped before the classifier", low=0.0, high=0.99)
    classifier_l2: float = option(1e-4, "L2 penalty on the classifier's kernel", low=0.0, high=1.0)
    weights: str = option(
        "",
        "weights to start from: those that come with the project (such as cifar10, or attention_56-cifar10 with "
        "another network in --model), a run's folder or a .keras file; the classifier is new if the number of classes "
        "differs",
    )
    freeze: str = option("", "stem, stage_1, ... or the name of a layer: the layers up to it keep their weights")
    # How it is trained
    epochs: int = option(200, "passes over the training set", low=1, high=100_000)
    minutes: float = option(
        0.0,
        "train as many epochs as fit into these minutes, decided after the first epoch; the schedule of the learning "
        "rate is then stretched or shortened to them; 0 is no limit",
        low=0.0,
        high=1e6,
    )
    batch_size: int = option(64, "images per step", low=1, high=65_536)
    optimizer: str = option("sgd", "optimizer; sgd has Nesterov momentum", choices=OPTIMIZERS)
    learning_rate: float = option(0.0, describe_optimizers, low=0.0, high=100.0)
    momentum: float = option(0.9, "sgd: momentum", low=0.0, high=0.9999)
    accumulate: int = option(
        1, "number of steps over which gradients are averaged before each update", low=1, high=10_000
    )
    clip_norm: float = option(
        0.0, "global norm to which larger gradients are scaled down; 0 is no clipping", low=0.0, high=1e6
    )
    schedule: str = option(
        "cosine",
        "learning rate: step divides by 10 at the fractions step_at of the run, cosine and linear fall to 0, plateau "
        "divides by 10 after 10 epochs without a lower validation loss",
        choices=("step", "cosine", "linear", "constant", "plateau"),
    )
    step_at: str = option(
        "0.4,0.6", "schedule step: increasing fractions of the run, between 0 and 1", check=parse_shares
    )
    warmup_epochs: float = option(
        5.0, "epochs of linear warm-up from 0; only with cosine and linear", low=0.0, high=1000.0
    )
    weight_decay: float = option(1e-4, "weight decay", low=0.0, high=10.0)
    weight_decay_kind: str = option(
        "auto",
        "l2 adds decay * weight to the gradient (the paper's); decoupled shrinks weights by rate * decay a step; auto "
        f"is decoupled for {', '.join(name for name, row in OPTIMIZERS.items() if not row.l2)}, otherwise l2",
        choices=("auto", "l2", "decoupled"),
    )
    decay_all: bool = option(True, "also decay batch normalization and biases, as in the paper")
    class_weights: str = option(
        "none",
        "balanced weights the loss of each image by the inverse frequency of its class, with a mean of 1",
        choices=("none", "balanced"),
    )
    label_smoothing: float = option(
        0.0, "fraction of each label that is spread evenly over all classes", low=0.0, high=0.99
    )
    label_noise: float = option(
        0.0,
        "fraction of the training labels that is replaced by another class, as in the paper's table 5",
        low=0.0,
        high=1.0,
    )
    ema: float = option(
        0.0,
        "decay per step of an exponential moving average of the weights, which the run keeps at its end; 0 is none",
        low=0.0,
        high=0.99999,
    )
    augmentation: str = option("affine", describe_augmentations, choices=AUGMENTATIONS)
    rotation: float = option(15.0, "affine: largest rotation, in degrees", low=0.0, high=180.0)
    shift: float = option(0.1, "affine: largest shift, as a fraction of height and width", low=0.0, high=1.0)
    flip: bool = option(True, "flip half of the images left to right; never done to digits")
    alternate_flip: bool = option(
        False, "flip each image in every second epoch, half of them in each, instead of at random"
    )
    cutout: int = option(0, "side in pixels of a square that is blanked in each image; 0 is none", low=0, high=1024)
    mix: str = option(
        "none", "mix each image and its label with another: whole images (mixup) or windows (cutmix), with a uniformly "
        "drawn fraction", choices=("none", "mixup", "cutmix"),
    )  # fmt: skip
    mix_until: float = option(1.0, "fraction of the epochs after which images are no longer mixed", low=0.0, high=1.0)
    test_flip: bool = option(
        False, "also report the test error with each image's and its mirror image's probabilities averaged",
        compared=False,
    )  # fmt: skip
    statistics_share: float = option(
        0.05,
        "fraction of the training images (between one batch and 10,000), augmented as in training, over which "
        "normalization statistics are recomputed before each validation and at the end; with --ema, the averaged "
        "weights are then validated; 0 keeps the moving statistics",
        low=0.0,
        high=1.0,
        before=0.0,
    )
    patience: int = option(
        0, "stop after this many epochs without a lower validation loss; 0 is never", low=0, high=100_000
    )
    seed: int = option(0, "seed of weights, order of images and augmentation", low=0, high=2**31 - 1, compared=False)
    # How it is computed
    precision: str = option(
        "float32",
        "arithmetic; auto is mixed_bfloat16 if the GPU or, on TensorFlow, the processor is faster with it, "
        "otherwise float32; recipe.json records the choice",
        choices=("float32", "mixed_bfloat16", "mixed_float16", "auto"),
    )
    jit: bool = option(False, "compile the training step with XLA (JAX always does)", compared=False)
    compile_cache: str = option(
        "",
        "folder in which XLA's compiled code is kept for later runs: on JAX, and on TensorFlow with --jit",
        compared=False,
        movable=True,
    )
    steps_per_execution: int = option(
        1, "training steps in one call of the compiled function", low=1, high=10_000, compared=False
    )
    distribute: str = option(
        "none",
        "split each batch over all devices: mirrored on TensorFlow (one machine), data on JAX (one or many)",
        choices=("none", "mirrored", "data"),
        compared=False,
    )
    data_on_device: bool = option(
        False, "keep all images on the device as bytes, and send only indices in each step", compared=False
    )
    # What is written
    logs: str = option("Logs", "folder in which the run's folder is created", compared=False, movable=True)
    checkpoint_steps: int = option(
        0, "steps between checkpoints within an epoch; 0 saves only at the end of epochs", low=0, compared=False
    )
    checkpoint_epochs: int = option(
        1, "epochs between checkpoints; the last epoch is always saved", low=1, compared=False
    )
    masks_every: int = option(
        5, "epochs between pictures of the soft masks in TensorBoard; 0 is never", low=0, compared=False
    )
    histograms: bool = option(False, "write histograms of the weights for TensorBoard in each epoch", compared=False)
    projector: bool = option(
        False,
        "write the features of up to 2,000 test images for TensorBoard's PROJECTOR page at the end",
        compared=False,
        movable=True,
    )
    mistakes: int = option(
        0,
        "number of most confidently wrong test images that TensorBoard shows at the end; 0 is none",
        low=0,
        high=100,
        compared=False,
        movable=True,
    )
    profile: str = option(
        "",
        "N-M: trace these training steps, counted from 1, for TensorBoard's PROFILE page (which needs the package "
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
        """Replace the values that mean the optimizer's defaults."""
        row = OPTIMIZERS[self.optimizer]
        if not self.learning_rate:
            object.__setattr__(self, "learning_rate", row.rate)  # the class is frozen
        if self.weight_decay_kind == "auto":
            object.__setattr__(self, "weight_decay_kind", "l2" if row.l2 else "decoupled")

    def _check_optimizer(self):
        if not OPTIMIZERS[self.optimizer].l2 and self.weight_decay_kind == "l2":
            raise InputError(
                f"optimizer={self.optimizer} is defined with decoupled weight decay: give --weight-decay-kind decoupled"
            )
        if self.accumulate > 1 and self.distribute == "mirrored":
            raise InputError(
                f"accumulate={self.accumulate} cannot be combined with distribute=mirrored, whose replicas cannot "
                "update weights conditionally: give a larger --batch-size"
            )
        if self.mix_until < 1 and self.mix == "none":
            raise InputError(f"mix_until={self.mix_until:g} needs --mix mixup or cutmix, received mix=none")

    def _check_length(self):
        """Refuse combinations of schedule, epochs and validation that are impossible."""
        if self.warmup_epochs and self.schedule not in ("cosine", "linear"):
            raise InputError(
                f"warmup_epochs={self.warmup_epochs:g} needs schedule=cosine or linear, received "
                f"schedule={self.schedule}: give --warmup-epochs 0"
            )
        if self.schedule in ("cosine", "linear") and self.warmup_epochs >= self.epochs:
            raise InputError(f"warmup_epochs must be less than epochs={self.epochs}, received {self.warmup_epochs:g}")
        if self.minutes and self.epochs < 2 and self.schedule in ("cosine", "linear", "step"):
            raise InputError(
                f"minutes={self.minutes:g} stretches the schedule of the run, which needs epochs=2 or more, received "
                f"epochs={self.epochs}"
            )
        if self.freeze and not self.weights:
            raise InputError("freeze keeps weights that are already trained: also give --weights")
        if not self.validation_split and (self.schedule == "plateau" or self.patience):
            raise InputError("schedule=plateau and patience need a validation loss: give a --validation-split above 0")

    def _check_pictures(self):
        """Refuse options that do not apply to this kind of data set."""
        if not is_streamed(self.dataset):
            for item in dataclasses.fields(self):
                if item.metadata["streamed_only"] and getattr(self, item.name) != item.default:
                    raise InputError(f"{item.name} is for folder, shards or tfds:NAME, received dataset={self.dataset}")
            if AUGMENTATIONS[self.augmentation].random_crops:
                raise InputError(
                    f"augmentation={self.augmentation} cuts random crops from whole pictures: give --dataset folder, "
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
        if self.broken == "refuse" and self.dataset != "folder":
            raise InputError(f"broken=refuse is for dataset=folder, received dataset={self.dataset}")
        if self.shards_at_once and self.dataset != "shards":
            raise InputError(f"shards_at_once is for dataset=shards, received dataset={self.dataset}")

    @property
    def flips(self):
        """Whether images are mirrored: only if a mirror image belongs to the same class."""
        return self.flip and find_dataset(self.dataset).mirrored

    @property
    def random_crops(self):
        """Whether random crops are cut from the training pictures during decoding."""
        return AUGMENTATIONS[self.augmentation].random_crops

    def to_json(self):
        """Return the recipe as JSON text, one field per line."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text):
        """Return the recipe that `to_json` wrote.

        Raises:
            InputError: the text is not a JSON object, or has an unknown field or a value out of its range.
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
    """Raise `InputError` if a value has the wrong type, or is outside its choices or its range."""
    expected, limits = item.type, item.metadata
    shown = f"{value!r:.80}"
    if expected is float and type(value) is int and abs(value) < 2**53:
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
    """Return a recipe with the values of a base and with those that the user gave, which take precedence.

    A warm-up that the user did not give is left out if the schedule has none, and shortened to half of the run if the
    run is not longer than the warm-up. One that the user gave is never changed.

    Args:
        base: dictionary of fields, such as a named recipe; other fields have their defaults.
        given: dictionary of fields that the user gave.

    Raises:
        InputError: a value is outside its choices or range, or two values exclude each other.
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
    """Return the names of the fields that determine what is trained, not only where and how it is computed."""
    return [item.name for item in dataclasses.fields(Recipe) if item.metadata["compared"]]


def movable_fields():
    """Return the names of the fields that a resumed run may change, such as folders and numbers of threads."""
    return [item.name for item in dataclasses.fields(Recipe) if item.metadata["movable"]]

"""Published test errors to compare runs with."""

from typing import NamedTuple

SOURCES = {
    "paper": "Wang et al. 2017, arXiv 1704.06904, tables 1, 3, 4, 5 and 6",
    "reference": "https://github.com/Jay4869/Deep-Learning, re-implementation in TensorFlow 2.0, compact network, P100",
}


class Published(NamedTuple):
    """A test error in per cent and the settings for which it was reported, named as in `recipe.Recipe`."""

    source: str
    error: float
    model: str
    learning: str = "arl"
    dataset: str = "cifar10"
    attention: str = "mixed"
    mask: str = "encoder_decoder"
    label_noise: float = 0.0


PUBLISHED = (
    *(
        Published("paper", error, f"attention_{depth}", learning)
        for depth, errors in {56: (5.52, 5.89), 92: (4.99, 5.35), 128: (4.44, 5.57), 164: (4.31, 7.18)}.items()
        for learning, error in zip(("arl", "nal"), errors)
    ),
    Published("paper", 6.24, "attention_56", attention="channel"),
    Published("paper", 6.33, "attention_56", attention="spatial"),
    Published("paper", 6.48, "attention_56", mask="local"),
    Published("paper", 4.14, "attention_236"),
    Published("paper", 3.90, "attention_452"),
    Published("paper", 21.71, "attention_92", dataset="cifar100"),
    Published("paper", 21.16, "attention_236", dataset="cifar100"),
    Published("paper", 20.45, "attention_452", dataset="cifar100"),
    Published("paper", 5.15, "attention_92", label_noise=0.1),
    Published("paper", 5.79, "attention_92", label_noise=0.3),
    Published("paper", 7.27, "attention_92", label_noise=0.5),
    Published("paper", 15.75, "attention_92", label_noise=0.7),
    Published("reference", 5.28, "attention_56"),
    Published("reference", 9.03, "attention_56", "nal"),
    Published("reference", 36.2, "attention_92"),
    Published("reference", 40.05, "attention_92", "nal"),
)


class PublishedCost(NamedTuple):
    """Final errors in per cent on the training and the validation images, and the training time."""

    source: str
    model: str
    train_error: float
    validation_error: float
    minutes: int


COSTS = (
    PublishedCost("reference", "attention_56", 3.27, 5.28, 337),
    PublishedCost("reference", "attention_92", 36.1, 33.19, 403),
)


def find_published_cost(model):
    """Return the published errors and training time of a network, or None."""
    return next((each for each in COSTS if each.model == model), None)


def find_published(recipe):
    """Return all published errors for a recipe's network, data and label noise.

    Args:
        recipe: dictionary as in `recipe.json`.
    """
    wanted = [name for name in Published._fields if name not in ("source", "error")]
    return [each for each in PUBLISHED if all(getattr(each, name) == recipe.get(name) for name in wanted)]

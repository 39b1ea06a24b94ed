"""The recipe of a run: all hyper-parameters, their choices, and the named recipes."""

from Training.recipe.choices import AUGMENTATIONS, DATASETS, OPTIMIZERS, dataset_names, find_dataset, is_streamed
from Training.recipe.label import label_run
from Training.recipe.named import RECIPES
from Training.recipe.recipe import (
    Recipe,
    compared_fields,
    make_recipe,
    movable_fields,
    parse_shares,
    parse_steps,
    values_before,
)

__all__ = [
    "AUGMENTATIONS",
    "DATASETS",
    "OPTIMIZERS",
    "RECIPES",
    "Recipe",
    "compared_fields",
    "dataset_names",
    "find_dataset",
    "is_streamed",
    "label_run",
    "make_recipe",
    "movable_fields",
    "parse_shares",
    "parse_steps",
    "values_before",
]

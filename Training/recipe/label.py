"""Makes short names of runs: network, learning, data set, and differences from the nearest named recipe."""

import re

from Training.recipe.named import RECIPES
from Training.recipe.recipe import Recipe, compared_fields

ALWAYS = ("model", "learning", "dataset")  # fields in every label
MOST_NAMED = 4  # differences shown in a label
LONGEST = 100  # characters


def find_differences(recipe):
    """Return the named recipe that is nearest to a recipe, and the differences from it.

    Returns:
        `(name, {field: value})`, the name "" for the defaults. Only fields that determine what is trained are compared,
        without network, learning and data set.
    """
    fields = [name for name in compared_fields() if name not in ALWAYS]
    found = {}
    for name, values in {"": {}, **RECIPES}.items():
        base = Recipe(**values)
        changed = [field for field in fields if getattr(recipe, field) != getattr(base, field)]
        found[name] = {field: getattr(recipe, field) for field in changed}
    nearest = min(found, key=lambda name: len(found[name]) + bool(name))
    return nearest, found[nearest]


def label_run(recipe):
    """Return a short name for a run of a recipe, such as "attention_56-arl-digits-quick-epochs=3".

    It is part of the name of the run's folder: only letters, digits and `._=,-`.
    """
    name, different = find_differences(recipe)
    shown = [f"{field}={_format(value)}" for field, value in different.items()]
    if len(shown) > MOST_NAMED:
        shown = [*shown[:MOST_NAMED], f"{len(shown) - MOST_NAMED}_more"]
    label = "-".join(filter(None, (recipe.model, recipe.learning, recipe.dataset, name, *shown)))
    return re.sub(r"[^\w.=,-]", "_", label, flags=re.ASCII)[:LONGEST]


def _format(value):
    return f"{value:g}" if isinstance(value, float) else str(value).lower()

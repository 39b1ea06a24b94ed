"""Adding an augmentation, an optimizer or a data set takes one row and one piece of code each."""

import keras
import numpy as np
import pytest

from tests.support.tiny import tiny_build
from Training.data import datasets
from Training.engine.augmentation import Augmentation
from Training.engine.fit import compile_model, fit
from Training.flags import parse
from Training.recipe import Recipe, choices

# The pieces of code. A row names each as `module:name`.


class Invert(Augmentation):
    def augment(self, images):
        return 255.0 - images


class SignDescent(keras.optimizers.Optimizer):
    def update_step(self, gradient, variable, learning_rate):
        sign = keras.ops.cast(keras.ops.sign(gradient), variable.dtype)
        self.assign_sub(variable, sign * keras.ops.cast(learning_rate, variable.dtype))


def read_stripes(name, data_dir):
    labels = np.arange(96, dtype="int32") % 2
    stripes = np.where(np.arange(32)[None, :, None] % 2 == labels[:, None, None], 255, 0).astype("uint8")
    images = np.broadcast_to(stripes[..., None], (96, 32, 32, 3)).copy()
    return images[:64], labels[:64], images[64:], labels[64:], ("even", "odd")


ROWS = {
    "augmentation": ("inverted", choices.AUGMENTATIONS, choices.Augmentation("negative", f"{__name__}:Invert")),
    "optimizer": ("sign_descent", choices.OPTIMIZERS, choices.Optimizer(f"{__name__}:SignDescent", 0.003)),
    "dataset": ("stripes", choices.DATASETS, choices.Dataset(f"{__name__}:read_stripes")),
}


@pytest.mark.parametrize(
    "field",
    ["dataset", *(pytest.param(name, marks=pytest.mark.backends) for name in ("augmentation", "optimizer"))],
)
def test_an_addition_needs_one_row_and_one_piece_of_code(field, monkeypatch, capsys, tmp_path):
    name, table, row = ROWS[field]
    with pytest.raises(SystemExit):
        parse([f"--{field}", name], "")
    monkeypatch.setitem(table, name, row)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        parse(["--help"], "")
    assert stop.value.code == 0 and name in capsys.readouterr().out
    arguments = [
        "--dataset=digits",
        "--samples=32",
        "--batch-size=16",
        "--epochs=1",
        "--warmup-epochs=0",
        f"--{field}={name}",
    ]
    recipe = parse(arguments, "")[0]
    assert Recipe.from_json(recipe.to_json()) == recipe and getattr(recipe, field) == name
    data = datasets.load(recipe.dataset, samples=recipe.samples)
    network = tiny_build(recipe, data)
    before = network.get_weights()
    fit(network, data, recipe, tmp_path)
    assert any(not np.array_equal(a, b) for a, b in zip(before, network.get_weights()))


@pytest.mark.backends
def test_added_layer_and_optimizer_are_used(monkeypatch):
    for name, table, row in ROWS.values():
        monkeypatch.setitem(table, name, row)
    recipe = Recipe(augmentation="inverted", optimizer="sign_descent", dataset="stripes", batch_size=8)
    assert recipe.learning_rate == 0.003
    data = datasets.load("stripes")
    model = compile_model(tiny_build(recipe, data), recipe, 8)
    assert isinstance(model.get_layer("augmentation"), Invert)
    assert isinstance(model.optimizer, SignDescent)
    assert data.classes == ("even", "odd")

"""All layers behave like Keras' own layers, and do not depend on the user's configuration of Keras."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import ops

import Model
from Module import (
    AttentionBlock,
    BatchNormalization,
    BilinearUpsampling,
    Branches,
    Dropout,
    InceptionUnit,
    ResidualUnit,
    ResNeXtUnit,
)
from Module.attention_block import attend
from Module.convolution import Conv2D
from Module.pooling import MaxPooling2D
from tests.support.keras_layers import check_layer
from tests.support.tiny import tiny_network
from Training.engine.augmentation import Cutout, Mix, RandomAffine, RandomCrop, RandomLighting

ROOT = Path(__file__).parent.parent

LAYERS = {
    "ResidualUnit": (lambda **given: ResidualUnit(8, 2, **given), (6, 6, 4)),
    "ResNeXtUnit": (lambda **given: ResNeXtUnit(64, **given), (4, 4, 64)),
    "InceptionUnit": (lambda **given: InceptionUnit(64, **given), (4, 4, 64)),
    "AttentionBlock": (lambda **given: AttentionBlock(8, mask_depth=1, **given), (4, 4, 8)),
    "Branches": (lambda **given: Branches(AttentionBlock(8, mask_depth=1), **given), (4, 4, 8)),
    "BatchNormalization": (lambda **given: BatchNormalization(-1, 0.8, 1e-4, **given), (4, 4, 3)),
    "BilinearUpsampling": (lambda **given: BilinearUpsampling(5, 6, **given), (3, 2, 4)),
    "Dropout": (lambda **given: Dropout(0.5, **given), (4, 4, 3)),
    "Conv2D": (lambda **given: Conv2D(4, 1, **given), (4, 4, 3)),
    "MaxPooling2D": (lambda **given: MaxPooling2D(3, 2, "same", **given), (5, 4, 3)),
    "RandomAffine": (lambda **given: RandomAffine(10.0, 0.1, True, 3, **given), (6, 6, 3)),
    "RandomCrop": (lambda **given: RandomCrop(2, True, 3, **given), (6, 6, 3)),
    "RandomLighting": (lambda **given: RandomLighting(True, 3, **given), (6, 6, 3)),
    "Cutout": (lambda **given: Cutout(2, 1.0, 3, **given), (6, 6, 3)),
    "mixup": (lambda **given: Mix("mixup", 3, **given), (6, 6, 3)),
    "cutmix": (lambda **given: Mix("cutmix", 3, **given), (6, 6, 3)),
}


@pytest.mark.backends
@pytest.mark.parametrize("name", LAYERS)
def test_layer_behaves_like_a_keras_layer(name, tmp_path):
    check_layer(*LAYERS[name], tmp_path)


def test_every_registered_layer_is_checked():
    registered = {
        key.split(">")[1] for key in keras.saving.get_custom_objects() if key.startswith("ResidualAttention>")
    }
    layers = {
        name
        for name in registered
        if issubclass(keras.saving.get_registered_object(f"ResidualAttention>{name}"), keras.layers.Layer)
    }
    checked = {type(make()).__name__ for make, _ in LAYERS.values()}
    assert layers - {"TrainingModel"} == checked


@pytest.mark.backends
@pytest.mark.parametrize(
    "given", [{"renorm": True}, {"axis": 1}, {"center": False}, {"scale": False}, {"mask": True}], ids=str
)
def test_normalization_does_what_its_arguments_say(given):
    """This includes arguments that the fused operation does not support."""
    x = np.random.default_rng(0).normal(3, 2, (4, 5, 6, 7)).astype("float32")
    mask = {"mask": ops.convert_to_tensor(np.arange(120).reshape(4, 5, 6) % 3 > 0)} if "mask" in given else {}
    given = {name: value for name, value in given.items() if name != "mask"}
    ours = BatchNormalization(**given)
    theirs = keras.layers.BatchNormalization(**{"momentum": 0.9, "epsilon": 1e-5, **given})
    for _ in range(2):
        outputs = [ops.convert_to_numpy(layer(x, training=True, **mask)) for layer in (ours, theirs)]
        np.testing.assert_allclose(*outputs, rtol=1e-4, atol=1e-4)
    for a, b in zip(ours.weights, theirs.weights, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.backends
def test_dropout_and_pooling_do_what_their_arguments_say():
    dropped = ops.convert_to_numpy(
        Dropout(0.5, noise_shape=(None, 1, 1, 8), seed=1)(np.ones((4, 3, 3, 8)), training=True)
    )
    assert (dropped == dropped[:, :1, :1]).all() and 0 < (dropped == 0).mean() < 1
    assert not ops.convert_to_numpy(Dropout(1.0)(np.ones((2, 3)), training=True)).any()
    if keras.backend.backend() == "jax":  # TensorFlow does not support this format on a CPU
        x = np.random.default_rng(0).normal(size=(2, 3, 6, 4)).astype("float32")
        both = [kind(2, data_format="channels_first")(x) for kind in (MaxPooling2D, keras.layers.MaxPooling2D)]
        np.testing.assert_array_equal(*both)


@pytest.mark.parametrize("name", ["all", None, "Mixed"])
def test_unknown_attention_is_refused(name):
    with pytest.raises(ValueError, match="attention must be one of mixed, channel, spatial, received"):
        attend(ops.ones((1, 2, 2, 3)), name)


def list_parameters(function, *left_out):
    """Return the names in a function's signature; `kwargs` among them shows that arguments are only passed on."""
    return [name for name in inspect.signature(function).parameters if name not in left_out]


def test_builders_show_their_arguments():
    whole = list_parameters(Model.residual_attention_network, "depth")
    own = list_parameters(Model.attention_56, "weights", "include_top")
    assert own == list_parameters(Model.attention_92, "weights", "include_top") == whole
    assert list_parameters(Model.network, "name", "weights", "include_top") == list_parameters(
        Model.residual_attention_network, "depth", "name", "unit"
    )
    assert {"network", "attention_56"} <= set(dir(Model))
    model = Model.network("attention_56", "paper", "nal", attention="spatial", classes=3)
    block = next(layer for layer in model.layers if isinstance(layer, AttentionBlock))
    assert (model.name, model.output_shape, block.learning, block.attention) == (
        "attention_56",
        (None, 3),
        "nal",
        "spatial",
    )


def run_python(*arguments, **environment):
    """Run Python with JAX, which starts in half the time of TensorFlow, and return the finished process."""
    environment = {**os.environ, "KERAS_BACKEND": "jax", **environment}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("order", ["import keras; import Model", "import Model; import keras"])
def test_import_of_model_registers_the_layers(order, tmp_path):
    path = tmp_path / "best.keras"
    tiny_network().save(path)
    done = run_python("-c", f"{order}; print(keras.models.load_model({str(path)!r}).name)")
    assert done.stdout.strip() == "tiny", done.stderr


def test_import_of_model_starts_no_framework():
    names = "{'keras', 'tensorflow', 'jax'} & set(sys.modules)"
    done = run_python("-c", f"import sys, Model; print(Model.Stage.__name__, *({names}))")
    assert done.stdout == "Stage\n", done.stderr


CONFIGURED = """
import keras, numpy as np
assert keras.config.image_data_format() == "channels_first"
from tests.support.tiny import tiny_network
from Model.count import count
model = tiny_network(attention="spatial")
assert model.output_shape == (None, 10)
assert model.predict(np.zeros((2, 32, 32, 3), "uint8"), verbose=0).shape == (2, 10)
print(count(model))
"""


def configure(folder, **values):
    (folder / "keras.json").write_text(json.dumps({"epsilon": 1e-7, **values}))
    return {"KERAS_HOME": str(folder)}


def test_networks_do_not_depend_on_the_configured_data_format(tmp_path):
    done = run_python("-c", CONFIGURED, **configure(tmp_path, image_data_format="channels_first"))
    from Model.count import count

    assert done.stdout.strip() == str(count(tiny_network(attention="spatial"))), done.stderr


@pytest.mark.parametrize("floatx", ["float16", "float64"])
def test_another_floatx_is_refused_by_the_builders_and_set_by_the_commands(floatx, monkeypatch):
    monkeypatch.setenv("KERAS_HOME", "/somewhere")
    keras.config.set_floatx(floatx)
    try:
        with pytest.raises(ValueError, match=f"floatx must be float32, received {floatx}: .*/somewhere/keras.json"):
            tiny_network()
    finally:
        keras.config.set_floatx("float32")


def test_command_does_not_depend_on_the_configuration(tmp_path):
    values = configure(tmp_path, image_data_format="channels_first", floatx="float16", epsilon=0.1)
    done = run_python("-m", "Model", "attention_56", "--json", **values)
    from Model.count import count

    assert json.loads(done.stdout) == count(Model.attention_56()), done.stderr

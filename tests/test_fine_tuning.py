"""Starting from the weights of another run, and freezing layers."""

import json

import keras
import numpy as np
import pytest

import training_cifar10
from Model.preprocessing import mean_subtraction
from tests.support import tiny
from Training.engine.fine_tuning import freeze, load_weights
from Training.errors import InputError
from Training.recipe import Recipe

pytestmark = pytest.mark.backends
ARGUMENTS = ["--dataset=digits", "--samples=32", "--batch-size=16", "--epochs=1", "--warmup-epochs=0",
             "--masks-every=0", "--learning-rate=0.1", "--schedule=constant"]  # fmt: skip


def network(classes=10, size=32, mean=0.0, **kwargs):
    shape = (size, size, 3)
    return tiny.tiny_network(
        classes=classes, input_shape=shape, preprocessing=mean_subtraction(np.full(shape, mean, "float32")), **kwargs
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A network of 5 classes for images of 24 pixels, saved, and its weights."""
    path = tmp_path_factory.mktemp("saved") / "last.keras"
    made = network(classes=5, size=24, mean=100.0)
    made.save(path)
    return path, {layer.name: layer.get_weights() for layer in made.layers if layer.weights}


def test_other_classes_and_image_size_keep_all_layers_except_the_classifier(saved):
    path, weights = saved
    made = network(classes=7, size=32)
    before = made.get_layer("logits").get_weights()
    line = load_weights(made, str(path))
    assert line.endswith("the classifier is new, for 7 classes instead of 5") and "\n" not in line
    assert line.startswith(f"{len(weights) - 1} of {len(weights)} layers")
    for name, values in weights.items():
        for a, b in zip(made.get_layer(name).get_weights(), before if name == "logits" else values, strict=True):
            np.testing.assert_array_equal(a, b)
    images = np.full((1, 32, 32, 3), 50, "uint8")
    subtracted = keras.Model(made.input, made.get_layer("mean_subtraction").output).predict(images, verbose=0)
    np.testing.assert_allclose(
        subtracted, 50 / 255, rtol=1e-5
    )  # the mean of the new data, 0, not that of the file, 100


def test_equal_classifier_is_loaded_too(saved):
    path, weights = saved
    made = network(classes=5)
    assert load_weights(made, str(path)).endswith("so does the classifier")
    np.testing.assert_array_equal(made.get_layer("logits").get_weights()[0], weights["logits"][0])


def test_full_resolution_starts_from_a_pooled_stem(tmp_path):
    """The stem's kernel computes on an image what the saved one computes at twice the size, averaged over 2x2."""
    from Model import Geometry, Stage, residual_attention_network

    def make(kernel, pool):
        stages = (Stage(8, 2, 2),)
        return residual_attention_network(
            geometry=Geometry(stem_filters=4, stem_kernel=kernel, stem_pool=pool, stages=stages, tail=())
        )

    pooled, full = make(5, 2), make(3, 1)
    pooled.save(tmp_path / "last.keras")
    line = load_weights(full, str(tmp_path))
    assert line.endswith("so does the classifier; the 5x5 kernel of the stem became a 3x3 kernel")
    images = np.random.default_rng(0).normal(size=(2, 6, 7, 3)).astype("float32")
    twice = images.repeat(2, axis=1).repeat(2, axis=2)
    theirs = np.asarray(pooled.get_layer("stem_convolve")(twice)).reshape(2, 6, 2, 7, 2, 4).mean(axis=(2, 4))
    np.testing.assert_allclose(full.get_layer("stem_convolve")(images), theirs, rtol=1e-4, atol=1e-6)
    for layer in full.layers:
        if layer.name != "stem_convolve":
            for a, b in zip(layer.get_weights(), pooled.get_layer(layer.name).get_weights(), strict=True):
                np.testing.assert_array_equal(a, b)
    full.save(tmp_path / "last.keras")
    with pytest.raises(InputError, match=r"stem_convolve/kernel is \(3, 3, 3, 4\), here \(5, 5, 3, 4\)"):
        load_weights(pooled, str(tmp_path))


def test_other_networks_and_files_are_refused_by_their_first_difference(saved, tmp_path):
    path = str(saved[0])
    from Model import Geometry, Stage, residual_attention_network

    wider = Geometry(stem_filters=8, stem_kernel=3, stem_pool=2, stages=(Stage(8, 2, 2),), tail=((16, 2),))
    shorter = Geometry(stem_filters=4, stem_kernel=3, stem_pool=2, stages=(Stage(8, 2, 2),), tail=())
    for geometry, said in (
        (wider, r"stem_convolve/kernel is \(3, 3, 3, 4\), here \(3, 3, 3, 8\)"),
        (shorter, "it has a layer tail_unit_1"),
    ):
        with pytest.raises(InputError, match=said):
            load_weights(residual_attention_network(geometry=geometry), path)
    for field, value, default in (("learning", "nal", "arl"), ("attention", "spatial", "mixed")):
        with pytest.raises(InputError, match=f"stage_1_attention_1 has {field}={default}, here {field}={value}"):
            load_weights(network(**{field: value}), path)
    with pytest.raises(InputError, match="does not exist"):
        load_weights(network(), "nowhere.keras")
    broken = tmp_path / "broken.keras"
    broken.write_bytes(b"not a model")
    with pytest.raises(InputError, match="broken.keras cannot be loaded as a network") as refusal:
        load_weights(network(), str(broken))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("learning", ["arl", "nal"])
def test_a_deeper_network_starts_as_the_same_function(tmp_path, learning):
    from Model import Geometry, Stage, residual_attention_network

    rows = Geometry(4, 3, (Stage(8, 2, 2), Stage(16, 2, 1)), ((16, 2),), stem_pool=2, rising=False)
    shallow, deep = (
        residual_attention_network(geometry=rows, depth=depth, learning=learning, dropout=0, input_shape=(24, 24, 3))
        for depth in (56, 92)
    )
    shallow.save(tmp_path / "last.keras")
    line = load_weights(deep, str(tmp_path / "last.keras"))
    count = sum(1 for layer in shallow.layers if layer.weights)
    assert line.startswith(f"{count} of {count + 2} layers") and "\n" not in line
    assert line.endswith("new blocks, identities up to a factor at first: stage_1_attention_2, stage_2_attention_2")
    images = np.random.default_rng(0).normal(0, 1, (64, 24, 24, 3)).astype("float32")
    expected = keras.ops.convert_to_numpy(shallow(images, training=True))  # with the statistics of the batch
    np.testing.assert_allclose(keras.ops.convert_to_numpy(deep(images, training=True)), expected, atol=1e-3)
    assert np.std(expected) > 0.02  # 20 times the tolerance
    kernels = [
        block.trunk[0].branch[0].get_weights()[0]
        for block in (deep.get_layer("stage_2_attention_2"), shallow.get_layer("stage_2_attention_1"))
    ]
    np.testing.assert_array_equal(*kernels)  # all except the last kernels are copied
    with pytest.raises(InputError, match="would keep stage_1_attention_2 as it is, but this block is new"):
        freeze(deep, "stage_1")
    deep.save(tmp_path / "deep.keras")
    with pytest.raises(InputError, match="it has a layer stage_1_attention_2, which this network lacks"):
        load_weights(shallow, str(tmp_path / "deep.keras"))


def test_freeze_ends_with_the_stage_and_names_the_layers():
    made = network()
    assert freeze(made, "stage_1").endswith("layers up to stage_1_attention_1 keep their weights")
    assert {layer.name for layer in made.layers if layer.trainable_weights} == {"tail_unit_1", "norm_tail", "logits"}
    with pytest.raises(InputError, match="no layer has this name or prefix; the layers are stem_convolve, stage_1"):
        freeze(made, "stage_10")
    with pytest.raises(InputError, match="no layer up to this one has weights"):
        freeze(network(), made.layers[0].name)
    with pytest.raises(InputError, match="leaves no weights to train"):
        freeze(made, "logits")
    with pytest.raises(InputError, match="also give --weights"):
        Recipe(freeze="stage_1")


def test_a_run_keeps_frozen_weights_and_resumes_without_the_file(saved, tmp_path, monkeypatch, capsys):
    path, weights = saved
    own = tmp_path / "own.keras"
    own.write_bytes(path.read_bytes())
    arguments = [f"--weights={own}", "--freeze=stage_1", "--logs", str(tmp_path / "Logs")]
    training_cifar10.main([*ARGUMENTS, *arguments], tiny.tiny_build)
    said = capsys.readouterr().out
    assert "the classifier is new, for 10 classes instead of 5" in said and "up to stage_1_attention_1 keep" in said
    (folder,) = (tmp_path / "Logs").iterdir()
    recipe = json.loads((folder / "recipe.json").read_text())
    assert (recipe["weights"], recipe["freeze"]) == (str(own), "stage_1")
    own.unlink()
    training_cifar10.main(["--resume", str(folder), "--epochs=2"], tiny.tiny_build)
    assert "start from the weights" not in capsys.readouterr().out
    trained = keras.models.load_model(folder / "last.keras")
    for name, values in weights.items():
        same = [np.array_equal(a, b) for a, b in zip(trained.get_layer(name).get_weights(), values)]
        assert all(same) if name.startswith(("stem", "stage")) else not any(same)

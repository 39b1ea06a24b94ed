"""Weights that come with the project: packing, loading, checking, evaluating, predicting, fine-tuning."""

import errno
import hashlib
import json
import os
import shutil
import signal
import tomllib
from pathlib import Path
from types import SimpleNamespace

import h5py
import keras
import numpy as np
import pytest
from PIL import Image

import predict
from Model import Geometry, Stage, attention_56, attention_92, network, weights
from Model.geometries import GEOMETRIES
from Model.preprocessing import mean_subtraction
from Training.data import datasets
from Training.engine.fine_tuning import load_weights
from Training.engine.statistics import choose_examples
from Training.engine.training_model import make_logits_model
from Training.errors import InputError
from Training.recipe import Recipe
from Training.runs import saved
from Training.tools import evaluate, export, figures, ship
from Training.visual import inspection

ROOT = Path(__file__).parent.parent
TINY = Geometry(stem_filters=4, stem_kernel=3, stem_pool=2, stages=(Stage(8, 2, 1),), tail=((16, 2),))
# Logits of the packed network for the first two test images on TensorFlow; JAX must give the same.
LOGITS = [
    [-1.09111, 0.99866, 0.99491, -1.48943, 0.12692, 1.99009, -0.56699, -0.54372, -5.03346, 3.15064],
    [-1.05914, 1.00919, 1.06053, -1.53770, 0.15960, 1.95898, -0.51432, -0.53454, -4.99254, 3.11475],
]


def randomize(model):
    """Give a network weights and statistics that do not depend on the backend, as large as those of a trained one."""
    rng = np.random.default_rng(0)
    for variable in model.weights:
        values = rng.normal(size=variable.shape) * np.sqrt(1 / max(np.prod(variable.shape[:-1]), 1))
        if variable.name in ("gamma", "moving_variance"):
            values = rng.uniform(0.5, 1.5, variable.shape)
        variable.assign(values.astype("float32"))


@pytest.fixture(scope="module")
def digits():
    return datasets.load("digits", samples=64)


@pytest.fixture(scope="module", autouse=True)
def packed(digits, tmp_path_factory):
    """A folder of weights with one network, and the run from which it was packed."""
    patch = pytest.MonkeyPatch()
    patch.setitem(GEOMETRIES, "compact", TINY)
    patch.setattr(weights, "FOLDER", tmp_path_factory.mktemp("weights"))
    run = tmp_path_factory.mktemp("Logs") / "20260101-000000"
    run.mkdir()
    made = attention_56(learning="nal", preprocessing=mean_subtraction(digits.mean))
    randomize(made)
    made.save(run / "last.keras")
    (run / "recipe.json").write_text(Recipe(dataset="digits", learning="nal", logs=str(run.parent)).to_json())
    (run / "history.csv").write_text("epoch,loss,seconds\n0,1.0,1.0\n")
    (run / "environment.json").write_text("{}")
    (run / "classes.json").write_text(json.dumps(list(digits.classes)))
    (run / "result.json").write_text(
        '{"test_error_percent": 90.0, "running_time_s": 1.0, "parameters": 1, "epochs": 1}'
    )
    ship.main([str(run)])
    yield SimpleNamespace(run=run, network=made, folder=weights.FOLDER / "attention_56-digits-nal")
    patch.undo()


def compute_logits(model, images):
    return make_logits_model(model).predict(images, verbose=0)


def test_packed_folder_explains_itself(packed, digits):
    names = {path.name for path in packed.folder.iterdir()}
    assert names == {weights.FILE, weights.ABOUT, "recipe.json", "history.csv", "result.json", "environment.json"}
    about = weights.read_about(packed.folder)
    assert about["architecture"] == {
        "model": "attention_56", "geometry": "compact", "learning": "nal", "attention": "mixed",
        "mask": "encoder_decoder", "p": 1, "t": 2, "r": 1, "r_up": 1, "classes": 10, "input_shape": [32, 32, 3],
    }  # fmt: skip
    assert about["class_names"] == list(digits.classes) and about["dataset"] == "digits"
    assert Recipe.from_json((packed.folder / "recipe.json").read_text()) == Recipe(dataset="digits", learning="nal")
    wrong = int(np.sum(compute_logits(packed.network, digits.test.images).argmax(-1) != digits.test.labels))
    assert about["test_errors"]["float32"]["plain"]["wrong"] == wrong
    assert abs(about["test_errors"]["float16"]["plain"]["wrong"] - wrong) <= 3


def test_an_installed_package_contains_the_weights():
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert "weights" in tool["packages"]["find"]["include"]
    installed = {path for pattern in tool["package-data"]["weights"] for path in (ROOT / "weights").glob(pattern)}
    assert {path for path in (ROOT / "weights").rglob("*") if path.is_file()} - installed == {
        ROOT / "weights/README.md"
    }


@pytest.mark.backends
def test_weights_beyond_float16_are_refused(tmp_path):
    images = keras.Input((4, 4, 3))
    layer = keras.layers.Conv2D(1, 1)
    made = keras.Model(images, layer(mean_subtraction(np.zeros((4, 4, 3), "float32"))(images)))
    layer.kernel.assign(np.full((1, 1, 3, 1), 1e5))
    with pytest.raises(ValueError, match="is beyond the range of float16: 100000"):
        weights.pack_weights(made, tmp_path / "new.weights.h5")
    with pytest.raises(ValueError, match="must have one Normalization layer as its preprocessing, but has 0"):
        weights.pack_weights(keras.Model(images, layer(images)), tmp_path / "new.weights.h5")


@pytest.mark.backends
def test_loaded_network_gives_the_same_logits_on_every_backend(packed, digits):
    loaded = attention_56(weights="digits-nal")
    assert loaded.name == "attention_56" and loaded.output_shape == (None, 10)
    images = digits.test.images[:2]
    np.testing.assert_allclose(compute_logits(loaded, images), compute_logits(packed.network, images), atol=2e-2)
    np.testing.assert_allclose(compute_logits(loaded, images), LOGITS, atol=1e-4)


@pytest.mark.backends
def test_kernels_are_float16_and_vectors_are_exact(packed):
    loaded = attention_56(weights="attention_56-digits-nal")
    for ours, theirs in zip(loaded.weights, packed.network.weights, strict=True):
        values = keras.ops.convert_to_numpy(theirs)
        expected = values.astype("float16").astype("float32") if values.ndim > 1 else values
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(ours), expected, err_msg=ours.path)
    kinds = set()
    with h5py.File(packed.folder / weights.FILE) as file:
        file.visititems(lambda name, item: kinds.add((item.ndim > 1, str(item.dtype))) if "vars/" in name else None)
    assert kinds == {(True, "float16"), (False, "float32")}


@pytest.mark.backends
def test_without_the_classifier_it_gives_the_features(packed, digits):
    images = digits.test.images[:4]
    features = attention_56(weights="digits-nal", include_top=False)
    assert features.output_shape == (None, 16)
    whole = attention_56(weights="digits-nal")
    kernel, bias = whole.get_layer("logits").get_weights()
    np.testing.assert_allclose(
        features.predict(images, verbose=0) @ kernel + bias, compute_logits(whole, images), rtol=1e-4, atol=1e-4
    )
    assert attention_56(include_top=False).output_shape == (None, 16)


@pytest.mark.backends
def test_arguments_that_agree_are_accepted(packed):
    loaded = attention_56(weights="digits-nal", learning="nal", classes=10, input_shape=(32, 32, 3), dropout=0.5, p=1,
                          geometry="compact", name="mine")  # fmt: skip
    assert loaded.name == "mine" and loaded.get_layer("dropout").rate == 0.5


@pytest.mark.backends
@pytest.mark.parametrize(
    "arguments, said",
    [
        (
            dict(weights="cifar10"),
            "weights='cifar10': no such weights of attention_56; available: attention_56-digits-nal",
        ),
        (dict(learning="arl"), "weights='attention_56-digits-nal' need learning='nal', received learning='arl'"),
        (dict(classes=100), "need classes=10, received classes=100"),
        (dict(geometry="paper"), "need geometry='compact', received geometry='paper'"),
        (dict(input_shape=(64, 64, 3)), r"need input_shape=\(32, 32, 3\), received input_shape=\(64, 64, 3\)"),
        (dict(r=2), "need r=1, received r=2"),
        (dict(preprocessing=keras.layers.Rescaling), "have their own preprocessing"),
        (dict(clases=10), "unexpected keyword argument .clases."),
    ],
)
def test_other_arguments_are_refused_in_one_line(arguments, said):
    with pytest.raises((ValueError, TypeError), match=said) as refusal:
        attention_56(**{"weights": "digits-nal", **arguments})
    assert "\n" not in str(refusal.value)


@pytest.mark.backends
def test_weights_of_another_network_are_refused():
    with pytest.raises(ValueError, match="no such weights of attention_92; available: attention_56-digits-nal"):
        attention_92(weights="digits-nal")
    with pytest.raises(ValueError, match="are those of attention_56, received attention_92"):
        network("attention_92", weights="attention_56-digits-nal")


@pytest.fixture
def copy(packed, tmp_path, monkeypatch):
    """A copy of the folder of weights, which a test may damage."""
    monkeypatch.setattr(weights, "FOLDER", tmp_path)
    return shutil.copytree(packed.folder, tmp_path / packed.folder.name)


@pytest.mark.backends
def test_a_changed_file_is_refused_by_its_hash(copy):
    raw = bytearray((copy / weights.FILE).read_bytes())
    raw[len(raw) // 2] ^= 1
    (copy / weights.FILE).write_bytes(raw)
    with pytest.raises(
        ValueError, match="is corrupted: its SHA-256 is .*, expected .*; restore it with: git"
    ) as refusal:
        attention_56(weights="digits-nal")
    assert "\n" not in str(refusal.value)
    (copy / weights.FILE).unlink()
    with pytest.raises(ValueError, match="cannot be read: No such file or directory; restore it with: git"):
        attention_56(weights="digits-nal")


@pytest.mark.backends
@pytest.mark.parametrize("content", ["", "[]", "{}", '{"sha256": 1, "architecture": 2, "class_names": 3}'])
def test_a_broken_description_is_refused(copy, content):
    (copy / weights.ABOUT).write_text(content)
    with pytest.raises(ValueError, match="about.json cannot be read"):
        attention_56(weights="digits-nal")


@pytest.mark.backends
def test_training_starts_from_packed_weights(packed):
    made = network("attention_56", learning="nal", classes=7, preprocessing=keras.layers.Rescaling(1 / 255))
    said = load_weights(made, "digits-nal", "attention_56")
    assert said.endswith("the classifier is new, for 7 classes instead of 10")
    loaded = attention_56(weights="digits-nal")
    for ours, theirs in zip(made.layers, loaded.layers, strict=True):
        if ours.name.startswith(("stem", "stage", "tail", "norm")):
            for a, b in zip(ours.get_weights(), theirs.get_weights(), strict=True):
                np.testing.assert_array_equal(a, b)


def compute_expected_errors(model, digits):
    wrong = compute_logits(model, digits.test.images).argmax(-1) != digits.test.labels
    return int(wrong.sum()), [int(wrong[digits.test.labels == i].sum()) for i in range(10)]


@pytest.mark.backends
def test_evaluate_counts_what_is_wrong(packed, digits, capsys):
    evaluate.main(["--model", str(packed.run), "--flip", "--statistics", "64", "--average-masks", "--json"])
    found = json.loads(capsys.readouterr().out)
    wrong, by_class = compute_expected_errors(packed.network, digits)
    assert found["dataset"] == "digits" and list(found["errors"]) == [
        "plain", "flip", "statistics", "statistics, flip", "positions", "images",
    ]  # fmt: skip
    assert found["statistics_images"] == 128  # one batch
    plain = found["errors"]["plain"]
    assert plain["all"]["wrong"] == wrong and plain["all"]["images"] == 360
    assert [plain[f"class {i}"]["wrong"] for i in range(10)] == by_class
    assert plain["all"]["error_percent"] == pytest.approx(100 * wrong / 360, abs=1e-3)
    twice = [
        keras.ops.convert_to_numpy(packed.network.predict(digits.test.images[:, :, ::step], verbose=0))
        for step in (1, -1)
    ]
    assert found["errors"]["flip"]["all"]["wrong"] == int(np.sum(sum(twice).argmax(-1) != digits.test.labels))
    assert found["errors"]["statistics"]["all"]["wrong"] != wrong
    for name, images in (("positions", None), ("images", choose_examples(digits.train, 2048, 128).images)):
        averaged = inspection.average_masks(packed.network, images)
        assert found["errors"][name]["all"]["wrong"] == compute_expected_errors(averaged, digits)[0]


def test_weights_with_a_name_are_exported_to_the_current_folder(packed, tmp_path):
    path = saved.find("digits-nal")
    assert export.choose_output(path, ".tflite") == Path("attention_56-digits-nal.tflite")
    assert export.choose_output(tmp_path / "last.keras", ".tflite") == tmp_path / "last.tflite"


def test_tools_do_not_use_the_cache_of_the_run(tmp_path):
    (tmp_path / "recipe.json").write_text(Recipe(dataset="folder", data_dir="there", cache="elsewhere").to_json())
    recipe = saved.find_recipe(tmp_path / "last.keras")
    assert (recipe.data_dir, recipe.cache) == ("there", "")


def test_masks_are_averaged_only_where_there_are_some(digits):
    images = keras.Input((32, 32, 3))
    plain = keras.Model(images, keras.layers.Dense(10, "softmax", name="logits")(keras.layers.Flatten()(images)))
    with pytest.raises(InputError, match="--average-masks needs a network with attention blocks"):
        evaluate.measure_averaged_masks(plain, digits)


def test_evaluate_prints_a_table_for_packed_weights(packed, digits, capsys):
    evaluate.main(["--model", "digits-nal"])
    lines = capsys.readouterr().out.splitlines()
    wrong, by_class = compute_expected_errors(attention_56(weights="digits-nal"), digits)
    assert "attention_56-digits-nal" in lines[0] and "360 test images, float32" in lines[0]
    assert [line.split()[-3] for line in lines[1:]] == [str(wrong), *map(str, by_class)]


def test_figures_show_the_data_set_of_packed_weights(packed, tmp_path, capsys):
    network = attention_56(weights="digits-nal")
    data = figures.load_data(network, "digits-nal", SimpleNamespace(data_dir="", best=False))
    assert len(data.test.labels) == 360 and len(data.classes) == 10
    assert figures.label_runs(["digits-nal"], [inspection.find_blocks(network)]) == ["Attention-56, NAL"]
    err = expect_refusal(capsys, figures.main, "responses", str(tmp_path))
    assert "--images" not in err


def test_the_interval_is_that_of_wilson():
    assert evaluate.Error(5, 100).interval == pytest.approx((2.1543, 11.1750), abs=1e-3)
    low, high = evaluate.Error(0, 10).interval
    assert low == 0 and high == pytest.approx(27.7533, abs=1e-3)


def expect_refusal(capsys, main, *arguments):
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.count("\n") == 1, err
    return err


def test_evaluate_refuses_in_one_line(packed, tmp_path, capsys, monkeypatch):
    (tmp_path / "last.keras").write_bytes((packed.run / "last.keras").read_bytes())
    (tmp_path / "classes.json").write_text(json.dumps([f"class {i}" for i in range(10)]))
    for arguments, said in (
        (["--model", "cifar10"], "the name of weights is needed (available: attention_56-digits-nal)"),
        (["--model", str(tmp_path)], "there is no recipe.json next to"),
        (["--model", str(tmp_path), "--dataset", "digits"], "differ, first: 'class 0', in digits '0'"),
        (["--model", "digits-nal", "--dataset", "mnist"], "argument --dataset: must be one of"),
        (
            ["--model", "digits-nal", "--dataset", "cifar10", "--data-dir", "nowhere"],
            "--data-dir nowhere does not exist",
        ),
        (["--model", "digits-nal", "--statistics", "-1"], "--statistics must be 0 or more, received -1"),
        (["--model", "digits-nal", "--best"], "--best needs a run's folder, received the weights digits-nal"),
    ):
        assert said in expect_refusal(capsys, evaluate.main, *arguments)
    few = datasets.load("digits", samples=64)
    fewer = few._replace(classes=few.classes[:9])
    for tool in (evaluate, ship):
        monkeypatch.setattr(tool, "load_for_recipe", lambda recipe: fewer)
    said = expect_refusal(capsys, ship.main, str(packed.run), "--replace")
    assert "the network has 10 classes, digits has 9" in said
    assert "the network has 10 classes, digits has 9" in expect_refusal(capsys, evaluate.main, "--model", "digits-nal")


def test_ship_refuses_in_one_line(packed, tmp_path, capsys):
    assert "exists: give --replace, or another --name" in expect_refusal(capsys, ship.main, str(packed.run))
    assert "nowhere is not a finished run" in expect_refusal(capsys, ship.main, "nowhere")
    said = expect_refusal(capsys, ship.main, str(packed.run), "--name", "attention_92-digits")
    assert "--name must be attention_56-<weights>" in said
    before = sorted(path.name for path in weights.FOLDER.iterdir())
    shutil.copytree(packed.run, tmp_path / "run")
    (tmp_path / "run" / "classes.json").unlink()
    assert "has no classes.json" in expect_refusal(capsys, ship.main, str(tmp_path / "run"), "--replace")
    assert sorted(path.name for path in weights.FOLDER.iterdir()) == before


def test_a_stopped_ship_keeps_the_weights_that_it_would_replace(packed, copy, monkeypatch):
    before = (copy / weights.FILE).read_bytes()
    rename = Path.rename

    def stop_once(path, target):
        monkeypatch.setattr(Path, "rename", rename)
        os.kill(os.getpid(), signal.SIGTERM)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", stop_once)
    with pytest.raises(SystemExit):
        ship.main([str(packed.run), "--replace"])
    assert (copy / weights.FILE).read_bytes() == before  # the new file, which is the same
    assert [path.name for path in weights.FOLDER.iterdir() if path.name.startswith(".ship")] == []


def test_a_full_disk_keeps_the_weights_that_ship_would_replace(packed, copy, capsys, monkeypatch):
    before, write = (copy / weights.FILE).read_bytes(), Path.write_bytes

    def fail_full(path, raw):
        if path.name == weights.FILE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write(path, raw)

    monkeypatch.setattr(Path, "write_bytes", fail_full)
    said = expect_refusal(capsys, ship.main, str(packed.run), "--replace")
    assert "cannot be written: No space left on device" in said
    assert (copy / weights.FILE).read_bytes() == before
    assert [path.name for path in weights.FOLDER.iterdir() if path.name.startswith(".ship")] == []


@pytest.mark.backends
def test_ship_replaces_on_request(packed, copy, capsys):
    (copy / weights.FILE).write_bytes(b"old")
    ship.main([str(packed.run), "--replace"])
    assert (copy / weights.FILE).read_bytes() == (packed.folder / weights.FILE).read_bytes(), "the file is reproducible"
    assert "test error with float16 weights: " in capsys.readouterr().out


@pytest.mark.backends
def test_ship_averages_networks(packed, copy, tmp_path, capsys):
    other = keras.models.load_model(packed.run / "last.keras")
    for variable in other.trainable_variables:
        variable.assign(variable * 3)
    (tmp_path / "other").mkdir()
    path = tmp_path / "other" / "last.keras"
    other.save(path)
    ship.main([str(packed.run), "--name", "attention_56-mean", "--average", str(path)])
    loaded = attention_56(weights="mean")
    pairs = zip(loaded.trainable_variables, packed.network.trainable_variables, strict=True)
    for ours, theirs in pairs:
        expected = 2 * keras.ops.convert_to_numpy(theirs)  # the mean of the value and three times the value
        np.testing.assert_allclose(keras.ops.convert_to_numpy(ours), expected, rtol=1e-3, atol=1e-6)
    means = [keras.ops.convert_to_numpy(net.get_layer("norm_tail").moving_mean) for net in (loaded, packed.network)]
    assert not np.allclose(*means)  # recomputed for the new weights
    about = weights.read_about(weights.FOLDER / "attention_56-mean")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert about["averaged_with"] == [{"name": "other", "file": "last.keras", "sha256": digest}]
    capsys.readouterr()
    attention_56(preprocessing=mean_subtraction(np.zeros((32, 32, 3), "float32"))).save(path)
    for names in ([str(packed.run)], [str(path), str(path)]):
        said = expect_refusal(capsys, ship.main, str(packed.run), "--replace", "--average", *names)
        assert "--average needs other networks, each of them once" in said
    said = expect_refusal(capsys, ship.main, str(packed.run), "--replace", "--average", str(path))
    assert "cannot be averaged with this network: stage_1_attention_1 has learning=arl, here learning=nal" in said


@pytest.mark.backends
def test_predict_without_a_model_uses_the_weights(packed, copy, digits, tmp_path, capsys, monkeypatch):
    picture = tmp_path / "digit.png"
    Image.fromarray(digits.test.images[0]).save(picture)
    monkeypatch.setattr(predict, "DEFAULT_MODEL", "digits-nal")
    predict.main([str(picture), "--top", "1", "--masks", str(tmp_path / "masks")])
    probabilities = attention_56(weights="digits-nal").predict(digits.test.images[:1], verbose=0)[0]
    out = capsys.readouterr().out
    assert out.split()[1:4] == [digits.classes[probabilities.argmax()], f"{100 * probabilities.max():.2f}", "%"]
    assert (tmp_path / "masks" / "digit.png.masks.png").exists()
    shutil.rmtree(copy)
    assert "there are no weights digits-nal" in expect_refusal(capsys, predict.main, str(picture))

"""Exports give the same probabilities in the library of the format, or no file is written."""

import importlib.util
import json
from types import SimpleNamespace

import keras
import numpy as np
import pytest

from Model import Geometry, Stage, residual_attention_network
from Model.preprocessing import mean_subtraction
from Training.data import datasets
from Training.recipe import Recipe
from Training.tools import export

TENSORFLOW = keras.backend.backend() == "tensorflow"
on_tensorflow = pytest.mark.skipif(not TENSORFLOW, reason="Keras exports to this format on TensorFlow only")


@pytest.fixture(scope="module", params=["float32"])
def run(request, tmp_path_factory):
    """The folder of a run with a small network for the digits, trained in float32 or mixed precision."""
    folder = tmp_path_factory.mktemp("run")
    keras.utils.set_random_seed(3)
    keras.config.set_dtype_policy(request.param)
    digits = datasets.load("digits")
    geometry = Geometry(stem_filters=4, stem_kernel=3, stem_pool=2, stages=(Stage(4, 2, 1),), tail=())
    network = residual_attention_network(geometry=geometry, preprocessing=mean_subtraction(digits.mean))
    network.save(folder / "last.keras")
    (folder / "recipe.json").write_text(Recipe(dataset="digits").to_json())
    images = digits.test.images[100:105]
    keras.config.set_dtype_policy("float32")
    exact = residual_attention_network(geometry=geometry, preprocessing=mean_subtraction(digits.mean))
    exact.set_weights(network.get_weights())
    return SimpleNamespace(folder=folder, images=images, answers=exact.predict(images, verbose=0))


def run_export(run, kind, output, capsys):
    """Export a run; return the exported network as a function, and the printed differences."""
    export.main([str(run.folder), "--to", kind, "--output", str(output), "--images", "70"])
    out, err = capsys.readouterr()
    assert err == "" and "70 test images of digits" in out
    lines = [line.split() for line in out.splitlines()]
    found = {int(line[-1]): float(line[0]) for line in lines if line[1:4] == ["in", "batches", "of"]}
    assert set(found) == {1, 64} and max(found.values()) < 1e-5
    assert [path.name for path in output.parent.iterdir()] == [output.name]
    return export.open_export(kind, output)


def assert_same(function, run):
    """Compare with Keras, in a batch of another size than the command has used."""
    np.testing.assert_allclose(function(run.images.astype("float32")), run.answers, atol=1e-5)


@pytest.mark.backends
def test_savedmodel(run, tmp_path, capsys):
    pytest.importorskip("tensorflow", reason="TensorFlow reads SavedModels")
    assert_same(run_export(run, "savedmodel", tmp_path / "network.savedmodel", capsys), run)


@on_tensorflow
@pytest.mark.filterwarnings("ignore:.*np.object:FutureWarning")
def test_onnx(run, tmp_path, capsys):
    for package in ("tf2onnx", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install -r requirements-export.txt")
    assert_same(run_export(run, "onnx", tmp_path / "network.onnx", capsys), run)


@on_tensorflow
@pytest.mark.parametrize("run", ["mixed_bfloat16"], indirect=True)
@pytest.mark.filterwarnings("ignore:.*tf.lite.Interpreter is deprecated")
def test_tflite_of_a_network_trained_in_mixed_precision(run, tmp_path, capsys):
    assert_same(run_export(run, "tflite", tmp_path / "network.tflite", capsys), run)


def save_linear_network(folder, size):
    """Save a network of one layer, which compiles quickly; return its path."""
    images = keras.Input((size, size, 3))
    network = keras.Model(images, keras.layers.Dense(3, "softmax")(keras.layers.Flatten()(images)))
    network.save(folder / "linear.keras")
    return str(folder / "linear.keras")


@pytest.mark.parametrize("error", [2e-4, np.nan])
def test_an_export_that_differs_is_not_kept(tmp_path, capsys, monkeypatch, error):
    """The difference only appears in batches of several images."""
    path = save_linear_network(tmp_path, 32)
    network = keras.models.load_model(path)

    def open_wrong(kind, path):
        return lambda images: network.predict_on_batch(images) + (error if len(images) > 1 else 0)

    monkeypatch.setattr(export, "export", lambda network, kind, path: path.mkdir())
    monkeypatch.setattr(export, "open_export", open_wrong)
    arguments = [path, "--to", "savedmodel", "--dataset", "digits", "--images", "3"]
    with pytest.raises(SystemExit) as stop:
        export.main(arguments)
    out, err = capsys.readouterr()
    assert stop.value.code == 1 and err.count("\n") == 1 and "more than 0.0001: the export was not kept" in err
    assert f"{error:.1e}  in batches of 3" in out
    assert [path.name for path in tmp_path.iterdir()] == ["linear.keras"]


def test_an_export_that_does_not_run_is_refused_in_one_line(tmp_path, capsys, monkeypatch):
    def open_and_record(kind, path):
        raise RuntimeError("no such operation\nin this library")

    monkeypatch.setattr(export, "export", lambda network, kind, path: path.mkdir())
    monkeypatch.setattr(export, "open_export", open_and_record)
    with pytest.raises(SystemExit) as stop:
        export.main([save_linear_network(tmp_path, 32), "--to", "savedmodel", "--dataset", "digits", "--images", "3"])
    err = capsys.readouterr().err
    assert stop.value.code != 0 and err.count("\n") == 1 and "does not run and was not kept: no such operation" in err
    assert [path.name for path in tmp_path.iterdir()] == ["linear.keras"]


def test_networks_that_cannot_be_exported_are_refused_in_one_line(run, tmp_path, capsys):
    (tmp_path / "moved.keras").write_bytes((run.folder / "last.keras").read_bytes())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "recipe.json").write_text(json.dumps({"dataset": "digits", "novelty": 1}))
    (tmp_path / "other" / "last.keras").write_bytes((run.folder / "last.keras").read_bytes())
    small = save_linear_network(tmp_path, 8)
    run, to = run.folder, ["--to", "savedmodel"]
    cases = [
        ([str(run)], "the following arguments are required: --to"),
        ([str(run), "--to", "pdf"], "invalid choice: 'pdf'"),
        ([str(run), *to, "--dataset", "nonsense"], "argument --dataset: must be one of cifar10, cifar100, digits"),
        ([str(run), *to, "--images", "0"], "--images must be 1 or more, received 0"),
        (["nowhere", *to], "nowhere does not exist: a run's folder, a .keras file or the name"),
        ([str(run), *to, "--output", str(tmp_path)], "exists: remove it, or give another --output"),
        ([str(run), *to, "--output", str(tmp_path / "no" / "where")], "where cannot be written"),
        ([str(tmp_path / "moved.keras"), *to], "there is no recipe.json next to"),
        ([str(tmp_path / "other"), *to], "the recipe has unknown fields: novelty"),
        ([small, *to, "--dataset=digits"], "takes images of (8, 8, 3), digits has (32, 32, 3)"),
    ]
    for arguments, said in cases:
        with pytest.raises(SystemExit) as stop:
            export.main(arguments)
        out, err = capsys.readouterr()
        assert stop.value.code == 2 and out == "" and err.startswith("python -m Training.tools.export: error: ")
        assert said in err and err.count("\n") == 1, err


def test_missing_packages_and_other_backends_are_named(monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "tensorflow")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else name)
    with pytest.raises(export.InputError, match="onnx needs onnxruntime: pip install -r requirements-export.txt"):
        export.refuse_impossible("onnx")
    export.refuse_impossible("tflite")
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    for kind in ("onnx", "tflite"):
        with pytest.raises(export.InputError, match=f"does not export to {kind} on jax: set KERAS_BACKEND=tensorflow"):
            export.refuse_impossible(kind)
    export.refuse_impossible("savedmodel")

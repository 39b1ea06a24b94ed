"""The training script: a whole run, its folder, signals, resuming, errors, TensorBoard."""

import contextlib
import csv
import datetime
import importlib.util
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from PIL import Image

import training_cifar10
from tests.support import small, tiny
from Training.data import datasets
from Training.errors import InputError
from Training.recipe import Recipe
from Training.runs import history
from Training.tools import figures

ROOT = Path(__file__).parent.parent
ARGUMENTS = [
    "--dataset=digits",
    "--samples=64",
    "--batch-size=16",
    "--epochs=3",
    "--warmup-epochs=1",
    "--masks-every=1",
]
RESULT = {
    "test_accuracy", "test_loss", "test_error_percent", "train_error_percent", "validation_accuracy",
    "validation_loss", "validation_error_percent", "running_time_s", "first_step_s", "training_time_s",
    "images_per_s", "parameters", "epochs", "dataset", "model", "learning", "backend", "device", "seed",
    "test_top_5_error_percent",
}  # fmt: skip
SCALARS = {
    f"epoch_{name}" for name in ("loss", "accuracy", "error_percent", "learning_rate", "images_per_second", "seconds")
}


def find_run(logs):
    (folder,) = Path(logs).iterdir()
    return folder


def tiny_main(*arguments, build=tiny.tiny_build):
    training_cifar10.main(list(arguments), build)


def run_python(code, *arguments, **environment):
    paths = os.pathsep.join([*environment.pop("paths", []), str(ROOT)])
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": paths, **environment},
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """The Logs folder of one whole run."""
    folder = tmp_path_factory.mktemp("Logs")
    tiny_main(*ARGUMENTS, "--histograms", "--projector", "--mistakes=4", "--profile=2-3", "--logs", str(folder))
    return folder


@pytest.mark.backends
def test_run_folder_explains_itself(logs):
    folder = find_run(logs)
    assert time.strptime(folder.name[:15], "%Y%m%d-%H%M%S")
    assert folder.name[15:] == "-attention_56-arl-digits-samples=64-epochs=3-batch_size=16-warmup_epochs=1"
    names = {path.name.split(".")[0] for path in folder.iterdir()}
    files = {"recipe", "environment", "split", "classes", "history", "result", "predictions", "best", "last"}
    files |= {"backup", "lock"}
    assert names == files | {"train", "validation"}
    result = json.loads((folder / "result.json").read_text())
    assert set(result) == RESULT
    assert (result["dataset"], result["epochs"], result["backend"]) == ("digits", 3, keras.backend.backend())
    assert result["test_error_percent"] == pytest.approx(100 * (1 - result["test_accuracy"]), abs=1e-3)
    assert result["images_per_s"] > 0 and result["running_time_s"] > 0
    assert result["running_time_s"] - result["first_step_s"] < result["training_time_s"] < result["running_time_s"]
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["packages"]["keras"] == keras.__version__ and environment["device"] == result["device"]
    assert len(json.loads((folder / "split.json").read_text())["validation"]) == 144
    with open(folder / "history.csv", newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["0", "1", "2"]


@pytest.mark.backends
def test_saved_model_takes_raw_images_and_scores_as_the_result_says(logs):
    folder, digits = find_run(logs), datasets.load("digits")
    result = json.loads((folder / "result.json").read_text())
    probabilities = keras.models.load_model(folder / "last.keras").predict(digits.test.images, verbose=0)
    assert np.mean(probabilities.argmax(axis=-1) == digits.test.labels) == result["test_accuracy"]
    with open(folder / "predictions.csv", newline="") as file:
        rows = [tuple(map(int, row.values())) for row in csv.DictReader(file)]
    assert rows == list(zip(range(360), digits.test.labels, probabilities.argmax(axis=-1)))
    assert json.loads((folder / "classes.json").read_text()) == list(digits.classes)


@pytest.mark.parametrize("arguments", [["masks"], ["channels", "--block", "stage_1_attention_1"], ["responses"]])
def test_figures_of_the_run(logs, tmp_path, capsys, arguments):
    figures.main([arguments[0], str(find_run(logs)), *arguments[1:], "--output", str(tmp_path / "new" / "figure.png")])
    assert Image.open(tmp_path / "new" / "figure.png").width > 300
    with pytest.raises(SystemExit):
        figures.main(["channels", str(find_run(logs)), "--block", "none"])
    assert "--block must be one of stage_1_attention_1" in capsys.readouterr().err


def test_the_number_of_channels_does_not_limit_the_images_to_choose_from(logs, tmp_path, capsys):
    run, picture = str(find_run(logs)), tmp_path / "figure.png"
    figures.main(["channels", run, "--number", "7", "--count", "2", "--output", str(picture)])
    assert picture.exists()
    with pytest.raises(SystemExit):
        figures.main(["channels", run, "--number", "10"])
    assert "--number must be less than 10, the number of images" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        figures.main(["masks", run, "--photographs", "--images", "a.png"])
    assert "not allowed with argument --photographs" in capsys.readouterr().err


def read_tags(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"tensors": 0})
    events.Reload()
    return events, set(events.Tags()["tensors"]) | set(events.Tags()["images"])


@pytest.mark.backends
def test_event_files_have_every_tag(logs):
    folder = find_run(logs)
    events, train = read_tags(folder / "train")
    assert {"recipe", "recipe/defaults", "result", "augmented_batch", "masks/stage_1_attention_1"} <= train
    assert {"confusion_matrix", "most_confident_mistakes", "custom_scalars__config__"} <= train
    assert {f"class/{i}/pr_curves" for i in range(10)} <= train
    assert {"final/test_error_percent", "_hparams_/session_start_info", "_hparams_/experiment"} <= train
    assert train >= SCALARS and events.Tags()["graph"]
    assert not [tag for tag in train if "first_step" in tag]
    assert any(tag.endswith("histogram") for tag in train)
    assert [event.step for event in events.Tensors("epoch_loss")] == [0, 1, 2]
    assert {"epoch_loss", "epoch_accuracy", "epoch_error_percent"} <= read_tags(folder / "validation")[1]
    assert {path.parent.name for path in folder.rglob("events.out.tfevents*")} == {"train", "validation"}


def read_text(events, tag):
    return events.Tensors(tag)[0].tensor_proto.string_val[0].decode()


@pytest.mark.backends
def test_the_text_of_the_recipe_separates_changed_values_and_defaults(logs):
    events, _ = read_tags(find_run(logs) / "train")
    different, same = read_text(events, "recipe"), read_text(events, "recipe/defaults")
    assert "| epochs | 3 | 200 |" in different and "| momentum |" not in different
    assert "| momentum | 0.9 |" in same and "| epochs |" not in same
    assert "test_error_percent" in read_text(events, "result")


@pytest.mark.backends
def test_the_projector_has_features_labels_and_thumbnails(logs):
    folder = find_run(logs) / "train"
    features = np.loadtxt(folder / "projector" / "features.tsv", delimiter="\t")
    network, digits = keras.models.load_model(find_run(logs) / "last.keras"), datasets.load("digits")
    inside = keras.Model(network.input, network.get_layer("logits").input)
    np.testing.assert_allclose(features, inside.predict(digits.test.images, verbose=0), rtol=1e-3, atol=1e-4)
    with open(folder / "projector" / "labels.tsv", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert [row["class"] for row in rows] == [f"class {label}" for label in digits.test.labels] and set(rows[0]) == {
        "class", "predicted", "right", "number",
    }  # fmt: skip
    with open(find_run(logs) / "predictions.csv", newline="") as file:
        assert [f"class {row['predicted']}" for row in csv.DictReader(file)] == [row["predicted"] for row in rows]
    assert Image.open(folder / "projector" / "thumbnails.png").size == (19 * 32, 19 * 32)
    assert "projector/thumbnails.png" in (folder / "projector_config.pbtxt").read_text()


def test_event_files_written_anew_are_those_of_the_run(logs, tmp_path, capsys, monkeypatch):
    from tensorboard.util.tensor_util import make_ndarray

    from Training.engine import event_callbacks
    from Training.tools import events

    run, again, shown = find_run(logs), tmp_path / "again", []
    add_masks = event_callbacks.add_masks
    monkeypatch.setattr(event_callbacks, "add_masks", lambda *given: [shown.append(given[1]), add_masks(*given)])
    events.main([str(run), "--output", str(again), "--photographs"])
    np.testing.assert_array_equal(*shown, datasets.load_photographs(32))
    with pytest.raises(InputError, match="the photographs are squares, but the network takes images of 24x32"):
        datasets.load_photographs(24, 32)
    assert "again" in capsys.readouterr().out
    for path in again.rglob("*"):  # files that may be published
        assert path.is_dir() or str(logs).encode() not in path.read_bytes(), path
    for part in ("train", "validation"):
        (old, before), (new, after) = read_tags(run / part), read_tags(again / part)
        assert before - after == {tag for tag in before if "histogram" in tag or tag == "augmented_batch"}
        for tag in {tag for tag in after if tag.startswith("epoch_")}:
            values = [[event.tensor_proto for event in each.Tensors(tag)] for each in (old, new)]
            np.testing.assert_allclose(*([float(make_ndarray(v)) for v in each] for each in values), rtol=1e-5)
        times = [event.wall_time for event in new.Tensors("epoch_loss")]
        assert times == sorted(times) and len(set(times)) == len(times) == 3
    new = read_tags(again / "train")[0]
    assert new.Tags()["graph"] and len(new.Images("masks/stage_1_attention_1")) == 1
    assert {path.name for path in again.iterdir()} >= {"recipe.json", "result.json", "history.csv", "predictions.csv"}
    assert not list(again.rglob("*.keras")) and (again / "train" / "projector_config.pbtxt").exists()
    other = tmp_path / "other.keras"
    tiny.tiny_network(input_shape=(24, 24, 3)).save(other)
    for words, said in (
        ([str(run), "--output", str(again)], "already exists"),
        ([str(tmp_path)], "is not a finished run"),
        ([str(run), "--mistakes", "-1"], "--mistakes must be 0 or more"),
        ([str(run), "--output", str(tmp_path / "new"), "--model", str(other)], "the network takes images of (24, 24"),
    ):
        with pytest.raises(SystemExit):
            events.main(words)
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_events_of_a_folder_with_another_name_end_when_its_history_was_written(tmp_path, capsys):
    from Training.tools import events

    written = datetime.datetime(2026, 1, 2, 3, 4, 5).timestamp()
    for name, seconds, start in (
        ("20260101-000000-run", 60, datetime.datetime(2026, 1, 1).timestamp()),
        ("20269999-999999", 60, written - 60),
        ("run", 60, written - 60),
        ("long", 1e14, 0),
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "history.csv").write_text(f"epoch,loss,seconds\n0,1.0,{seconds}\n")
        os.utime(folder / "history.csv", (written, written))
        run = SimpleNamespace(folder=folder, history=history.read_history(folder / "history.csv"))
        assert events.Clock(run).now == start
    (folder / "recipe.json").write_text(Recipe().to_json())
    (folder / "result.json").write_text('{"test_error_percent": 1, "running_time_s": 1, "parameters": 1}')
    for text in ("epoch,loss\n0,1.0\n", "epoch,loss,seconds\n0,1.0,NA\n", "epoch,loss,seconds\n0,1.0,-5\n"):
        (folder / "history.csv").write_text(text)
        with pytest.raises(SystemExit):
            events.main([str(folder), "--output", str(tmp_path / "new")])
        assert "its history.csv has no valid seconds of each epoch" in capsys.readouterr().err


@pytest.mark.backends
def test_a_trace_of_the_requested_steps_is_written(logs):
    (path,) = (find_run(logs) / "train" / "plugins").rglob("*.pb")
    assert path.name.endswith(".xplane.pb") and b"step_num" in path.read_bytes()  # steps are marked


@pytest.mark.parametrize(
    "arguments, calls, traced",
    [
        ("3-5", 1, (3, 5)),
        ("1-1", 1, (1, 1)),
        ("4-4", 1, (4, 4)),
        ("7-99", 1, (7, 9)),
        ("50-60", 1, ()),
        ("2-2", 3, (1, 3)),
        ("5-7", 3, (4, 9)),
    ],
)
def test_a_trace_starts_and_ends_with_its_steps(monkeypatch, capsys, arguments, calls, traced):
    """Three epochs of three steps, each step a call, or all three one call."""
    from Training.engine import event_callbacks
    from Training.recipe import parse_steps

    seen, step = [], 0
    monkeypatch.setattr(event_callbacks, "start_trace", lambda folder: seen.append(step))
    monkeypatch.setattr(event_callbacks, "stop_trace", lambda: seen.append(step))
    trace = event_callbacks.Trace("run", *parse_steps(arguments))
    trace.set_model(SimpleNamespace(steps_per_execution=calls))
    for epoch in range(3):
        trace.on_epoch_begin(epoch)
        for batch in range(0, 3, calls):
            step += 1
            trace.on_train_batch_begin(batch)
            step += calls - 1
            trace.on_train_batch_end(batch + calls - 1)
    trace.on_train_end()
    assert tuple(seen) == traced
    steps = traced[1] - traced[0] + 1 if traced else 0
    assert (f"trace of {steps} step" in capsys.readouterr().out) == bool(traced) and trace.traced == steps


def test_progress_is_one_readable_line(monkeypatch, capsys):
    from Training.engine import callbacks
    from Training.engine.callbacks import RunProgress, format_progress

    clock = itertools.count(0, 10)  # a step takes 10 s
    monkeypatch.setattr(callbacks, "time", SimpleNamespace(perf_counter=lambda: next(clock)))

    logs = {"accuracy": 0.875, "loss": 1.25, "learning_rate": 0.0, "images_per_second": float("nan"), "seconds": 3.0}
    whole = {**logs, "val_accuracy": 0.5, "val_loss": 2.0, "images_per_second": 123.4}
    assert format_progress(0, 10, logs, None) == "epoch  1 of 10   train error 12.50 %, loss 1.2500"
    assert format_progress(9, 10, whole, 200.0) == (
        "epoch 10 of 10   train error 12.50 %, loss 1.2500   validation error 50.00 %, loss 2.0000   123 images/s   "
        "about 3 min left"
    )
    assert format_progress(0, None, logs, None, 0.5) == "epoch 1    50 %   train error 12.50 %, loss 1.2500"
    decided = iter([None] * 4 + [2] * 6)  # as with --minutes, at the end of the first epoch
    progress = RunProgress(lambda: next(decided), 4, live=False)
    progress.set_params({"steps": 4, "epochs": 2})
    for epoch in range(2):
        progress.on_epoch_begin(epoch)
        for batch in range(4):
            progress.on_train_batch_end(batch, {"loss": 1.0, "accuracy": 0.5})
        progress.on_epoch_end(epoch, whole)
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("epoch 1 of 2 ") and first.endswith("123 images/s") and "\r" not in first
    assert last.startswith("epoch 2 of 2 ") and last.endswith("123 images/s")

    progress = RunProgress(lambda: 2, 4, live=False)
    progress.set_params({"steps": 4, "epochs": 2})
    for batch in range(4):
        progress.on_epoch_begin(0)
        progress.on_train_batch_end(batch, {"loss": 1.0, "accuracy": 0.5})
    progress.on_epoch_end(0, whole)
    assert capsys.readouterr().out.endswith("123 images/s   about 40 s left\n")


def test_tensorboard_serves_every_tag(logs):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logs), "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def ask(path, body=None):
        kind = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{port}/data/{path}", body, kind)
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.loads(answer.read())

    try:
        name, found = f"{find_run(logs).name}/train", {}
        for _ in range(400):
            with contextlib.suppress(OSError):
                found = ask("plugin/scalars/tags")
            if "final/test_error_percent" in found.get(name, ()):
                break
            time.sleep(0.5)
        assert set(found) == {name, name.replace("/train", "/validation")}
        assert set(found[name]) >= SCALARS
        images = set(ask("plugin/images/tags")[name])
        assert images >= {"augmented_batch", "confusion_matrix", "masks/stage_1_attention_1", "most_confident_mistakes"}
        assert set(ask("plugin/text/tags")[name]) == {"recipe", "recipe/defaults", "result"}
        assert ask("plugin/graphs/info")[name]["run_graph"]
        assert len(ask("plugin/pr_curves/tags")[name]) == 10
        query = urllib.parse.urlencode({"tag": "class/3/pr_curves", "run": name})
        (curve,) = ask(f"plugin/pr_curves/pr_curves?{query}")[name]
        assert len(curve["precision"]) == len(curve["recall"]) and max(curve["recall"]) == 1
        layout = ask("plugin/custom_scalars/layout")
        charts = [chart["multiline"]["tag"] for category in layout["category"] for chart in category["chart"]]
        assert charts[:2] == [["^epoch_loss$"], ["^epoch_error_percent$"]]
        query = urllib.parse.urlencode({"run": name.replace("/train", "/validation"), "tag": charts[1][0]})
        drawn = ask(f"plugin/custom_scalars/scalars?{query}")
        assert drawn["regex_valid"] and len(drawn["tag_to_events"]["epoch_error_percent"]) == 3
        assert name in ask("plugin/projector/runs")
        (points,) = ask(f"plugin/projector/info?{urllib.parse.urlencode({'run': name})}")["embeddings"]
        assert points["tensorShape"] == [360, 16] and points["sprite"]["imagePath"]
        query = urllib.parse.urlencode({"run": name, "conceptual": "false"})
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/data/plugin/graphs/graph?{query}", timeout=10) as answer:
            graph = answer.read().decode()
        assert all(
            f'"stage_1/attention_1/{part}"' in graph for part in ("before", "trunk", "mask", "multiply", "after")
        )
        assert ask("plugin/histograms/tags")[name]
        experiment = json.dumps(ask("plugin/hparams/experiment", b"{}"))
        assert "learning_rate" in experiment and "final/test_error_percent" in experiment
        query = urllib.parse.urlencode({"tag": "masks/stage_1_attention_1", "run": name, "sample": 0})
        assert len(ask(f"plugin/images/images?{query}")) == 3
    finally:
        server.terminate()
        server.wait(20)


def test_a_run_without_validation_and_with_test_flip_has_a_result(tmp_path, capsys):
    arguments = [
        "--validation-split=0",
        "--test-flip",
        "--epochs=2",
        "--ema=0.9",
        "--data-on-device",
        "--masks-every=0",
    ]
    tiny_main(*ARGUMENTS, *arguments, "--logs", str(tmp_path), build=small.build)
    result = json.loads((find_run(tmp_path) / "result.json").read_text())
    assert result["validation_error_percent"] is None and 0 <= result["test_error_flip_percent"] <= 100
    assert "with mirror image" in capsys.readouterr().out
    assert not (find_run(tmp_path) / "best.keras").exists()


@pytest.mark.skipif(
    not (shutil.which("chromium") and shutil.which("chromedriver") and importlib.util.find_spec("selenium")),
    reason="needs Chromium, its driver and selenium",
)
def test_tensorboard_s_pages_are_drawn_in_a_browser(logs, tmp_path):
    pages = ("time-series", "custom-scalars", "pr-curves", "images", "hparams", "projector")
    command = [sys.executable, "docs/screenshots.py", str(logs), str(tmp_path), "--pages", *pages]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    for page in pages:
        picture = Image.open(tmp_path / f"tensorboard-{page}.png").convert("RGB")
        pixels = np.asarray(picture.convert("L"))
        assert pixels.shape[1] == 1700 and pixels.std() > 15
        if page in ("time-series", "custom-scalars", "pr-curves"):  # curves are coloured, the rest of the page is grey
            shown = np.asarray(picture)[150:, 400:].astype(int)
            assert (shown.max(axis=-1) - shown.min(axis=-1) > 60).sum() > 300, page


def test_help_shows_every_choice_without_a_framework(tmp_path):
    run = run_python("import training_cifar10; training_cifar10.main()", "--help", KERAS_BACKEND="none of them")
    out, err = run.communicate(timeout=60)
    assert run.returncode == 0 and err == ""
    for arguments in (
        "attention_92",
        "cifar100",
        "--validation-split",
        "mixed_bfloat16",
        "(default: 64)",
        "\nnetwork:\n",
    ):
        assert arguments in out


@pytest.mark.parametrize(
    "arguments, said",
    [
        ("--epoch 3", "did you mean --epochs?"),
        ("--model attention_57x", "model: the name of a network must be one of attention_DEPTH, attentionnext_DEPTH"),
        ("--data-dir nowhere", "--data-dir nowhere does not exist"),
        ("--dataset digits --samples 2", "2 of 1293 images cannot be split off by class"),
        ("--dataset digits --p 2", "depth must be 54 m + 20 with p=2, t=2"),
        ("--dataset digits --batch-size 2000", "batch_size=2000 needs at least as many training images, received 1293"),
        ("--dataset digits --logs /proc/Logs", "--logs /proc/Logs cannot be written"),
    ],
)
def test_impossible_runs_end_in_one_line(arguments, said, capsys, tmp_path):
    logs = [] if "--logs" in arguments else ["--logs", str(tmp_path / "Logs")]
    with pytest.raises(SystemExit) as stop:
        training_cifar10.main([*arguments.split(), *logs])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and err.startswith("training_cifar10.py: error: ")
    assert not (tmp_path / "Logs").exists()


def test_a_process_prints_only_one_line(tmp_path):
    """This includes errors after the start of the framework, which writes many notes."""
    for arguments, environment, said in (
        (["--dataset=digits", "--logs=/proc/Logs"], {}, "--logs /proc/Logs cannot be written"),
        (["--dataset=digits"], {"KERAS_BACKEND": "none"}, "KERAS_BACKEND must be one of tensorflow, jax"),
    ):
        run = run_python("import training_cifar10; training_cifar10.main()", *arguments, **environment)
        out, err = run.communicate(timeout=60)
        assert run.returncode == 2 and out == "" and err.count("\n") == 1 and said in err


@pytest.mark.parametrize("arguments", [["--data-dir", "two\nlines"], ["--resume", "two\nlines"]])
def test_a_path_of_two_lines_is_printed_in_one(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        training_cifar10.main(arguments)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and r"two\nlines" in err and err.count("\n") == 1


def test_two_runs_in_one_second_get_two_folders(tmp_path, monkeypatch):
    from Training.runs import run_folder

    monkeypatch.setattr(time, "strftime", lambda form: "20260101-120000")
    made = [run_folder.create(tmp_path, "attention_56-arl").name for _ in range(3)]
    start = "20260101-120000-attention_56-arl"
    assert made == [start, f"{start}-2", f"{start}-3"]


def test_a_run_s_label_says_what_is_trained():
    from Training.recipe import RECIPES, Recipe, label_run

    assert label_run(Recipe()) == "attention_56-arl-cifar10"
    assert label_run(Recipe(**RECIPES["quick"], dataset="digits", seed=3)) == "attention_56-arl-digits-quick"
    changed = Recipe(**{**RECIPES["race"], "learning": "nal", "epochs": 20, "weights": "/home/me/a run|x"})
    assert label_run(changed) == "attention_56-nal-cifar10-race-weights=_home_me_a_run_x-epochs=20"
    long = Recipe(weights="x" * 4000, epochs=7, batch_size=3, momentum=0.5, dropout=0.1, cutout=2)
    assert len(label_run(long)) <= 100


def test_trains_on_jax_without_tensorflow(tmp_path):
    blocked = tmp_path / "blocked" / "tensorflow"
    blocked.mkdir(parents=True)
    (blocked / "__init__.py").write_text("raise ImportError('TensorFlow is not installed')")
    logs = tmp_path / "Logs"
    run = run_python(
        small.MAIN, *ARGUMENTS, "--logs", str(logs), "--jit", KERAS_BACKEND="jax", paths=[str(blocked.parent)]
    )  # fmt: skip
    out, err = run.communicate(timeout=300)
    assert run.returncode == 0, err
    result = json.loads((find_run(logs) / "result.json").read_text())
    assert result["backend"] == "jax" and "test accuracy" in out
    events, tags = read_tags(find_run(logs) / "train")
    assert tags >= SCALARS and events.Tags()["graph"]


def test_without_tensorboard_there_is_one_warning_and_a_result(tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "tensorboard" else found(name, *rest)
    )
    with pytest.warns(UserWarning) as warned:
        tiny_main(*ARGUMENTS, "--logs", str(tmp_path), build=small.build)
    said = [str(each.message) for each in warned]
    assert said.count("tensorboard is not installed: no event files are written") == 1
    names = {path.name for path in find_run(tmp_path).iterdir()}
    assert "result.json" in names and not names & {"train", "validation"}

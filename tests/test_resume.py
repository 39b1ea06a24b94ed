"""Runs that are killed, stopped, out of space or damaged are resumed to the same end."""

import errno
import hashlib
import io
import json
import os
import random
import resource
import shutil
import signal
import tarfile
import zipfile
from pathlib import Path

import keras
import numpy as np
import pytest

import training_cifar10
from benchmarks import fuzz, kill
from tests.support import forks, small, tiny
from Training import files
from Training.data import datasets
from Training.engine import checkpointing, fit
from Training.engine.optimizers import make_optimizer
from Training.errors import InputError, RunError, format_os_error
from Training.recipe import OPTIMIZERS, Recipe
from Training.runs import checkpoint, environment, run_folder, saved
from Training.runs.checkpoint import list_checkpoints, pack, unpack
from Training.tools import export

ROOT = Path(__file__).parent.parent

ARGUMENTS = [
    "--dataset=digits",
    "--samples=64",
    "--batch-size=16",
    "--epochs=3",
    "--warmup-epochs=1",
    "--masks-every=0",
]


def tiny_main(*arguments, build=small.build):
    training_cifar10.main(list(arguments), build)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The Logs folder of an undisturbed run."""
    logs = tmp_path_factory.mktemp("whole")
    tiny_main(*ARGUMENTS, "--checkpoint-steps=3", "--logs", str(logs))
    return kill.find_run(logs)


@pytest.fixture
def run(whole, tmp_path):
    """A copy of that run. Tests remove its last checkpoint to resume from the one before."""
    folder = tmp_path / "Logs" / whole.name
    shutil.copytree(whole, folder)
    return folder


def test_kills_change_nothing(tmp_path):
    arguments = [*kill.ARGUMENTS, "--epochs=12"]
    tiny_main(*arguments, f"--logs={tmp_path}/whole")
    # This seed draws one kill of each kind: at the end of an epoch, during a save, at a random moment.
    came = kill.kill_and_resume(f"{tmp_path}/killed", 3, 2.0, random.Random(88), arguments, small.MAIN, forks.start)
    assert len(came) >= 2
    assert kill.find_differences(kill.find_run(tmp_path / "whole"), kill.find_run(tmp_path / "killed")) == []


@pytest.mark.backends
def test_a_run_resumes_exactly_within_an_epoch(run, whole):
    newest, before = list_checkpoints(run)
    assert unpack(before.read_bytes())[0]["step"] == 3
    newest.unlink()
    (run / "last.keras").unlink()
    tiny_main("--resume", str(run))
    assert kill.find_differences(whole, run) == []
    models = [keras.models.load_model(folder / "last.keras") for folder in (run, whole)]
    for a, b in zip(*(model.get_weights() for model in models), strict=True):
        np.testing.assert_array_equal(a, b)


def test_an_interrupted_epoch_whose_end_is_not_saved_resumes_exactly(tmp_path, monkeypatch):
    """Its rest is a call of `fit` of its own, and the next call must not start from the checkpoint within the epoch."""
    arguments = [*ARGUMENTS, "--epochs=5", "--checkpoint-epochs=1000", "--patience=4"]
    tiny_main(*arguments, "--logs", str(tmp_path / "whole"))
    run = None
    for last in (6, 9):  # epoch 2 after 2 of 4 steps; epoch 3, the next one, after its first
        monkeypatch.setattr(checkpointing, "should_stop", lambda devices, step, last=last: step == last)
        with pytest.raises(SystemExit):
            tiny_main(*(["--resume", str(run)] if run else [*arguments, "--logs", str(tmp_path / "stopped")]))
        run = kill.find_run(tmp_path / "stopped")
        state, _ = unpack(list_checkpoints(run)[0].read_bytes())
        assert (state["epoch"], state["step"]) == divmod(last, 4)
    monkeypatch.undo()
    tiny_main("--resume", str(run))
    assert kill.find_differences(kill.find_run(tmp_path / "whole"), run) == []


@pytest.mark.parametrize("damage", ["torn", "flipped byte", "empty"])
def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_is_used(run, whole, damage, capsys):
    newest = list_checkpoints(run)[0]
    raw = bytearray(newest.read_bytes())
    if damage == "flipped byte":
        raw[len(raw) // 2] ^= 1
    newest.write_bytes({"torn": raw[: len(raw) // 2], "empty": b"", "flipped byte": raw}[damage])
    tiny_main("--resume", str(run))
    assert f"{newest} cannot be used" in capsys.readouterr().out
    assert kill.find_differences(whole, run) == []


def test_finished_run_is_evaluated_again_and_not_changed(run, whole):
    (run / "result.json").unlink()
    history = (run / "history.csv").read_text()
    tiny_main("--resume", str(run))
    assert (run / "history.csv").read_text() == history
    results = [json.loads((folder / "result.json").read_text()) for folder in (run, whole)]
    assert results[0] == results[1]


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_save_the_run_and_print_how_to_resume(tmp_path, number, code):
    process = forks.start(*ARGUMENTS, "--epochs=3000", f"--logs={tmp_path}", script=small.MAIN)
    for line in process.stdout:
        if line.startswith("epoch    2 of 3000 "):
            process.send_signal(number)
            break
    _, err = process.communicate(timeout=120)
    folder = kill.find_run(tmp_path)
    last = err.splitlines()[-1]
    assert process.returncode == code and "Traceback" not in err
    assert last.startswith("Stopped by SIG") and last.endswith(f"python training_cifar10.py --resume {folder}")
    state, _ = unpack(list_checkpoints(folder)[0].read_bytes())
    assert state["epoch"] >= 2


def expect_refusal(capsys, code, *arguments):
    with pytest.raises(SystemExit) as stop:
        tiny_main(*arguments)
    assert stop.value.code == code
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "Traceback" not in err
    return err


def test_no_space_left_keeps_the_last_good_checkpoint(tmp_path):
    """A limit on the size of files stands in for a full disk: writing fails in the middle of a file."""
    process = forks.start(*ARGUMENTS, "--epochs=3000", f"--logs={tmp_path}", script=small.MAIN)
    for line in process.stdout:
        if line.startswith("epoch    2 of 3000 "):
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (20_000, 20_000))
            break
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1 and "Traceback" not in err
    assert "written" in err.splitlines()[-1]
    folder = kill.find_run(tmp_path)
    states = [unpack(path.read_bytes())[0]["epoch"] for path in list_checkpoints(folder)]
    assert states and not list((folder / "backup").glob("*.new"))


@pytest.mark.parametrize("name", ["recipe.json", "split.json"])
def test_no_space_left_at_the_start_is_one_line(name, tmp_path, monkeypatch, capsys):
    write = files.replace_file

    def full(path, raw):
        if path.name == name:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, raw)

    monkeypatch.setattr(run_folder, "replace_file", full)
    err = expect_refusal(capsys, 2, *ARGUMENTS, "--logs", str(tmp_path))
    assert f"{name} cannot be written: No space left on device" in err


@pytest.mark.parametrize("how", ["gone", "read-only"])
def test_a_folder_lost_during_training_ends_in_one_line(how, tmp_path, monkeypatch, capsys):
    from Training.engine import event_callbacks

    class Lose(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            folder = kill.find_run(tmp_path)
            if how == "gone":
                shutil.rmtree(folder)
            else:  # a file in place of the folder: permissions would not stop root
                shutil.rmtree(folder / "backup", ignore_errors=True)
                (folder / "backup").write_text("")

    monkeypatch.setattr(event_callbacks, "make_event_callbacks", lambda *_: [Lose()])
    err = expect_refusal(capsys, 1, *ARGUMENTS, "--logs", str(tmp_path))
    assert "written" in err


@pytest.mark.backends
def test_loss_that_is_not_finite_names_step_and_rate(tmp_path, capsys):
    def broken(recipe, data):
        network = small.build(recipe, data)
        network.get_layer("logits").bias.assign(np.full(10, np.inf))
        return network

    with pytest.raises(SystemExit) as stop:
        tiny_main(*ARGUMENTS, "--logs", str(tmp_path), build=broken)
    err = capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "a notebook continues and needs Ctrl-C"
    assert stop.value.code == 1 and err.count("\n") == 1
    assert "the loss is nan at step 1 of epoch 1, learning rate 0.025: there is no checkpoint yet" in err


def test_second_process_on_one_folder_is_refused(run, capsys):
    held = run_folder.lock(run)
    assert "another process is training in" in expect_refusal(capsys, 2, "--resume", str(run))
    held.close()


@pytest.mark.parametrize(
    "name, said", [("split.json", "it is not a JSON object"), ("lock", "must be a regular file, but is a directory")]
)
def test_files_of_a_run_that_cannot_be_used_are_named(run, capsys, name, said):
    (run / name).unlink()
    (run / name).write_text("[1]") if name == "split.json" else (run / name).mkdir()
    err = expect_refusal(capsys, 2, "--resume", str(run))
    assert said in err and str(run / name) in err


def test_changed_recipe_is_refused_by_field(run, capsys):
    recipe = json.loads((run / "recipe.json").read_text())
    (run / "recipe.json").write_text(json.dumps({**recipe, "learning_rate": 0.2, "epochs": 4}))
    before = kill.read_points(run)
    err = expect_refusal(capsys, 2, "--resume", str(run))
    assert kill.read_points(run) == before, "a refusal must not change the run"
    assert "another recipe: learning_rate (checkpoint: 0.1, now: 0.2)" in err and "epochs" not in err


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"torn")])
def test_a_run_without_a_usable_checkpoint_is_refused_and_not_changed(run, damage, capsys):
    for path in list_checkpoints(run):
        damage(path)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert "starting over would lose its history" in expect_refusal(capsys, 2, "--resume", str(run))
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_run_that_ended_before_its_first_checkpoint_starts_over(tmp_path):
    (tmp_path / "history.csv").write_text("epoch,loss\n0,1.0\n1,1.0\n")
    run_folder.refuse_to_start_over(tmp_path, epochs_between=2)
    with pytest.raises(InputError, match="starting over would lose its history"):
        run_folder.refuse_to_start_over(tmp_path, epochs_between=1)


def test_a_run_older_than_a_field_of_the_recipe_resumes(run):
    (newest, before), name = list_checkpoints(run), "alternate_flip"
    newest.unlink()
    state, arrays = unpack(before.read_bytes())
    assert state["recipe"].pop(name) is False
    before.write_bytes(pack(state, arrays))
    recipe = json.loads((run / "recipe.json").read_text())
    (run / "recipe.json").write_text(json.dumps({key: value for key, value in recipe.items() if key != name}))
    tiny_main("--resume", str(run))
    assert len(kill.read_history(run)) == 3


def test_a_finished_run_that_is_resumed_is_unfinished(run, monkeypatch, capsys):
    def stopped(*_):
        raise RunError("stopped before the end")

    monkeypatch.setattr("Training.engine.evaluation.evaluate", stopped)
    assert "stopped before the end" in expect_refusal(capsys, 1, "--resume", str(run), "--epochs", "4")
    assert not (run / "result.json").exists() and not (run / "predictions.csv").exists()


def test_epochs_may_grow(run):
    tiny_main("--resume", str(run), "--epochs", "4")
    assert [row["epoch"] for row in kill.read_history(run)] == ["0", "1", "2", "3"]
    assert json.loads((run / "result.json").read_text())["epochs"] == 4


def test_early_stopping_stays_stopped(tmp_path, capsys):
    arguments = [*ARGUMENTS, "--epochs=40", "--patience=1", "--learning-rate=1e-9", "--logs", str(tmp_path)]
    tiny_main(*arguments)
    folder = kill.find_run(tmp_path)
    epochs = len(kill.read_history(folder))
    assert epochs < 40
    tiny_main("--resume", str(folder))
    assert len(kill.read_history(folder)) == epochs
    assert f"--patience 1 stopped the run after {epochs} epochs" in capsys.readouterr().out


def test_checkpoint_bytes_round_trip_and_show_any_change():
    arrays = {"a": np.arange(6, dtype="float32").reshape(2, 3), "b": np.array(7, "int64"), "c": np.zeros((0, 3))}
    arrays["d"] = np.asfortranarray(arrays["a"])
    raw = pack({"epoch": 3}, arrays)
    state, back = unpack(raw)
    assert state == {"epoch": 3} and list(back) == list(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, back[name])
        assert array.dtype == back[name].dtype
    chance = random.Random(0)
    for _ in range(300):
        changed = bytearray(raw)
        changed[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
        with pytest.raises(ValueError, match="checkpoint|checksum"):
            unpack(bytes(changed))
        with pytest.raises(ValueError, match="checkpoint|checksum"):
            unpack(raw[: chance.randrange(len(raw))])


def test_only_the_two_newest_are_kept_and_a_faulty_disk_is_noticed(tmp_path, monkeypatch):
    for step in (1, 2, 3):
        checkpoint.write(tmp_path, step, {"step": step}, {})
    assert [unpack(path.read_bytes())[0]["step"] for path in list_checkpoints(tmp_path)] == [3, 2]
    monkeypatch.setattr(checkpoint, "replace_file", lambda path, raw: path.write_bytes(raw[:-1]))
    with pytest.raises(RunError, match="the disk may be faulty"):
        checkpoint.write(tmp_path, 4, {"step": 4}, {})
    assert len(list_checkpoints(tmp_path)) == 2


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    model.optimizer.build(model.trainable_variables)
    saver = checkpointing.Checkpoints(tmp_path, {}, 4, {})
    saver.set_model(model)
    saver.epoch = 0
    model.layers[0].bias.assign([np.nan])
    with pytest.raises(RunError, match="dense/bias is not finite after epoch 1: there is no checkpoint"):
        saver._save(1, 0)
    with pytest.raises(RunError, match="dense/bias is not finite after step 3 of epoch 2"):
        saver._save(1, 3)
    assert not list_checkpoints(tmp_path)


def test_a_checkpoint_of_another_network_is_refused():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)], name="line")
    model.compile("sgd", "mse")
    model.optimizer.build(model.trainable_variables)
    arrays = checkpointing.name_arrays(model)
    assert list(arrays) == ["line/dense/kernel", "line/dense/bias", "sgd/iteration", "sgd/learning_rate"]
    for changed, said in (
        ({0: np.zeros(3)}, "0 has the shape .3,., here .2, 1."),
        ({**arrays, "line/dense/bias": np.zeros(2)}, "line/dense/bias has the shape .2,., here .1,."),
        ({**arrays, "line/dense/gamma": np.zeros(1)}, "it has line/dense/gamma, which this network lacks"),
        ({name: arrays[name] for name in list(arrays)[1:]}, "it lacks line/dense/kernel"),
        ({}, "it lacks"),
    ):
        with pytest.raises(RunError, match=f"belongs to another network: {said}"):
            checkpointing.restore(model, changed)


def test_arrays_are_assigned_by_name_in_any_order():
    """Gamma, beta, mean and variance of a normalization have the same shape, so only names distinguish them."""
    for _ in range(2):  # Keras numbers the default names in the second model
        model = keras.Sequential(
            [keras.Input((3,)), keras.layers.BatchNormalization(), keras.layers.Dropout(0.1)], name="line"
        )
        model.compile("adam", "mse")
        model.optimizer.build(model.trainable_variables)
        arrays = {name: array + i for i, (name, array) in enumerate(checkpointing.name_arrays(model).items())}
        checkpointing.restore(model, dict(reversed(arrays.items())))
        for name, array in checkpointing.name_arrays(model).items():
            np.testing.assert_array_equal(array, arrays[name])
        assert "line/batch_normalization/gamma" in arrays and "adam/line_batch_normalization_beta_momentum" in arrays
        assert "seed_generator/seed_generator_state" in arrays


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_names_of_a_checkpoint_are_unique_and_the_same_for_every_model(name):
    """Two normalizations have eight arrays of the same shape, and every optimizer adds more of them."""

    def make():
        norms = [keras.layers.BatchNormalization(name=each) for each in ("first", "second")]
        model = keras.Sequential([keras.Input((3,)), *norms, keras.layers.Dense(3)], name="line")
        model.compile(make_optimizer(Recipe(optimizer=name, weight_decay_kind="auto", learning_rate=0.0), 4), "mse")
        model.optimizer.build(model.trainable_variables)
        return model

    first = list(checkpointing.name_arrays(make()))
    second = make()
    assert first == list(checkpointing.name_arrays(second))
    assert len(set(first)) == len(first)
    if name != "adafactor":  # Keras names its rows and columns after the weight, without the weight's layer
        assert not [each for each in first if "#" in each]
    numbered = {f"{key}_7" if key == "variable" else key: v for key, v in checkpointing.name_arrays(second).items()}
    checkpointing.restore(second, numbered)  # checkpoints of earlier versions have this number


def test_a_checkpoint_of_layers_in_another_order_is_refused():
    """By position, all shapes would fit."""

    def make(*names):
        layers = [keras.layers.Dense(3, name=name) for name in names]
        model = keras.Sequential([keras.Input((3,)), *layers], name="line")
        model.compile("sgd", "mse")
        model.optimizer.build(model.trainable_variables)
        return model

    arrays = checkpointing.name_arrays(make("one", "two"))
    with pytest.raises(RunError, match="belongs to another network: it lacks line/three/kernel"):
        checkpointing.restore(make("one", "three"), arrays)
    turned = make("two", "one")
    checkpointing.restore(turned, arrays)
    np.testing.assert_array_equal(turned.get_layer("one").kernel, arrays["line/one/kernel"])


def test_fuzzed_files_of_every_kind_raise_one_line_or_nothing():
    verdicts = fuzz.fuzz({kind: count // 40 for kind, count in fuzz.COUNTS.items()}, seed=11)
    for kind, counts in verdicts.items():
        assert not [verdict for verdict in counts if verdict.startswith("wrong")]
        assert counts["refused"]
        assert counts["read"] or kind == "checkpoints"  # few changes of a checkpoint keep its checksum correct


@pytest.fixture
def old_run(tmp_path):
    """A run of commit 9187e69, killed in its last epoch; its checkpoints have arrays without names."""
    with tarfile.open(ROOT / "tests" / "data" / "run-9187e69.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    return folder


def test_a_run_of_commit_9187e69_resumes_to_its_end(old_run):
    newest, before = list_checkpoints(old_run)
    expected, history = unpack(newest.read_bytes())[1], kill.read_history(old_run)
    assert list(expected) == list(range(len(expected)))
    newest.unlink()
    tiny_main("--resume", str(old_run), build=tiny.tiny_build)
    arrays = unpack(list_checkpoints(old_run)[0].read_bytes())[1]
    assert "stem_convolve/kernel" in arrays
    for a, b in zip(expected.values(), arrays.values(), strict=True):  # processors differ in rounding
        np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-4)
    for then, now in zip(history, kill.read_history(old_run), strict=True):
        assert float(then["loss"]) == pytest.approx(float(now["loss"]), rel=1e-3)
    assert (old_run / "environment-2.json").exists(), "the first part's versions are kept"


def test_a_network_of_commit_9187e69_predicts_and_is_exported(old_run, tmp_path, capsys):
    result = json.loads((old_run / "result.json").read_text())
    network = saved.load(saved.find(old_run))
    digits = datasets.load("digits").test
    predicted = network.predict(digits.images, verbose=0).argmax(axis=-1)
    assert np.mean(predicted == digits.labels) == pytest.approx(result["test_accuracy"], abs=0.01)
    export.main([str(old_run), "--to", "savedmodel", "--images", "4", "--output", str(tmp_path / "saved")])
    assert (tmp_path / "saved").exists() and "largest difference" in capsys.readouterr().out.lower()


RIGHT = {"epoch": 1, "step": 0, "stopped": False, "recipe": {}, "callbacks": {"meter": {"spent": 1.0}},
         "metrics": [], "history": None, "events": {"train/events": 3}}  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"epoch": "x"}, {"epoch": -1}, {"epoch": True}, {"step": 1.5}, {"epoch": 10**400}, {"stopped": 0},
        {"recipe": []}, {"callbacks": {"meter": 1}}, {"callbacks": {"meter": {"spent": "1"}}},
        {"metrics": [["x"]]}, {"metrics": {}}, {"history": 3}, {"events": []}, {"events": {"a": -1}}, {"events": None},
    ],
    ids=str,
)  # fmt: skip
def test_a_checkpoint_with_a_correct_checksum_and_an_invalid_state_counts_as_damaged(changes, tmp_path):
    checkpoint.write(tmp_path, 1, RIGHT, {})
    checkpoint.write(tmp_path, 2, {**RIGHT, **changes}, {})
    said = []
    assert checkpoint.load_newest(tmp_path, said.append)[0] == RIGHT
    assert len(said) == 1 and f"its {next(iter(changes))} cannot be" in said[0]


@pytest.mark.parametrize("name", RIGHT)
def test_a_checkpoint_that_lacks_a_part_of_the_state_counts_as_damaged(name, tmp_path):
    checkpoint.write(tmp_path, 1, {key: value for key, value in RIGHT.items() if key != name}, {})
    said = []
    assert checkpoint.load_newest(tmp_path, said.append) is None
    assert f"its state has no '{name}'" in said[0]


def seal(content):
    """Return a checkpoint with this content and a correct checksum."""
    return checkpoint.MAGIC + hashlib.sha256(content).hexdigest().encode() + b"\n" + content


def make_zip(compression=zipfile.ZIP_STORED, **members):
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w", compression) as file:
        for name, content in members.items():
            file.writestr(name.replace("__", "."), content)
    return seal(body.getvalue())


def make_npy(header, content=b""):
    raw = f"{header:<118}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(raw).to_bytes(2, "little") + raw + content


def make_array_case(text, content=b""):
    return make_zip(**{"state__json": "{}", "names__json": '["a"]', "0__npy": make_npy(text, content)})


@pytest.mark.parametrize(
    "make",
    [
        lambda: seal(b""),
        lambda: seal(b"PK\x05\x06" + bytes(18)),
        lambda: make_zip(state__json="{"),
        lambda: make_zip(state__json="{}", names__json='["a"]'),
        lambda: make_zip(state__json="{}", names__json="[1]", **{"0__npy": make_npy("x")}),
        lambda: make_zip(state__json="[" * 100_000, names__json="[]"),
        lambda: make_zip(zipfile.ZIP_DEFLATED, state__json=" " * 10**6 + "{}", names__json="[]"),
        lambda: make_array_case("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }"),
        lambda: make_array_case("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }"),
        lambda: make_array_case("{'descr': '|O', 'fortran_order': False, 'shape': (), }", b"c" * 8),
        lambda: make_array_case("{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }", b"1234"),
        lambda: make_array_case("no header"),
    ],
)
def test_any_content_with_a_correct_checksum_is_read_or_refused(make, tmp_path):
    (tmp_path / "backup").mkdir()
    (tmp_path / "backup" / "step-000000001.checkpoint").write_bytes(make())
    said = []
    assert checkpoint.load_newest(tmp_path, said.append) is None
    assert len(said) == 1 and "cannot be used" in said[0] and "\n" not in said[0]


def test_damaged_checkpoints_with_higher_numbers_do_not_replace_good_ones(tmp_path):
    for step in (8, 9):
        checkpoint.write(tmp_path, step, RIGHT, {})
        list_checkpoints(tmp_path)[0].write_bytes(b"torn")
    checkpoint.write(tmp_path, 3, RIGHT, {})
    checkpoint.write(tmp_path, 4, RIGHT, {})
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"step-{n:09d}.checkpoint" for n in (4, 3)]


@pytest.mark.parametrize(
    "name", ["lock", "history.csv", "backup", "train", "train/events", "best.keras", "recipe.json"]
)
def test_a_link_in_a_run_s_folder_is_refused_and_its_target_not_changed(name, tmp_path):
    (tmp_path / "run" / "train").mkdir(parents=True)
    target = tmp_path / "target"
    target.mkdir() if name in ("backup", "train") else target.write_text("kept")
    (tmp_path / "run" / "train").rmdir() if name == "train" else None
    (tmp_path / "run" / name).symlink_to(target)
    with pytest.raises(InputError, match=f"{name} is a symbolic link"):
        run_folder.reopen(tmp_path / "run")
    assert target.is_dir() or target.read_text() == "kept"


def test_stale_unfinished_files_are_replaced_and_not_followed(run, whole, tmp_path):
    target = tmp_path / "target"
    target.write_text("kept")
    newest, _ = list_checkpoints(run)
    newest.unlink()
    for name in ("history.csv.new", "recipe.json.new", "result.json.new", "last.new.keras", "best.new.keras",
                 f"backup/{newest.name}.new"):  # fmt: skip
        (run / name).symlink_to(target)
    tiny_main("--resume", str(run))
    assert target.read_text() == "kept" and kill.find_differences(whole, run) == []
    assert (run / "last.keras").is_file() and not (run / "last.keras").is_symlink()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_without_locks_is_not_mistaken_for_another_process(number, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    said = []
    monkeypatch.setattr("fcntl.flock", refuse)
    assert run_folder.lock(tmp_path, said.append) is None
    assert said == [
        f"{tmp_path}/lock cannot be locked ({os.strerror(number)}): no other process may train in this folder"
    ]


def test_only_write_errors_are_reported_as_such():
    full = OSError(errno.ENOSPC, "No space left on device", "file")
    assert format_os_error(full, "run") == "file cannot be written: No space left on device"
    for error in (OSError(errno.EIO, "Input/output error"), OSError(errno.EMFILE, "Too many open files", "x.png")):
        assert format_os_error(error, "run") == f"{error.filename or 'run'}: {error.strerror}"
    assert format_os_error(OSError("a text alone"), "run") == "run: a text alone"


def test_another_machine_is_recorded_and_named(tmp_path):
    first = {"python": "3.11", "packages": {"keras": "3.15.1"}, "backend": "jax", "device": "a", "git_commit": "1"}
    assert environment.record_environment(tmp_path, first) == []
    assert environment.record_environment(tmp_path, first) == []
    assert environment.record_environment(tmp_path, {**first, "git_commit": "2"}) == []
    other = {**first, "device": "b", "packages": {"keras": "3.16", "jax": None}}
    changed = environment.record_environment(tmp_path, other)
    assert changed == ["device b (before: a)", "keras 3.16 (before: 3.15.1)"]
    names = [path.name for path in environment.list_environments(tmp_path)]
    assert names == ["environment.json", "environment-2.json", "environment-3.json"]
    assert json.loads((tmp_path / "environment.json").read_text()) == first


@pytest.mark.parametrize("content", ["", "[]", "{", '{"packages": 3, "device": {"a": []}}'])
def test_an_unreadable_environment_does_not_stop_the_run(content, tmp_path):
    (tmp_path / "environment.json").write_text(content)
    environment.record_environment(tmp_path, {"python": "3", "backend": "b", "device": "d", "packages": {}})
    assert (tmp_path / "environment.json").read_text() == content


def test_fewer_epochs_in_an_edited_recipe_are_refused(run, capsys):
    recipe = json.loads((run / "recipe.json").read_text())
    (run / "recipe.json").write_text(json.dumps({**recipe, "epochs": 2}))
    assert "another recipe: epochs (checkpoint: 3, now: 2)" in expect_refusal(capsys, 2, "--resume", str(run))


def test_a_checkpoint_beyond_the_end_of_the_run_is_refused():
    fit.refuse_impossible_position({"epoch": 3, "step": 0}, epochs=3, steps_per_epoch=4)
    for state in ({"epoch": 4, "step": 0}, {"epoch": 3, "step": 1}, {"epoch": 0, "step": 4}):
        with pytest.raises(RunError, match="it belongs to another run"):
            fit.refuse_impossible_position(state, epochs=3, steps_per_epoch=4)


def test_missing_or_short_event_files_are_named(tmp_path):
    for name in ("events.out.tfevents.1", "events.out.tfevents.2"):
        (tmp_path / name).write_bytes(b"12345")
    sizes = {"events.out.tfevents.1": 3, "events.out.tfevents.2": 9, "train/events.out.tfevents.3": 1}
    said = []
    run_folder.rewind(tmp_path, {"history": "a", "events": sizes}, said.append)
    assert (tmp_path / "events.out.tfevents.1").read_bytes() == b"123"
    assert len(said) == 2 and "tfevents.3 is missing" in said[0] and "tfevents.2 is shorter" in said[1]


def test_the_lock_is_released_with_the_file(tmp_path):
    held = run_folder.lock(tmp_path)
    with pytest.raises(InputError, match="another process is training in"):
        run_folder.lock(tmp_path)
    held.close()
    run_folder.lock(tmp_path).close()
    assert os.path.exists(tmp_path / "lock")

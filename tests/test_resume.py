"""A run that cannot be lost: killed, stopped, out of space, damaged, and resumed to the same end."""

import errno
import json
import os
import random
import resource
import shutil
import signal
from pathlib import Path

import keras
import numpy as np
import pytest

import training_cifar10
from benchmarks import fuzz, kill
from tests.support import tiny
from Training import files
from Training.engine import checkpointing
from Training.errors import InputError, RunError
from Training.runs import checkpoint, run_folder
from Training.runs.checkpoint import list_checkpoints, pack, unpack

ROOT = Path(__file__).parent.parent

WORDS = ["--dataset=digits", "--samples=64", "--batch-size=16", "--epochs=3", "--warmup-epochs=1", "--masks-every=0"]


def tiny_main(*arguments, build=tiny.tiny_build):
    training_cifar10.main(list(arguments), build)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The Logs folder of an undisturbed run."""
    logs = tmp_path_factory.mktemp("whole")
    tiny_main(*WORDS, "--checkpoint-steps=3", "--logs", str(logs))
    return kill.only_run(logs)


@pytest.fixture
def run(whole, tmp_path):
    """A copy of that run, as if it had been killed behind its last checkpoint but one."""
    folder = tmp_path / "Logs" / whole.name
    shutil.copytree(whole, folder)
    return folder


def test_five_kills_change_nothing(tmp_path):
    kill.finish(kill.start(*kill.WORDS, f"--logs={tmp_path}/whole"))
    came = kill.disturbed(f"{tmp_path}/killed", 5, 4.0, random.Random(3))
    assert len(came) >= 3
    assert kill.differences(kill.only_run(tmp_path / "whole"), kill.only_run(tmp_path / "killed")) == []


@pytest.mark.backends
def test_within_an_epoch_the_run_goes_on_exactly(run, whole):
    newest, before = list_checkpoints(run)
    assert unpack(before.read_bytes())[0]["step"] == 3
    newest.unlink()
    (run / "last.keras").unlink()
    tiny_main("--resume", str(run))
    assert kill.differences(whole, run) == []
    models = [keras.models.load_model(folder / "last.keras") for folder in (run, whole)]
    for a, b in zip(*(model.get_weights() for model in models), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("damage", ["torn", "flipped byte", "empty"])
def test_damaged_newest_checkpoint_is_said_and_the_one_before_is_used(run, whole, damage, capsys):
    newest = list_checkpoints(run)[0]
    raw = bytearray(newest.read_bytes())
    if damage == "flipped byte":
        raw[len(raw) // 2] ^= 1
    newest.write_bytes({"torn": raw[: len(raw) // 2], "empty": b"", "flipped byte": raw}[damage])
    tiny_main("--resume", str(run))
    assert f"{newest} cannot be used" in capsys.readouterr().out
    assert kill.differences(whole, run) == []


def test_finished_run_is_evaluated_again_and_not_changed(run, whole):
    (run / "result.json").unlink()
    history = (run / "history.csv").read_text()
    tiny_main("--resume", str(run))
    assert (run / "history.csv").read_text() == history
    results = [json.loads((folder / "result.json").read_text()) for folder in (run, whole)]
    assert results[0] == results[1]


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_save_and_say_how_to_resume(tmp_path, number, code):
    process = kill.start(*WORDS, "--epochs=3000", f"--logs={tmp_path}")
    for line in process.stdout:
        if line.startswith("2 of 3000 epochs"):
            process.send_signal(number)
            break
    _, err = process.communicate(timeout=120)
    folder = kill.only_run(tmp_path)
    last = err.splitlines()[-1]
    assert process.returncode == code and "Traceback" not in err
    assert last.startswith("Stopped by SIG") and last.endswith(f"python training_cifar10.py --resume {folder}")
    state, _ = unpack(list_checkpoints(folder)[0].read_bytes())
    assert state["epoch"] >= 2


def refused(capsys, code, *arguments):
    with pytest.raises(SystemExit) as stop:
        tiny_main(*arguments)
    assert stop.value.code == code
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "Traceback" not in err
    return err


def test_no_space_left_keeps_the_last_good_checkpoint(tmp_path):
    """A limit on the size of files stands for a full disk: writing fails half-way, as there."""
    process = kill.start(*WORDS, "--epochs=3000", f"--logs={tmp_path}")
    for line in process.stdout:
        if line.startswith("2 of 3000 epochs"):
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (20_000, 20_000))
            break
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1 and "Traceback" not in err
    assert "written" in err.splitlines()[-1]
    folder = kill.only_run(tmp_path)
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
    err = refused(capsys, 2, *WORDS, "--logs", str(tmp_path))
    assert f"{name} cannot be written: No space left on device" in err


@pytest.mark.parametrize("how", ["gone", "read-only"])
def test_folder_lost_half_way_ends_in_one_line(how, tmp_path, monkeypatch, capsys):
    from Training.engine import event_callbacks

    class Lose(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            folder = kill.only_run(tmp_path)
            if how == "gone":
                shutil.rmtree(folder)
            else:  # a file where the folder was: refused also to root, whom read-only folders do not stop
                shutil.rmtree(folder / "backup", ignore_errors=True)
                (folder / "backup").write_text("")

    monkeypatch.setattr(event_callbacks, "make_event_callbacks", lambda *_: [Lose()])
    err = refused(capsys, 1, *WORDS, "--logs", str(tmp_path))
    assert "written" in err


@pytest.mark.backends
def test_loss_that_is_not_finite_names_step_and_rate(tmp_path, capsys):
    def broken(recipe, data):
        network = tiny.tiny_build(recipe, data)
        network.get_layer("logits").bias.assign(np.full(10, np.inf))
        return network

    with pytest.raises(SystemExit) as stop:
        tiny_main(*WORDS, "--logs", str(tmp_path), build=broken)
    err = capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "a notebook goes on, and needs its Ctrl-C"
    assert stop.value.code == 1 and err.count("\n") == 1
    assert "the loss is nan at step 1 of epoch 1, learning rate 0.025: there is no checkpoint yet" in err


def test_second_process_on_one_folder_is_refused(run, capsys):
    held = run_folder.lock(run)
    assert "another process trains in" in refused(capsys, 2, "--resume", str(run))
    held.close()


@pytest.mark.parametrize("name, said", [("split.json", "it is no JSON object"), ("lock", "it is a directory")])
def test_files_of_a_run_that_cannot_be_used_are_named(run, capsys, name, said):
    (run / name).unlink()
    (run / name).write_text("[1]") if name == "split.json" else (run / name).mkdir()
    err = refused(capsys, 2, "--resume", str(run))
    assert said in err and str(run / name) in err


def test_changed_recipe_is_refused_by_field(run, capsys):
    recipe = json.loads((run / "recipe.json").read_text())
    (run / "recipe.json").write_text(json.dumps({**recipe, "learning_rate": 0.2, "epochs": 4}))
    before = kill.points(run)
    err = refused(capsys, 2, "--resume", str(run))
    assert kill.points(run) == before, "a refusal must not change the run"
    assert "another recipe: learning_rate (checkpoint: 0.1, now: 0.2)" in err and "epochs" not in err


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"torn")])
def test_a_run_without_a_checkpoint_that_can_be_used_is_refused_and_left_as_it_was(run, damage, capsys):
    for path in list_checkpoints(run):
        damage(path)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert "to begin anew would lose its history" in refused(capsys, 2, "--resume", str(run))
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_run_that_was_ended_before_its_first_checkpoint_begins_anew(tmp_path):
    (tmp_path / "history.csv").write_text("epoch,loss\n0,1.0\n1,1.0\n")
    run_folder.refuse_to_start_over(tmp_path, epochs_between=2)
    with pytest.raises(InputError, match="to begin anew would lose its history"):
        run_folder.refuse_to_start_over(tmp_path, epochs_between=1)


def test_a_run_older_than_a_field_of_the_recipe_goes_on(run):
    (newest, before), name = list_checkpoints(run), "alternate_flip"
    newest.unlink()
    state, arrays = unpack(before.read_bytes())
    assert state["recipe"].pop(name) is False
    before.write_bytes(pack(state, arrays))
    recipe = json.loads((run / "recipe.json").read_text())
    (run / "recipe.json").write_text(json.dumps({key: value for key, value in recipe.items() if key != name}))
    tiny_main("--resume", str(run))
    assert len(kill.history(run)) == 3


def test_a_finished_run_that_goes_on_is_finished_no_more(run, monkeypatch, capsys):
    def stopped(*_):
        raise RunError("stopped before the end")

    monkeypatch.setattr("Training.engine.evaluation.evaluate", stopped)
    assert "stopped before the end" in refused(capsys, 1, "--resume", str(run), "--epochs", "4")
    assert not (run / "result.json").exists() and not (run / "predictions.csv").exists()


def test_epochs_may_grow(run):
    tiny_main("--resume", str(run), "--epochs", "4")
    assert [row["epoch"] for row in kill.history(run)] == ["0", "1", "2", "3"]
    assert json.loads((run / "result.json").read_text())["epochs"] == 4


def test_early_stopping_stays_stopped(tmp_path, capsys):
    words = [*WORDS, "--epochs=40", "--patience=1", "--learning-rate=1e-9", "--logs", str(tmp_path)]
    tiny_main(*words)
    folder = kill.only_run(tmp_path)
    epochs = len(kill.history(folder))
    assert epochs < 40
    tiny_main("--resume", str(folder))
    assert len(kill.history(folder)) == epochs
    assert f"stopped by --patience 1 after {epochs} epochs, and stays so" in capsys.readouterr().out


def test_checkpoint_bytes_round_trip_and_show_any_change():
    arrays = [np.arange(6, dtype="float32").reshape(2, 3), np.array(7, "int64")]
    raw = pack({"epoch": 3}, arrays)
    state, back = unpack(raw)
    assert state == {"epoch": 3}
    for a, b in zip(arrays, back, strict=True):
        np.testing.assert_array_equal(a, b)
    chance = random.Random(0)
    for _ in range(300):
        changed = bytearray(raw)
        changed[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
        with pytest.raises(ValueError, match="checkpoint|checksum"):
            unpack(bytes(changed))
        with pytest.raises(ValueError, match="checkpoint|checksum"):
            unpack(raw[: chance.randrange(len(raw))])


def test_only_the_two_newest_are_kept_and_a_bad_disk_is_noticed(tmp_path, monkeypatch):
    for step in (1, 2, 3):
        checkpoint.write(tmp_path, step, {"step": step}, [])
    assert [unpack(path.read_bytes())[0]["step"] for path in list_checkpoints(tmp_path)] == [3, 2]
    monkeypatch.setattr(checkpoint, "replace_file", lambda path, raw: path.write_bytes(raw[:-1]))
    with pytest.raises(RunError, match="the disk cannot be trusted"):
        checkpoint.write(tmp_path, 4, {"step": 4}, [])
    assert len(list_checkpoints(tmp_path)) == 2


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    model.optimizer.build(model.trainable_variables)
    saver = checkpointing.Checkpoints(tmp_path, {}, 4, {})
    saver.set_model(model)
    saver.epoch = 0
    model.layers[0].bias.assign([np.nan])
    with pytest.raises(RunError, match="a weight is not finite"):
        saver._save(1, 0)
    assert not list_checkpoints(tmp_path)


def test_other_network_s_checkpoint_is_refused():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    model.optimizer.build(model.trainable_variables)
    with pytest.raises(RunError, match="another network's"):
        checkpointing.restore(model, [np.zeros(3)])


def test_fuzzed_files_of_every_kind_raise_one_line_or_nothing():
    verdicts = fuzz.fuzz({kind: count // 40 for kind, count in fuzz.COUNTS.items()}, seed=11)
    for counts in verdicts.values():
        assert not [verdict for verdict in counts if verdict.startswith("wrong")]
        assert counts["refused"] and counts["read"]


def test_lock_is_freed_with_the_file(tmp_path):
    held = run_folder.lock(tmp_path)
    with pytest.raises(InputError, match="another process trains in"):
        run_folder.lock(tmp_path)
    held.close()
    run_folder.lock(tmp_path).close()
    assert os.path.exists(tmp_path / "lock")

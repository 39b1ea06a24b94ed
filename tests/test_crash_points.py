"""The short form of `benchmarks/crash_points.py`, and what its simulated disk keeps when the power fails."""

import contextlib
import os
from pathlib import Path

import pytest

from benchmarks import crash_points
from benchmarks.crash_points import Disk, Recorder, read_tree, write_tree
from Training.errors import RunError
from Training.files import replace_file, sync_directory
from Training.runs import checkpoint, run_folder


def list_power_states(*operations):
    disk = Disk({})
    for operation in operations:
        disk.apply(operation)
    return disk.list_states(power=True)


def test_only_what_was_synced_is_left_without_power():
    written = [("mkdir", "a"), ("create", "a/f", 1), ("write", 1, 0, b"12"), ("sync file", 1), ("write", 1, 2, b"3")]
    assert list_power_states(*written)[0] == {}
    assert list_power_states(*written, ("sync directory", "a"))[0] == {}, "the name of the folder itself is lost"
    synced = [*written, ("sync directory", "."), ("sync directory", "a")]
    assert list_power_states(*synced)[0] == {"a": None, "a/f": b"12"}
    assert list_power_states(*synced)[2] == {"a": None, "a/f": b"123"}
    renamed = [*synced, ("create", "a/g", 2), ("rename", "a/g", "a/f")]
    assert list_power_states(*renamed)[:2] == [{"a": None, "a/f": b"12"}, {"a": None, "a/f": b""}]
    assert list_power_states(*renamed, ("sync file", 2), ("sync directory", "a"))[0] == {"a": None, "a/f": b""}
    assert list_power_states(*synced, ("unlink", "a/f"))[0]["a/f"] == b"12"


def write_run(logs):
    """Write what a run writes into its folder, without training: two checkpoints and a result."""
    folder = run_folder.create(logs, "run")
    with run_folder.lock(folder):
        run_folder.write(folder, "recipe.json", "{}")
        (folder / "train").mkdir()
        with open(folder / "train" / "events.out.tfevents.1", "xb") as events:
            for step in (1, 2, 3):
                events.write(bytes(step) * 10)
                events.flush()
                with open(folder / "history.csv", "a") as history:
                    history.write(f"epoch {step}\n")
                state = {"epoch": step, "step": 0, "stopped": False, "recipe": {}, "callbacks": {}, "metrics": []}
                state["history"] = (folder / "history.csv").read_text()
                state["events"] = run_folder.sync_event_files(folder)
                checkpoint.write(folder, step, state, {"a": [float(step)] * 20})
        run_folder.write_json(folder, "result.json", {"epochs": 3})


def check_run(logs, least):
    """The newest checkpoint is one of those written, not older than `least`, and the folder can be set back to it."""
    folders = list(Path(logs).iterdir())
    found = checkpoint.load_newest(folders[0], pytest.fail) if folders else None
    epoch = found[0]["epoch"] if found else 0
    assert epoch >= least
    if folders:
        run_folder.rewind(folders[0], found[0] if found else None, pytest.fail)
        assert run_folder.event_files(folders[0]) == ([Path("train/events.out.tfevents.1")] if found else [])
    if found:
        assert found[1]["a"].tolist() == [epoch] * 20
        assert (folders[0] / "train" / "events.out.tfevents.1").stat().st_size == 10 * epoch * (epoch + 1) // 2
        assert (folders[0] / "history.csv").read_text().count("\n") == epoch
    if folders and (folders[0] / "result.json").exists():
        assert epoch == 3, "the result is durable before the checkpoint"


@contextlib.contextmanager
def new_folder(tmp_path, name, tree):
    logs = tmp_path / name
    logs.mkdir()
    write_tree(tree, logs)
    yield logs


def test_every_operation_on_a_run_s_files_may_be_the_last(tmp_path):
    """Each in turn: the process dies behind it, or the power fails. A checkpoint counts once it was read back."""
    with new_folder(tmp_path, "whole", {}) as logs:
        recorder = Recorder(logs)
        with recorder.intercept():
            write_run(logs)
    written, disk, tried = 0, Disk({}), set()
    for number, operation in enumerate(recorder.operations):
        disk.apply(operation)
        # The checkpoint is durable with the sync of its folder.
        written += operation == ("sync directory", f"{next(logs.iterdir()).name}/backup")
        for power in (False, True):
            for tree in disk.list_states(power)[: 1 if power else None]:
                key = crash_points.hash_tree(tree), written
                if key not in tried:
                    tried.add(key)
                    with new_folder(tmp_path, f"{number}-{power}", tree) as left:
                        check_run(left, written)
    assert written == 3 and len(tried) > 30


@pytest.mark.parametrize("error", crash_points.ERRORS)
def test_every_operation_on_a_run_s_files_may_fail(tmp_path, error):
    with new_folder(tmp_path, "whole", {}) as logs:
        recorder = Recorder(logs)
        with recorder.intercept():
            write_run(logs)
    count = len(recorder.operations)
    for number in range(1, count + 1):
        with new_folder(tmp_path, str(number), {}) as logs:
            recorder = Recorder(logs, number, error)
            with recorder.intercept(), pytest.raises((OSError, ValueError, RunError)):
                write_run(logs)
            assert recorder.failed
            check_run(logs, 0)


def test_a_new_folder_of_runs_is_durable_with_its_parents(tmp_path):
    recorder = Recorder(tmp_path)
    with recorder.intercept():
        run_folder.create(tmp_path / "a" / "b", "run")
    disk = Disk({})
    for operation in recorder.operations:
        disk.apply(operation)
    assert disk.list_states(power=True)[0] == read_tree(tmp_path)


def test_a_file_is_the_old_or_the_new_one_at_every_moment(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    recorder = Recorder(tmp_path)
    before = read_tree(tmp_path)
    with recorder.intercept():
        replace_file(tmp_path / "file", b"new")
    disk = Disk(before)
    for operation in recorder.operations:
        disk.apply(operation)
        for power in (False, True):
            assert disk.list_states(power)[0]["file"] in (b"old", b"new")
    assert disk.list_states(power=True)[0] == {"file": b"new"}
    sync_directory(tmp_path)
    assert os.listdir(tmp_path) == ["file"]


def test_a_training_run_ends_equal_whatever_operation_fails(tmp_path):
    """A few of them; `python -m benchmarks.crash_points` tries all."""
    kinds, verdicts, states = crash_points.try_all(tmp_path, every=77, resumed=(False,))
    assert sum(kinds.values()) > 100 and states >= 3
    assert {verdict for _, verdict in verdicts} <= set(crash_points.RIGHT)
    assert {kind for kind, _ in verdicts} == {"before", "after", "power", *crash_points.ERRORS}

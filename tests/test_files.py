"""Files from outside are read or refused in one line, without blocking, even if they are special files."""

import contextlib
import errno
import io
import json
import os
import signal
import socket
import time
import tracemalloc
import zipfile

import h5py
import pytest

from Model import weights
from Training import files, flags
from Training.data import archives, decoding, folder, shards
from Training.errors import InputError, Interrupted, format_os_error
from Training.files import open_file, open_own, read_bytes, read_text, replace_file
from Training.runs import checkpoint, environment, history, run_folder, saved
from Training.tools import experiments, figures

pytestmark = pytest.mark.skipif(os.name != "posix", reason="FIFOs and devices are POSIX's")


@pytest.fixture(autouse=True)
def alarm():
    """Fail a test that blocks on a FIFO, instead of hanging."""

    def end(number, _frame):
        raise Interrupted(number)

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def put_fifo(path):
    os.mkfifo(path)


def put_device(path):
    path.symlink_to("/dev/zero")


def put_directory(path):
    path.mkdir()


def put_socket(path):
    # The path of a socket may have at most 107 bytes; tmp_path is longer.
    back = os.getcwd()
    os.chdir(path.parent)
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(back)


SPECIAL = {
    "a FIFO": put_fifo,
    "a character device": put_device,
    "a directory": put_directory,
    "a socket": put_socket,
}
special = pytest.mark.parametrize("kind", SPECIAL)


def make_run(path):
    """Create the folder of a run without files."""
    (path / "backup").mkdir(parents=True)
    return path


# Files from outside by path, and functions that read them.
READERS = {
    "picture.png": lambda root: decoding.read(root / "picture.png"),
    "data_batch_3": lambda root: archives._read_folder(root, ("data_batch_3",)),
    "cifar-10-python.tar.gz": lambda root: archives._read_tar(
        root / "cifar-10-python.tar.gz", archives.ARCHIVES["cifar10"], ("data_batch_1",)
    ),
    "index.npz": lambda root: shards.read("shards", root),
    "history.csv": lambda root: history.read_history(root / "history.csv"),
    "recipe.json": lambda root: saved.read_recipe(root / "recipe.json"),
    "result.json": lambda root: (replace_file(root / "recipe.json", b"{}"), history.read_run(root)),
    "classes.json": lambda root: saved.read_classes(root / "last.keras", 3),
    "predictions.csv": lambda root: figures.read_predictions(root / "predictions.csv"),
    "split.json": lambda root: run_folder.write_split(root, None, ""),
    "network.keras": lambda root: saved.load(root / "network.keras"),
    "lock": run_folder.lock,
    "events.out.tfevents.1": run_folder.sync_event_files,
}


@special
@pytest.mark.parametrize("name", READERS)
def test_special_files_are_refused_in_one_line(tmp_path, name, kind):
    SPECIAL[kind](tmp_path / name)
    tracemalloc.start()
    try:
        with pytest.raises(InputError) as refusal:
            READERS[name](tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 5e6
    finally:
        tracemalloc.stop()
    message = str(refusal.value)
    # The lock and the event files are the program's own: links are refused regardless of their targets.
    what = "a symbolic link" if kind == "a character device" and name in ("lock", "events.out.tfevents.1") else kind
    assert f"must be a regular file, but is {what}" in message and name in message and "\n" not in message


@special
def test_the_recipe_of_a_run_to_resume_is_refused_with_exit_code_2(tmp_path, kind, capsys):
    SPECIAL[kind](tmp_path / "recipe.json")
    with pytest.raises(SystemExit) as stop:
        flags.parse(["--resume", str(tmp_path)], "")
    assert stop.value.code == 2 and f"but is {kind}" in capsys.readouterr().err


@special
def test_a_network_that_is_not_a_file_is_named_as_what_it_is(tmp_path, kind):
    SPECIAL[kind](tmp_path / "network.keras")
    with pytest.raises(InputError) as refusal:
        saved.find(tmp_path / "network.keras")
    assert ("has no last.keras" if kind == "a directory" else f"regular file, but is {kind}") in str(refusal.value)


@special
@pytest.mark.parametrize(
    "read", [lambda root: weights.read_about(root), lambda root: weights.read_file(root / weights.ABOUT, "")]
)
def test_shipped_weights_are_regular_files(tmp_path, kind, read):
    SPECIAL[kind](tmp_path / weights.ABOUT)
    with pytest.raises(ValueError, match="about.json cannot be read: .*it must be a regular file of at most"):
        read(tmp_path)


@special
def test_an_environment_that_is_not_a_file_is_kept_and_another_written(tmp_path, kind):
    SPECIAL[kind](tmp_path / "environment.json")
    environment.record_environment(tmp_path, {"python": "3"})
    assert [path.name for path in environment.list_environments(tmp_path)] == ["environment.json", "environment-2.json"]


@special
def test_a_folder_of_pictures_names_what_is_not_a_file(tmp_path, kind):
    SPECIAL[kind](tmp_path / "a.png")
    (tmp_path / "dangling.jpg").symlink_to("nowhere")
    found = [path.name for path in decoding.find_pictures(tmp_path)]
    assert found == (["dangling.jpg"] if kind == "a directory" else ["a.png", "dangling.jpg"])


def test_files_that_the_kernel_makes_up_are_read_as_what_they_say_to_be():
    """Their size is 0, whatever reading them gives."""
    assert read_text("/proc/self/status") == ""
    with pytest.raises(InputError, match="/proc/cpuinfo cannot be read: Invalid argument"):
        decoding.read("/proc/cpuinfo")


@special
def test_a_checkpoint_that_is_not_a_file_counts_as_damaged(tmp_path, kind):
    run = make_run(tmp_path / "run")
    state = {"epoch": 1, "step": 0, "stopped": False, "recipe": {}, "callbacks": {}, "metrics": [], "events": {}}
    state["history"] = None
    checkpoint.write(run, 1, state, {})
    SPECIAL[kind](run / "backup" / "step-000000002.checkpoint")
    reasons = []
    assert checkpoint.load_newest(run, reasons.append)[0] == state
    assert len(reasons) == 1 and kind in reasons[0]


@special
def test_searches_skip_special_files(tmp_path, kind, capsys):
    (tmp_path / "logs" / "run").mkdir(parents=True)
    SPECIAL[kind](tmp_path / "logs" / "run" / "recipe.json")
    assert experiments.find_run(tmp_path / "logs", None) is None
    (tmp_path / "ant").mkdir()
    SPECIAL[kind](tmp_path / "ant" / "picture.png")
    found = folder.scan(tmp_path / "ant", decode=False)
    assert found.names == [] and len(found.broken) == 1 and kind in found.broken[0]


def test_a_limit_holds_before_anything_is_read(tmp_path):
    path = tmp_path / "large"
    with open(path, "wb") as file:
        file.truncate(2**40)  # a sparse file takes no space
    with pytest.raises(InputError, match=r"large must have at most 67,108,864 bytes, but has 1,099,511,627,776"):
        read_text(path)
    with pytest.raises(InputError, match="at most 536,870,912 bytes"):
        decoding.read(path)
    path.write_bytes(b"1234")
    assert read_bytes(path, 4) == b"1234"
    with pytest.raises(InputError, match="at most 3 bytes, but has 4"):
        read_bytes(path, 3)


def test_a_file_that_is_replaced_by_a_fifo_after_the_check_does_not_block(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"")
    status = os.stat(path)
    path.unlink()
    os.mkfifo(path)
    monkeypatch.setattr(files.os, "stat", lambda _: status)
    with pytest.raises(InputError, match="is a FIFO"):
        open_file(path, 10)


def test_text_must_be_utf_8_and_keeps_its_line_ends(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(b"a\r\nb\n")
    assert read_text(path) == "a\r\nb\n"
    path.write_bytes(b"ab\xff")
    with pytest.raises(InputError, match="must be UTF-8 text, byte 2 is not"):
        read_text(path)
    with pytest.raises(FileNotFoundError):
        read_text(tmp_path / "none")


def test_nothing_is_written_through_a_link(tmp_path):
    target = tmp_path / "target"
    target.write_bytes(b"kept")
    for name in ("lock", "file", "file.new"):
        (tmp_path / name).symlink_to(target)
    with pytest.raises(InputError, match="lock must be a regular file, but is a symbolic link"):
        open_own(tmp_path / "lock")
    replace_file(tmp_path / "file", b"new")
    assert target.read_bytes() == b"kept" and not (tmp_path / "file").is_symlink()
    assert (tmp_path / "file").read_bytes() == b"new" and not os.path.lexists(tmp_path / "file.new")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match="is a symbolic link"):
        open_own(tmp_path / "dangling")
    assert not (tmp_path / "nowhere").exists()


def test_a_run_whose_folders_are_links_is_refused(tmp_path):
    for name in ("train", "validation"):
        run = make_run(tmp_path / f"run-{name}")
        (tmp_path / name).mkdir()
        (tmp_path / name / "events.out.tfevents.1").write_bytes(b"of another")
        (run / name).symlink_to(tmp_path / name)
        with pytest.raises(InputError, match=f"{name} is a symbolic link"):
            run_folder.reopen(run)
        assert (tmp_path / name / "events.out.tfevents.1").read_bytes() == b"of another"


def test_a_backup_made_of_hard_links_stays_as_it_is(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "events.out.tfevents.1").write_bytes(b"0123456789")
    (run / "history.csv").write_bytes(b"epoch\n0\n1\n")
    for name in ("events.out.tfevents.1", "history.csv"):
        os.link(run / name, tmp_path / name)
    run_folder.rewind(run, {"history": "epoch\n0\n", "events": {"events.out.tfevents.1": 4}})
    assert (run / "events.out.tfevents.1").read_bytes() == b"0123" and (run / "history.csv").read_text() == "epoch\n0\n"
    assert (tmp_path / "events.out.tfevents.1").read_bytes() == b"0123456789"
    assert (tmp_path / "history.csv").read_bytes() == b"epoch\n0\n1\n"


@pytest.mark.parametrize("number, passes", [(errno.EINVAL, True), (errno.ENOTSUP, True), (errno.EIO, False)])
def test_a_file_system_that_cannot_sync_a_directory_is_no_error(tmp_path, monkeypatch, number, passes):
    def fail(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.os, "fsync", fail)
    with contextlib.nullcontext() if passes else pytest.raises(OSError, match="Input/output error"):
        files.sync_directory(tmp_path)


@pytest.mark.parametrize(
    "number, said",
    [
        (errno.EROFS, "x cannot be written: Read-only file system"),
        (errno.EDQUOT, "x cannot be written: Disk quota exceeded"),
        (errno.ESTALE, "x: Stale file handle"),
        (errno.EMFILE, "x: Too many open files"),
        (errno.EAGAIN, "x: Resource temporarily unavailable"),
    ],
)
def test_an_error_is_called_a_failed_write_only_if_it_is_one(number, said):
    assert format_os_error(OSError(number, os.strerror(number), "x"), "place") == said
    assert format_os_error(OSError(number, os.strerror(number)), "place") == said.replace("x", "place", 1)


@pytest.mark.parametrize("number, busy", [(errno.EAGAIN, True), (errno.EIO, False), (errno.ESTALE, False)])
def test_only_a_lock_that_is_held_means_another_process(tmp_path, monkeypatch, number, busy):
    import fcntl

    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fail)
    said = []
    with pytest.raises(InputError, match="another process is training") if busy else contextlib.nullcontext():
        assert run_folder.lock(tmp_path, said.append) is None
    assert len(said) == (not busy) and (busy or os.strerror(number) in said[0])


def test_names_of_others_are_escaped_where_they_are_printed(tmp_path, capsys):
    """Of a run's folder, of versions in its environment, and of a picture's folder."""
    folder = make_run(tmp_path / "run\x1b[2J")
    (folder / "backup" / "step-000000001.checkpoint").write_bytes(b"")
    said = []
    checkpoint.load_newest(folder, said.append)
    before = {"packages": {"keras": "3\x1b[31m\n"}, "backend": ["\x07"]}
    now = {"python": "3", "backend": "jax", "device": "a", "packages": {"keras": "4"}}
    said += environment.find_differences(before, now)
    assert len(said) == 5 and all(line.isprintable() for line in said)


def test_own_files_keep_their_content(tmp_path):
    with open_own(tmp_path / "lock") as file:
        file.write(b"12")
    with open_own(tmp_path / "lock") as file:
        assert file.read() == b"12"


def test_a_failed_replacement_keeps_the_old_file(tmp_path, monkeypatch):
    replace_file(tmp_path / "file", b"old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        replace_file(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["file"]


def write_network(path, h5, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as file:
        file.writestr("config.json", "{}")
        file.writestr("metadata.json", "{}")
        with file.open("model.weights.h5", "w", force_zip64=True) as member:
            for piece in h5:
                member.write(piece)


def make_h5(shape, **options):
    raw = io.BytesIO()
    with h5py.File(raw, "w") as file:
        file.create_dataset("layers/dense/vars/0", shape, "float32", **options)
    return raw.getvalue()


@pytest.mark.parametrize(
    "h5, method",
    [
        ([bytes(2**20)] * 20, zipfile.ZIP_DEFLATED),  # zeros that the archive compresses a thousandfold
        ([make_h5((2**26,), chunks=(2**16,), compression="gzip")], zipfile.ZIP_STORED),  # zeros compressed by HDF5
        ([make_h5((2**40, 2**20), chunks=(1, 2**16))], zipfile.ZIP_STORED),  # a huge array without any stored values
    ],
)
def test_a_network_that_unpacks_to_more_than_the_limit_is_refused_before_unpacking(tmp_path, h5, method, monkeypatch):
    monkeypatch.setattr(saved, "LARGEST_NETWORK", 2**24)
    path = tmp_path / "last.keras"
    write_network(path, h5, method)
    assert path.stat().st_size < 2e6
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=r"last.keras unpacks to [\d,]+ bytes, at most 16,777,216 are read"):
            saved.load(path)
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()


def change_layer(path, name, **changes):
    """Change the configuration of a layer in a saved network, whose weights stay as they are."""
    with zipfile.ZipFile(path) as file:
        members = {each: file.read(each) for each in file.namelist()}
    config = json.loads(members["config.json"])
    next(layer for layer in config["config"]["layers"] if layer["name"] == name)["config"].update(changes)
    with zipfile.ZipFile(path, "w") as file:
        for each, raw in {**members, "config.json": json.dumps(config)}.items():
            file.writestr(each, raw)


@pytest.mark.parametrize(
    "name, changes, said",
    [
        ("first", {"units": 10**9}, "bytes of weights, at most 1,073,741,824 are read"),
        ("stage_1_attention_1", {"t": 10**8}, "t must be 1000 or less"),
        ("stage_1_attention_1", {"p": 10**5, "r": 10**5}, "must be 1000 or less"),
        ("up", {"size": [10**4, 10**4]}, "bytes of one layer's output for one image, at most 268,435,456 are read"),
    ],
)
def test_a_network_that_describes_more_than_the_limit_is_refused_before_it_is_built(tmp_path, name, changes, said):
    import keras

    from Module import AttentionBlock

    inputs = keras.Input((8, 8, 3))
    x = keras.layers.UpSampling2D(1, name="up")(inputs)
    if "attention" in name:
        x = AttentionBlock(8, mask_depth=1, name=name)(keras.layers.Conv2D(8, 1)(x))
    x = keras.layers.Dense(2, name="first")(keras.layers.GlobalAveragePooling2D()(x))
    path = tmp_path / "last.keras"
    keras.Model(inputs, keras.layers.Dense(2, name="second")(x)).save(path)
    assert saved.load(path).count_params() > 0
    change_layer(path, name, **changes)
    begun = time.process_time()
    with pytest.raises(InputError, match="last.keras") as refusal:
        saved.load(path)
    assert said in str(refusal.value) and "\n" not in str(refusal.value) and time.process_time() - begun < 5


@pytest.mark.parametrize("changes", [{"t": 10**9}, {"classes": 10**9}, {"input_shape": [10**6, 10**6, 3]}], ids=str)
def test_packed_weights_that_describe_more_than_the_limit_are_refused(tmp_path, changes):
    about = {"architecture": {"model": "attention_56", **changes}, "class_names": [], "sha256": ""}
    (tmp_path / weights.ABOUT).write_text(json.dumps(about))
    (tmp_path / weights.FILE).write_bytes(b"")
    with pytest.raises(InputError, match=f"about.json: {next(iter(changes))} must be 1[0,]+ or less"):
        saved.load(tmp_path / weights.FILE)


@pytest.mark.parametrize("names", ["abc", [1, 2], [["a"], ["b"]], ["a"]], ids=str)
def test_class_names_of_packed_weights_are_checked(tmp_path, names):
    (tmp_path / weights.ABOUT).write_text(json.dumps({"architecture": {}, "class_names": names, "sha256": ""}))
    with pytest.raises(InputError, match="about.json must be a list of"):
        saved.read_classes(tmp_path / weights.FILE, 2)


def test_the_classes_of_a_confusion_matrix_are_bounded(tmp_path):
    path = tmp_path / "predictions.csv"
    path.write_text("label,predicted\n1999,0\n")
    assert figures.read_predictions(path) == ((1999,), (0,))
    for row in ("1000000000,0", "0,2000"):
        path.write_text(f"label,predicted\n0,0\n{row}\n")
        with pytest.raises(InputError, match=r"has class \d+, a confusion matrix has at most 2,000"):
            figures.read_predictions(path)
    with open(path, "ab") as file:
        file.truncate(2**25)
    with pytest.raises(InputError, match="must have at most 16,777,216 bytes"):
        figures.read_predictions(path)

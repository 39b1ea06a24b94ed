"""The official archives are read from every supported place, and damaged ones are refused by name."""

import gzip
import io
import pickle
import subprocess
import sys
import tarfile
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from tests.support.tiny import make_batch, make_official_files, pickle_as_python_2, write_folder, write_tar
from Training.data import archives
from Training.data.archives import ARCHIVES
from Training.errors import InputError

ROOT = Path(__file__).parent.parent
CIFAR10 = ARCHIVES["cifar10"]


@pytest.fixture(scope="module")
def files():
    return make_official_files("cifar10")


def test_folder_and_archive_give_the_same_images(tmp_path, files):
    folder = write_folder(tmp_path / "a", "cifar10", files)
    (tmp_path / "b").mkdir()
    write_tar(tmp_path / "b", "cifar10", files)
    from_folder = archives.read("cifar10", str(tmp_path / "a"))
    from_itself = archives.read("cifar10", str(folder))
    from_tar = archives.read("cifar10", str(tmp_path / "b"))
    for one in (from_itself, from_tar):
        for a, b in zip(from_folder, one):
            np.testing.assert_array_equal(a, b)
    images, labels, test_images, test_labels, names = from_folder
    assert images.shape == (50_000, 32, 32, 3) and images.dtype == np.uint8
    assert test_images.shape == (10_000, 32, 32, 3) and len(test_labels) == 10_000
    assert labels.dtype == np.int32 and names[3] == "class 3"
    first = np.random.default_rng(0).integers(0, 256, (10_000, 3072), dtype=np.uint8)[0]
    np.testing.assert_array_equal(images[0, 5, 7], first[[5 * 32 + 7, 1024 + 5 * 32 + 7, 2048 + 5 * 32 + 7]])


def test_cifar100_has_fine_labels(tmp_path):
    write_folder(tmp_path, "cifar100", make_official_files("cifar100"))
    images, labels, _, test_labels, names = archives.read("cifar100", str(tmp_path))
    assert images.shape == (50_000, 32, 32, 3) and labels.max() == test_labels.max() == 99 and len(names) == 100


def test_keras_cache_is_used_before_any_download(tmp_path, files, monkeypatch):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    (tmp_path / "datasets").mkdir()
    path = write_tar(tmp_path / "datasets", "cifar10", files)
    path.rename(path.with_name("cifar-10-batches-py-target_archive"))
    monkeypatch.setattr(archives, "download", None)
    assert archives.read("cifar10")[0].shape == (50_000, 32, 32, 3)
    assert (tmp_path / "datasets" / "cifar-10-batches-py-target_archive").exists()


@pytest.mark.parametrize("backend, said", [("torch", "KERAS_BACKEND must be one of"), ("", "requirements-jax.txt")])
def test_a_backend_that_is_not_there_is_named_before_a_download(monkeypatch, backend, said):
    def fail():
        raise ModuleNotFoundError("No module named 'tensorflow'")

    monkeypatch.setenv("KERAS_BACKEND", backend)
    monkeypatch.setattr(archives, "_refuse_without_network", lambda *_: None)
    monkeypatch.setattr(archives, "import_keras", fail)
    with pytest.raises(InputError, match=said):
        archives.download(CIFAR10, "cifar10")


def expect_refusal(raw, said, rows=10_000):
    with pytest.raises(InputError, match=said) as error:
        archives.read_batch(raw, "data_batch_1", CIFAR10, rows)
    assert "\n" not in str(error.value) and str(error.value).startswith("data_batch_1")


class Command:
    def __reduce__(self):
        return (print, ("this code must never run",))


def test_manipulated_pickles_run_no_code(capsys, monkeypatch):
    touched = []
    monkeypatch.setattr("os.system", touched.append)
    expect_refusal(pickle_as_python_2({b"data": Command()}), "it asks for __builtin__.print")
    expect_refusal(b"\x80\x02cos\nsystem\n(U\x0ctouch /tmp/ttR.", "it asks for os.system")
    expect_refusal(b"cos\nsystem\n(S'touch /tmp/x'\ntR.", "it has the instruction STRING")
    expect_refusal(pickle.dumps(np.ones(3), protocol=4), "it has the instruction FRAME")
    expect_refusal(b"\x80\x02}r\xff\xff\xff\x7f.", "it has the object number 2147483647, more than any CIFAR file")
    expect_refusal(
        pickle_as_python_2({b"data": np.ones((10, 3072)), b"labels": [0] * 10}), "an array of dtype b'f8'", rows=10
    )
    expect_refusal(b"\x80\x02cnumpy\ndtype\n(U\x01OK\x00K\x01tR.", "dtype b'O'")
    assert not touched and capsys.readouterr().out == ""


def test_wrong_contents_are_named():
    good = make_batch(CIFAR10, 10)
    archives.read_batch(good, "data_batch_1", CIFAR10, 10)
    expect_refusal(good[:-100], "truncated or not a CIFAR file", rows=10)
    expect_refusal(good[:20000], "truncated or not a CIFAR file", rows=10)
    expect_refusal(b"", "truncated or not a CIFAR file")
    expect_refusal(b"\x00" * 1000, "truncated or not a CIFAR file")
    expect_refusal(pickle_as_python_2([1, 2]), "must contain a dictionary, received list")
    expect_refusal(pickle_as_python_2({b"labels": [0]}), "no uint8 array under the key 'data'")
    expect_refusal(make_batch(CIFAR10, 9_999), r"images of shape \(10000, 3072\), received \(9999, 3072\)")
    expect_refusal(
        make_batch(CIFAR10, 10, labels=[0] * 9), "must have 10 labels under 'labels', received 9 labels", rows=10
    )
    expect_refusal(make_batch(CIFAR10, 10, **{"labels": [0] * 9 + [10]}), "labels from 0 to 9, received 10", rows=10)
    expect_refusal(make_batch(CIFAR10, 10, **{"labels": [0] * 9 + [-1]}), "labels from 0 to 9, received -1", rows=10)
    expect_refusal(
        make_batch(CIFAR10, 10, **{"labels": [0] * 9 + [b"cat"]}), "labels from 0 to 9, received b'cat'", rows=10
    )
    with pytest.raises(InputError, match="must have 10 class names"):
        archives.read_names(pickle_as_python_2({b"label_names": [b"cat"]}), "batches.meta", CIFAR10)


@pytest.mark.parametrize("wrong", [b"..", b".", b"a/b", b"a\\b", b"a\0b", b"a\nb", b"class 1"])
def test_class_names_can_be_names_of_folders(wrong):
    names = [f"class {i}".encode() for i in range(10)]
    assert archives.read_names(pickle_as_python_2({b"label_names": names}), "meta", CIFAR10)[1] == "class 1"
    names[3] = wrong
    with pytest.raises(InputError, match="^meta must have different class names without / and"):
        archives.read_names(pickle_as_python_2({b"label_names": names}), "meta", CIFAR10)


def test_broken_archives_are_named(tmp_path, files):
    path = write_tar(tmp_path, "cifar10", {f: files[f] for f in ("batches.meta", "test_batch")})
    with pytest.raises(InputError, match="lacks data_batch_1, data_batch_2"):
        archives.read("cifar10", str(tmp_path))
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(InputError, match="truncated or not a .tar.gz"):
        archives.read("cifar10", str(tmp_path))
    path.write_bytes(b"no archive")
    with pytest.raises(InputError, match="truncated or not a .tar.gz"):
        archives.read("cifar10", str(tmp_path))


def test_an_archive_that_unpacks_to_too_much_is_refused_before_it_is_read(tmp_path):
    info = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
    info.size = 100 * 2**30
    path = tmp_path / CIFAR10.file
    path.write_bytes(info.tobuf() + bytes(10_000))
    with pytest.raises(InputError, match="unpacks to more than any CIFAR archive"):
        archives.read("cifar10", str(tmp_path))


def make_header(kind, size):
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


PAX = b"25 size=-1000000000000000\n"


@pytest.mark.parametrize(
    "pieces, said",
    [
        # a header that claims 2 GB, followed by 100 MB that are compressed to a few kB
        ([make_header(tarfile.GNUTYPE_LONGNAME, 2**31 - 512), bytes(10**8)], "it has a header of 2,147,483,136 bytes"),
        ([make_header(tarfile.GNUTYPE_LONGLINK, 2**31 - 512), bytes(10**8)], "it has a header of 2,147,483,136 bytes"),
        ([make_header(tarfile.XHDTYPE, 2**31 - 512), bytes(10**8)], "it has a header of 2,147,483,136 bytes"),
        ([make_header(tarfile.XGLTYPE, 10**8), bytes(10**8)], "it has a header of 100,000,256 bytes"),
        ([make_header(tarfile.GNUTYPE_LONGNAME, 60_000) + bytes(60_416)] * 400, "maximum recursion depth exceeded"),
        ([make_header(tarfile.REGTYPE, 0)] * 5000, "unpacks to more than any CIFAR archive"),
        ([make_header(tarfile.REGTYPE, 2**28), bytes(2**20)], "at byte 268,435,967"),
        (
            [make_header(tarfile.XHDTYPE, 26), PAX.ljust(512, b"\0"), make_header(tarfile.REGTYPE, 0)] * 3,
            "at byte -99,999,999,998,465",
        ),
    ],
)
def test_headers_of_an_archive_take_little_memory(tmp_path, pieces, said):
    """The peak of memory does not depend on the size that a header claims."""
    path = tmp_path / CIFAR10.file
    with gzip.open(path, "wb", compresslevel=1) as file:
        for piece in pieces:
            file.write(piece)
    del pieces
    tracemalloc.start()
    try:
        with pytest.raises(InputError) as refusal:
            archives.read("cifar10", str(tmp_path))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert said in str(refusal.value) and str(path) in str(refusal.value) and "\n" not in str(refusal.value)
    assert peak < 70e6, f"{peak:,.0f} bytes"


def test_a_pickle_of_many_objects_is_refused_before_any_is_created():
    """Each byte of the file would create an object of 64 bytes: 200 MB would take 13 GB."""
    expect_refusal(b"\x80\x02" + b"}" * 20_000_000 + b".", "it has more than 1,000,000 instructions")


def test_a_deeply_nested_label_is_refused_in_one_line():
    deep = b"]" * 100_000 + b"a" * 99_999
    raw = make_batch(CIFAR10, 1).removesuffix(b"u.")
    expect_refusal(raw + b"U\x06labels](" + deep + b"eu.", r"labels from 0 to 9, received \[\[\[", rows=1)


def test_links_and_outside_paths_in_an_archive_are_ignored(tmp_path, files):
    path = tmp_path / CIFAR10.file
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        for name in ("../outside", "/tmp/outside-absolute"):
            info = tarfile.TarInfo(name)
            info.size = 4
            tar.addfile(info, io.BytesIO(b"evil"))
        link = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(InputError, match="lacks data_batch_1"):
        archives.read("cifar10", str(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == [CIFAR10.file]
    assert not (tmp_path.parent / "outside").exists()


def test_missing_paths_are_named(tmp_path):
    with pytest.raises(InputError, match="nowhere does not exist"):
        archives.read("cifar10", str(tmp_path / "nowhere"))
    with pytest.raises(
        InputError, match="contains neither cifar-10-batches-py/ nor cifar-10-python.tar.gz for cifar10"
    ):
        archives.read("cifar10", str(tmp_path))
    folder = write_folder(tmp_path, "cifar10", {"test_batch": b""})
    with pytest.raises(InputError, match="data_batch_1 cannot be read: No such file"):
        archives.read("cifar10", str(folder))


def test_no_network_is_one_line_within_ten_seconds(tmp_path):
    # A proxy that refuses connections gives the same result on machines with and without a network.
    environment = {"PATH": "/usr/bin:/bin", "KERAS_HOME": str(tmp_path), "https_proxy": "http://127.0.0.1:9"}
    started = time.perf_counter()
    run = subprocess.run(
        [sys.executable, "training_cifar10.py", "--logs", str(tmp_path / "Logs")],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert time.perf_counter() - started < 10
    assert run.returncode == 2 and run.stdout == "" and run.stderr.count("\n") == 1
    for said in ("no cifar10 in", "--data-dir", "put that file into", "--dataset digits"):
        assert said in run.stderr
    assert not (tmp_path / "Logs").exists()


def test_waiting_for_a_silent_network_ends(monkeypatch, tmp_path):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.setattr(archives, "WAIT_S", 0.2)
    monkeypatch.setattr(archives, "_ask_server", lambda url, failures: time.sleep(2))
    with pytest.raises(InputError, match="no answer within 0.2 s"):
        archives.read("cifar10")


def test_a_download_with_other_bytes_is_renamed(monkeypatch, tmp_path):
    import keras

    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.setattr(archives, "_ask_server", lambda url, failures: None)

    def get_file(name, url, cache_dir, cache_subdir):
        path = Path(cache_dir, cache_subdir, name)
        path.parent.mkdir(parents=True)
        path.write_bytes(b"something else")
        return str(path)

    monkeypatch.setattr(keras.utils, "get_file", get_file)
    with pytest.raises(InputError, match="other bytes than the official ones"):
        archives.read("cifar10")
    assert [p.name for p in (tmp_path / "datasets").iterdir()] == ["cifar-10-python.tar.gz.broken"]

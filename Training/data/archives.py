"""Reads CIFAR-10 and CIFAR-100 from the official Python archives. No file can run code or exhaust memory."""

import gzip
import hashlib
import io
import os
import pickle
import pickletools
import reprlib
import tarfile
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

import numpy as np

from Training.console import choose_backend, explain_import_errors, import_keras
from Training.errors import InputError, format_path, shorten
from Training.files import open_file, read_bytes

PIXELS = 32 * 32 * 3
WAIT_S = 8.0  # seconds to wait for the first answer of the server
# The instructions of pickle protocol 2 that the official files use, and close relatives.
OPCODES = frozenset(
    "PROTO STOP MARK EMPTY_DICT EMPTY_LIST APPEND APPENDS SETITEM SETITEMS SHORT_BINSTRING BINSTRING BINPUT "
    "LONG_BINPUT BINGET LONG_BINGET BININT BININT1 BININT2 NONE NEWFALSE NEWTRUE TUPLE TUPLE1 TUPLE2 TUPLE3 "
    "EMPTY_TUPLE GLOBAL REDUCE BUILD".split()
)
LARGEST_MEMO = 1_000_000
MOST_INSTRUCTIONS = 1_000_000  # of a pickle, each of which may create an object; CIFAR-10's files have 20,049
LARGEST_MEMBER = 256 * 2**20  # bytes; the largest official file has 154 MB
LARGEST_DOWNLOAD = 256 * 2**20  # bytes of an archive; the official ones have 170 MB
LARGEST_UNPACKED = 256 * 2**20  # bytes of all members of an archive; the official ones have 186 MB
MOST_MEMBERS = 1000  # of an archive; the official ones have 9
LARGEST_READ = 2**16  # bytes that are unpacked at a time, and the largest header of a member


class Archive(NamedTuple):
    """The contents of a data set's official archive."""

    folder: str
    file: str
    url: str
    sha256: str
    in_keras_cache: str  # the name under which Keras keeps the archive
    train: tuple[str, ...]
    test: tuple[str, ...]
    meta: str
    rows: tuple[int, int]  # images in each training and each test file
    labels: bytes
    names: bytes
    classes: int


ARCHIVES = {
    "cifar10": Archive(
        folder="cifar-10-batches-py",
        file="cifar-10-python.tar.gz",
        url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        sha256="6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
        in_keras_cache="cifar-10-batches-py-target",
        train=tuple(f"data_batch_{i}" for i in range(1, 6)),
        test=("test_batch",),
        meta="batches.meta",
        rows=(10_000, 10_000),
        labels=b"labels",
        names=b"label_names",
        classes=10,
    ),
    "cifar100": Archive(
        folder="cifar-100-python",
        file="cifar-100-python.tar.gz",
        url="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        sha256="85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
        in_keras_cache="cifar-100-python-target",
        train=("train",),
        test=("test",),
        meta="meta",
        rows=(50_000, 10_000),
        labels=b"fine_labels",
        names=b"fine_label_names",
        classes=100,
    ),
}


class _Array:
    """Stands in for a pickled NumPy array; accepts the bytes of a uint8 matrix and nothing else."""

    value = None

    def __setstate__(self, state):
        _version, shape, dtype, fortran, raw = state
        if not isinstance(dtype, _Dtype) or fortran or not isinstance(raw, bytes):
            raise pickle.UnpicklingError("it has an array that is not a plain uint8 matrix")
        self.value = np.frombuffer(raw, np.uint8).reshape(shape)


class _Dtype:
    """Stands in for a pickled NumPy dtype; only uint8 is accepted."""

    def __setstate__(self, state):
        pass  # byte order and alignment do not matter for single bytes


def _new_array(kind, _shape, _code):
    if kind is not _Array:
        raise pickle.UnpicklingError("it has an array of an unknown class")
    return _Array()


def _new_dtype(code, _align, _copy):
    if code not in (b"u1", "u1"):
        raise pickle.UnpicklingError(f"it has an array of dtype {code!r}")
    return _Dtype()


class _Unpickler(pickle.Unpickler):
    """Knows only the three names that the official batches use, and replaces even those with stand-ins."""

    known = {
        ("numpy.core.multiarray", "_reconstruct"): _new_array,
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _new_dtype,
    }

    def find_class(self, module, name):
        try:
            return self.known[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR file contains") from None


def _refuse_other_opcodes(raw):
    """Refuse pickle instructions that no official file has. A huge memo index alone could exhaust memory."""
    for count, (opcode, argument, _) in enumerate(pickletools.genops(raw)):
        if count == MOST_INSTRUCTIONS:
            raise pickle.UnpicklingError(f"it has more than {MOST_INSTRUCTIONS:,} instructions")
        if opcode.name not in OPCODES:
            raise pickle.UnpicklingError(f"it has the instruction {opcode.name}, which no CIFAR file contains")
        if opcode.name in ("BINPUT", "LONG_BINPUT") and argument > LARGEST_MEMO:
            raise pickle.UnpicklingError(f"it has the object number {argument}, more than any CIFAR file")


def unpickle(raw, name):
    """Return the dictionary in the bytes of an official file, with byte-string keys.

    Raises:
        InputError: the bytes are not such a pickle, or contain anything but plain data.
    """
    try:
        _refuse_other_opcodes(raw)
        content = _Unpickler(io.BytesIO(raw), encoding="bytes").load()
    # A damaged pickle can raise nearly anything; the user must not see a traceback.
    except Exception as error:
        raise InputError(f"{name} is truncated or not a CIFAR file: {shorten(error)}") from None
    if not isinstance(content, dict):
        raise InputError(f"{name} must contain a dictionary, received {type(content).__name__}")
    return content


def read_batch(raw, name, archive, rows):
    """Return the images, uint8 `(rows, 32, 32, 3)`, and labels, int32 `(rows,)`, of one official file.

    Raises:
        InputError: with the name of the file and what is wrong in it.
    """
    content = unpickle(raw, name)
    images, labels = content.get(b"data"), content.get(archive.labels)
    if not isinstance(images, _Array) or images.value is None:
        raise InputError(f"{name} has no uint8 array under the key 'data'")
    if images.value.shape != (rows, PIXELS):
        raise InputError(f"{name} must have images of shape ({rows}, {PIXELS}), received {images.value.shape}")
    if not isinstance(labels, list) or len(labels) != rows:
        received = f"{len(labels)} labels" if isinstance(labels, list) else "none"
        raise InputError(f"{name} must have {rows} labels under {archive.labels.decode()!r}, received {received}")
    for label in labels:
        if type(label) is not int or not 0 <= label < archive.classes:
            received = reprlib.repr(label)  # a list could be nested too deeply for `repr`
            raise InputError(f"{name} must have labels from 0 to {archive.classes - 1}, received {received:.80}")
    # Red, green and blue planes to pixels of three channels.
    pixels = images.value.reshape(rows, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(pixels), np.asarray(labels, np.int32)


def read_names(raw, name, archive):
    """Return the class names, in the order of the labels. Each can be the name of a folder.

    Raises:
        InputError: see `unpickle`; or the names are missing, or one cannot be the name of a folder or comes twice.
    """
    names = unpickle(raw, name).get(archive.names)
    if (
        not isinstance(names, list)
        or len(names) != archive.classes
        or not all(isinstance(n, bytes) and 0 < len(n) < 100 for n in names)
    ):
        raise InputError(f"{name} must have {archive.classes} class names under {archive.names.decode()!r}")
    names = tuple(n.decode("ascii", "replace") for n in names)
    for each in names:
        if not each.isprintable() or set(each) & set("/\\") or each in (".", "..") or names.count(each) > 1:
            raise InputError(f"{name} must have different class names without / and \\, received {each!r}")
    return names


def _read_folder(folder, wanted):
    files = {}
    for name in wanted:
        path = folder / name
        try:
            files[name] = read_bytes(path, LARGEST_MEMBER)
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from None
    return files


class _BoundedReader:
    """A stream for `tarfile` that limits the size of a single read, and how far a file may reach.

    `tarfile` reads the header of a long name or of extended attributes in one piece, whatever size it claims.
    """

    def __init__(self, stream):
        self.stream = stream
        self.tell = stream.tell
        self.seekable = stream.seekable

    def read(self, size):
        if not 0 <= size <= LARGEST_READ:
            raise InputError(f"it has a header of {size:,} bytes, more than any CIFAR archive")
        return self.stream.read(size)

    def seek(self, position):
        if not 0 <= position <= LARGEST_UNPACKED:
            raise InputError(f"it has a member at byte {position:,}, which no CIFAR archive has")
        return self.stream.seek(position)


def _read_members(tar, archive, wanted):
    """Return the wanted files of an open archive; other members are skipped."""
    files, total = {}, 0
    for count, member in enumerate(tar, 1):
        total += max(member.size, 0)
        if total > LARGEST_UNPACKED or count > MOST_MEMBERS:
            raise InputError(f"it unpacks to more than any CIFAR archive, at member {member.name!r:.80}")
        name = member.name.removeprefix("./").removeprefix(archive.folder + "/")
        if member.isreg() and name in wanted:
            source = tar.extractfile(member)
            files[name] = b"".join(iter(lambda: source.read(LARGEST_READ), b""))  # noqa: B023
    return files


def _read_tar(path, archive, wanted):
    """Return the wanted files of a .tar.gz or .tar; nothing is written to disk."""
    try:
        with open_file(path, LARGEST_DOWNLOAD) as file:
            packed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            stream = gzip.GzipFile(fileobj=file) if packed else file
            with tarfile.open(fileobj=_BoundedReader(stream), mode="r:") as tar:
                files = _read_members(tar, archive, wanted)
    except InputError as error:
        named = str(error).startswith(format_path(path))
        raise InputError(str(error) if named else f"{format_path(path)}: {error}") from None
    except OSError as error:
        raise InputError(f"{format_path(path)} cannot be read: {error.strerror or shorten(error)}") from None
    except Exception as error:  # tarfile and zlib raise many kinds of exceptions for damaged files
        raise InputError(f"{format_path(path)} is truncated or not a .tar.gz: {shorten(error)}") from None
    missing = [name for name in wanted if name not in files]
    if missing:
        raise InputError(f"{format_path(path)} lacks {', '.join(missing)}")
    return files


def _keras_cache():
    return Path(os.environ.get("KERAS_HOME") or Path.home() / ".keras") / "datasets"


def _list_candidates(archive, data_dir):
    """Return the paths where the data may be, in order of preference: in `data_dir` or, without it, in Keras' cache."""
    if data_dir:
        root = Path(data_dir)
        return [root / archive.folder, root / archive.file, root]
    cache, target = _keras_cache(), archive.in_keras_cache
    return [cache / target / archive.folder, cache / archive.folder, cache / f"{target}_archive", cache / archive.file]


def _is_data(path, archive):
    return path.is_file() or (path / archive.train[0]).is_file() or (path / archive.test[0]).is_file()


def find(archive, data_dir, name):
    """Return the folder or file with the data, or None if it is not in Keras' cache.

    Raises:
        InputError: a `data_dir` is given, and the data is not in it.
    """
    for path in _list_candidates(archive, data_dir):
        if _is_data(path, archive):
            return path
    if not data_dir:
        return None
    if not Path(data_dir).exists():
        raise InputError(f"--data-dir {data_dir} does not exist")
    raise InputError(f"--data-dir {data_dir} contains neither {archive.folder}/ nor {archive.file} for {name}")


def _ask_server(url, failures):
    try:
        request = urllib.request.Request(url, method="HEAD")
        urllib.request.urlopen(request, timeout=WAIT_S).close()
    except (OSError, ValueError) as error:
        failures.append(str(getattr(error, "reason", error)))


def _refuse_without_network(archive, name):
    """Raise `InputError` if the server does not answer.

    The request is made in a thread, so that neither a dead name server nor a silent network can block the program.
    """
    failures = []
    thread = threading.Thread(target=_ask_server, args=(archive.url, failures), daemon=True)
    thread.start()
    thread.join(WAIT_S)
    if thread.is_alive():
        failures.append(f"no answer within {WAIT_S:g} s")
    if failures:
        raise InputError(
            f"no {name} in {_keras_cache()}, and {archive.url} cannot be reached ({failures[0]:.120}): give "
            f"--data-dir with {archive.file}, or put that file into {_keras_cache()}, or use --dataset digits"
        )


def download(archive, name):
    """Fetch the official archive into Keras' cache, with a progress bar, and check its SHA-256.

    Raises:
        InputError: the server cannot be reached, or sends other bytes than the official ones; or the backend is not
            installed.
    """
    _refuse_without_network(archive, name)
    choose_backend()
    with explain_import_errors():
        keras = import_keras()  # for its downloader; reading local files needs no framework
    try:
        path = keras.utils.get_file(archive.file, archive.url, cache_dir=_keras_cache().parent, cache_subdir="datasets")
    except Exception as error:
        raise InputError(f"the download of {archive.url} failed: {shorten(error)}") from None
    with open_file(path, LARGEST_DOWNLOAD) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != archive.sha256:
        os.replace(path, f"{path}.broken")
        raise InputError(f"{archive.url} sent other bytes than the official ones; they are kept in {path}.broken")
    return Path(path)


def read(name, data_dir=""):
    """Read an official data set.

    Args:
        name: "cifar10" or "cifar100".
        data_dir: folder with the unpacked folder, or folder or path of the `.tar.gz` or `.tar` file. With "", the data
            is read from Keras' cache, and downloaded into it if it is not there.

    Returns:
        `(train_images, train_labels, test_images, test_labels, class_names)`, images uint8 `(n, 32, 32, 3)`, labels
        int32 `(n,)`.

    Raises:
        InputError: the data is missing, cannot be downloaded, or one of its files is invalid.
    """
    archive = ARCHIVES[name]
    path = find(archive, data_dir, name) or download(archive, name)
    wanted = (*archive.train, *archive.test, archive.meta)
    files = _read_tar(path, archive, wanted) if path.is_file() else _read_folder(path, wanted)
    where = f"{path}:" if path.is_file() else f"{path}/"
    train = [read_batch(files[f], where + f, archive, archive.rows[0]) for f in archive.train]
    test = [read_batch(files[f], where + f, archive, archive.rows[1]) for f in archive.test]
    names = read_names(files[archive.meta], where + archive.meta, archive)
    return (*_concatenate(train), *_concatenate(test), names)


def _concatenate(batches):
    images, labels = zip(*batches)
    return np.concatenate(images), np.concatenate(labels)

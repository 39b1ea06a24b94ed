"""Shared by tests: a network of a few thousand weights, and archives in the official format."""

import io
import pickle
import struct
import tarfile

import numpy as np

from Training.data.archives import ARCHIVES


def tiny_network(**kwargs):
    """Return a small network with all parts of the real ones: one stage with one attention block of 8 channels."""
    from Model import Geometry, Stage, residual_attention_network

    geometry = Geometry(stem_filters=4, stem_kernel=3, stem_pool=2, stages=(Stage(8, 2, 2),), tail=((16, 2),))
    return residual_attention_network(geometry=geometry, **{"name": "tiny", **kwargs})


def tiny_build(recipe, data):
    """Stand in for `training_cifar10.build`."""
    from Model.preprocessing import mean_subtraction

    return tiny_network(
        learning=recipe.learning,
        classes=len(data.classes),
        input_shape=data.train.images.shape[1:],
        dropout=recipe.dropout,
        preprocessing=mean_subtraction(*data.mean_and_std(recipe.mean)),
    )


class Python2Pickler(pickle._Pickler):
    """Writes byte strings like Python 2, as in the official files."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_bytes(self, value):
        short = len(value) < 256
        self.write(b"U" + bytes([len(value)]) if short else b"T" + struct.pack("<i", len(value)))
        self.write(value)
        self.memoize(value)

    def save_str(self, value):
        self.save_bytes(value.encode("ascii"))

    dispatch[bytes] = save_bytes
    dispatch[str] = save_str


def pickle_as_python_2(value):
    buffer = io.BytesIO()
    Python2Pickler(buffer, protocol=2).dump(value)
    return buffer.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def make_batch(archive, rows, seed=0, **changes):
    """Return one file of the archive, with random images and cyclic labels."""
    images = np.random.default_rng(seed).integers(0, 256, (rows, 3072), dtype=np.uint8)
    labels = [i % archive.classes for i in range(rows)]
    return pickle_as_python_2({"batch_label": b"a batch", archive.labels: labels, b"data": images, **changes})


def make_official_files(name):
    """Return all files of an archive in the official format and size, `{name: bytes}`."""
    archive = ARCHIVES[name]
    files = {f: make_batch(archive, archive.rows[0], i) for i, f in enumerate(archive.train)}
    files[archive.test[0]] = make_batch(archive, archive.rows[1], 99)
    names = [b"class %d" % i for i in range(archive.classes)]
    files[archive.meta] = pickle_as_python_2({archive.names: names, b"num_vis": 3072})
    return files


def write_folder(root, name, files):
    folder = root / ARCHIVES[name].folder
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in files.items():
        (folder / file).write_bytes(content)
    return folder


def write_tar(root, name, files):
    path = root / ARCHIVES[name].file
    with tarfile.open(path, "w:gz", compresslevel=0) as tar:  # random bytes cannot be compressed
        for file, content in files.items():
            info = tarfile.TarInfo(f"{ARCHIVES[name].folder}/{file}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path

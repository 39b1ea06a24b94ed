"""predict.py prints the probabilities of the saved network for any picture; errors are one line."""

import csv
import errno
import io
import json
import os
import zipfile
from pathlib import Path
from types import SimpleNamespace

import h5py
import keras
import numpy as np
import pytest
from PIL import Image

import predict
from Model.preprocessing import mean_subtraction
from tests.support.tiny import tiny_network
from Training.visual import plots
from Training.visual.inspection import make_mask_model

SAID = "predict.py: classified by {} (with --best: best.keras)\n"
NAMES = [f"class {letter}" for letter in "abcdefghij"]


def build_linear_network():
    """Return a network that compiles quickly."""
    images = keras.Input((32, 32, 3))
    flat = keras.layers.Rescaling(0.01)(keras.layers.Flatten()(images))
    return keras.Model(images, keras.layers.Dense(10, "softmax")(flat))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run with two networks, a folder of 20 pictures of their size, and the probabilities for them."""
    folder = tmp_path_factory.mktemp("run")
    rng = np.random.default_rng(0)
    keras.utils.set_random_seed(3)
    mean = rng.uniform(90, 160, (32, 32, 3)).astype("float32")
    networks = {"last": tiny_network(preprocessing=mean_subtraction(mean)), "best": build_linear_network()}
    for name, network in networks.items():
        network.save(folder / f"{name}.keras")
    (folder / "classes.json").write_text(json.dumps(NAMES))
    images = rng.integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    for i, image in enumerate(images):
        path = folder / "pictures" / f"{i % 3}" / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    answers = {name: network.predict(images, verbose=0) for name, network in networks.items()}
    return SimpleNamespace(folder=folder, images=images, network=networks["last"], **answers)


@pytest.mark.backends
def test_csv_has_the_probabilities_of_the_network(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(predict, "BATCH", 8)  # the last batch is shorter
    table = tmp_path / "table.csv"
    folder = run.folder
    predict.main([str(folder / "pictures"), "--model", str(folder), "--csv", str(table), "--top", "3"])
    assert capsys.readouterr() == (f"{table} written: 20 pictures\n", SAID.format(folder / "last.keras"))
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    order = sorted(range(20), key=lambda i: (i % 3, i))
    assert [row["image"] for row in rows] == [str(folder / "pictures" / f"{i % 3}" / f"{i:02}.png") for i in order]
    expected = run.last[order]
    ranks = np.argsort(-expected, axis=-1)[:, :3]
    for place in range(3):
        assert [row[f"class_{place + 1}"] for row in rows] == [NAMES[i] for i in ranks[:, place]]
        given = [float(row[f"probability_{place + 1}"]) for row in rows]
        np.testing.assert_allclose(given, np.take_along_axis(expected, ranks, 1)[:, place], rtol=1e-5)


@pytest.mark.backends
def test_one_picture_is_a_list(run, capsys):
    path, shares = run.folder / "pictures" / "0" / "00.png", run.best[0]
    predict.main([str(path), "--model", str(run.folder / "best.keras")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(path)
    order = np.argsort(-shares)[:5]
    assert [line[:9].strip() for line in lines[1:]] == [NAMES[i] for i in order]
    assert [line[9:].split() for line in lines[1:]] == [[f"{100 * shares[i]:.2f}", "%"] for i in order]


@pytest.mark.backends
def test_broken_pictures_are_named_and_skipped(run, tmp_path, capsys):
    for name in ("b.png", "d.bmp"):
        Image.fromarray(run.images[7]).save(tmp_path / name)
    (tmp_path / "a.png").touch()
    (tmp_path / "c.jpg").write_text("no picture")
    with pytest.raises(SystemExit) as stop:
        predict.main([str(tmp_path), "--model", str(run.folder), "--best", "--top=99"])
    out, err = capsys.readouterr()
    assert stop.value.code == 1
    order = np.argsort(-run.best[7])
    shares = ", ".join(f"{NAMES[i]} {100 * run.best[7, i]:.1f} %" for i in order)
    assert out.splitlines() == [f"{tmp_path / name}  {shares}" for name in ("b.png", "d.bmp")]
    assert err.splitlines() == [
        f"predict.py: classified by {run.folder / 'best.keras'} (without --best: last.keras, the final weights)",
        f"predict.py: skipped: {tmp_path / 'a.png'} is empty",
        f"predict.py: skipped: {tmp_path / 'c.jpg'} is not a readable picture",
        "predict.py: 2 of 4 pictures could not be read",
    ]


@pytest.mark.backends
def test_masks_are_written_for_each_picture(run, tmp_path, capsys):
    masks = ["--masks", str(tmp_path / "masks")]
    predict.main([str(run.folder / "pictures" / "1"), "--model", str(run.folder), *masks, "--csv", "-"])
    out, err = capsys.readouterr()
    assert "7 mask pictures written to" in err and len(list(csv.DictReader(io.StringIO(out)))) == 7
    written = {path.name for path in (tmp_path / "masks").iterdir()}
    assert written == {f"{i:02}.png.masks.png" for i in range(1, 20, 3)}
    image = run.images[4:5]
    masks = make_mask_model(run.network)(image)
    expected = plots.draw_masks(image, {block: np.asarray(mask) for block, mask in masks.items()}, ["04.png"])
    given = np.asarray(Image.open(tmp_path / "masks" / "04.png.masks.png")).astype(int)
    assert given.shape == expected.shape and abs(given - expected.astype(int)).mean() < 0.5


def test_long_names_of_mask_pictures_are_shortened(run, tmp_path, capsys):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    names = ["a" * 250 + ".png", "a" * 249 + "b.png", "翘" * 83 + ".png", "short.png"]
    for name in names:
        Image.fromarray(run.images[0]).save(pictures / name)
    predict.main([str(pictures), "--model", str(run.folder), "--masks", str(tmp_path / "masks")])
    assert "4 mask pictures written to" in capsys.readouterr().out
    written = {path.name for path in (tmp_path / "masks").iterdir()}
    assert len(written) == 4 and "short.png.masks.png" in written
    assert all(len(os.fsencode(name)) <= 255 and name.endswith(".masks.png") for name in written)


def test_a_mask_picture_whose_path_is_too_long_is_skipped_and_named(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    deep = Path("pictures", *["d" * 200] * 2)
    deep.mkdir(parents=True)
    for path in (Path("pictures") / "a.png", deep / "b.png"):
        Image.fromarray(run.images[0]).save(path)
    mkdir = Path.mkdir

    def limited(self, *args, **kwargs):
        if len(str(self)) > 300:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), str(self))
        return mkdir(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", limited)
    with pytest.raises(SystemExit) as stop:
        predict.main(["pictures", "--model", str(run.folder / "last.keras"), "--masks", "masks"])
    out, err = capsys.readouterr()
    assert stop.value.code == 1 and out.endswith("1 mask picture written to masks\n")
    assert err.splitlines() == [
        "predict.py: skipped: the path of the masks of b.png is too long",
        "predict.py: 1 mask picture could not be written",
    ]


def test_names_from_outside_are_escaped(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = ["=cmd|' /C calc'!A0", "\x1b[2Jcleared", "two\nlines", "x" * 5000, "翘头剪", "+1", "-1+1", "@a", "b", "c"]
    (tmp_path / "best.keras").write_bytes((run.folder / "best.keras").read_bytes())
    (tmp_path / "classes.json").write_text(json.dumps(names))
    for name in ("=1+1.png", "\x1b[2J.png"):
        Image.fromarray(run.images[0]).save(tmp_path / name)
    arguments = ["=1+1.png", "\x1b[2J.png", "--model", "best.keras", "--top", "10"]
    predict.main(arguments)
    out = capsys.readouterr().out
    assert out.count("\n") == 2 and all(line.isprintable() and len(line) < 1000 for line in out.splitlines())
    predict.main([*arguments, "--csv", "-"])
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["image"] for row in rows] == ["'=1+1.png", r"\x1b[2J.png"]
    classes = {row[f"class_{i}"] for row in rows for i in range(1, 11)}
    escaped = {"'=cmd|' /C calc'!A0", r"\x1b[2Jcleared", r"two\nlines", "'-1+1", "'@a"}
    assert classes == escaped | {"x" * 5000, "翘头剪", "+1", "b", "c"}


def test_without_names_classes_are_numbered_with_a_warning(run, tmp_path, capsys):
    folder = run.folder
    (tmp_path / "moved.keras").write_bytes((folder / "best.keras").read_bytes())
    predict.main([str(folder / "pictures" / "0" / "00.png"), "--model", str(tmp_path / "moved.keras"), "--csv=-"])
    out, err = capsys.readouterr()
    (row,) = csv.DictReader(io.StringIO(out))
    assert row["class_1"] == str(run.best[0].argmax())
    assert err.count("\n") == 1 and "no classes.json next to" in err


def write_other_networks(folder, source):
    """Write files that are not networks of this project; return the expected messages by file name."""
    (folder / "text.keras").write_text("no network")
    (folder / "cut.keras").write_bytes(source.read_bytes()[:2000])
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(folder / "newer.keras", "w") as new:
        for name in old.namelist():
            raw = old.read(name).replace(b"AttentionBlock", b"AnotherBlock")
            new.writestr(name, raw.replace(keras.__version__.encode(), b"99.1") if name == "metadata.json" else raw)
            if name == "model.weights.h5":
                (folder / name).write_bytes(raw)
    with h5py.File(folder / "model.weights.h5", "a") as weights:
        del weights["layers/attention_block/trunk"]
    with zipfile.ZipFile(folder / "newer.keras") as old, zipfile.ZipFile(folder / "lacking.keras", "w") as new:
        new.writestr("metadata.json", old.read("metadata.json"))
        new.writestr("config.json", old.read("config.json").replace(b"AnotherBlock", b"AttentionBlock"))
        new.write(folder / "model.weights.h5", "model.weights.h5")
    vector = keras.Input((7,))
    keras.Model(vector, keras.layers.Dense(3)(vector)).save(folder / "vectors.keras")
    image = keras.Input((8, 8, 3))
    keras.Model(image, keras.layers.Conv2D(3, 1)(image)).save(folder / "maps.keras")
    return {
        "text.keras": "cannot be loaded as a network, this is Keras",
        "cut.keras": "cannot be loaded as a network, this is Keras",
        "newer.keras": "cannot be loaded as a network (saved by Keras 99.1), this is Keras",
        "lacking.keras": "cannot be loaded as a network (saved by Keras 99.1), this is Keras",
        "vectors.keras": "must take images (height, width, 3), but takes (None, 7)",
        "maps.keras": "must output one probability per class, but outputs (None, 8, 8, 3)",
    }


def test_impossible_requests_are_refused_in_one_line(run, tmp_path, capsys):
    folder = run.folder
    picture, model = str(folder / "pictures" / "0" / "00.png"), str(folder)
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "last.keras").write_bytes((folder / "best.keras").read_bytes())
    (tmp_path / "odd" / "classes.json").write_text('["cat"]')
    cases = [
        ([picture, "--best"], "--best needs a run's folder: give --model"),
        ([picture, "--model", model, "--mask"], "did you mean --masks?"),
        ([picture, "--model", model, "--top", "0"], "--top must be 1 or more, received 0"),
        (["nothing.png", "--model", model], "nothing.png does not exist"),
        (["", "--model", model], "a picture or a folder is needed, received ''"),
        ([str(tmp_path / "empty"), "--model", model], "empty contains no pictures"),
        ([picture, "--model", "nowhere"], "nowhere does not exist: a run's folder, a .keras file or the name"),
        ([picture, "--model", str(tmp_path / "empty")], "empty has no last.keras; it has no .keras file"),
        ([picture, "--model", f"{model}/last.keras", "--best"], "--best needs a run's folder"),
        ([picture, "--model", str(tmp_path / "odd")], "must be a list of the network's 10 class names"),
        ([picture, "--model", model, "--best", "--csv", str(tmp_path)], f"--csv {tmp_path} cannot be written"),
        ([picture, picture, "--model", model, "--masks", str(tmp_path)], "two pictures are called 00.png"),
        ([picture, str(folder / "pictures" / "0"), "--model", model, "--masks", "x"], "two pictures are called 00.png"),
        ([picture, "--model", model, "--best", "--masks", str(tmp_path)], "has no attention blocks"),
        ([picture, "--model", model, "--masks", picture], f"--masks {picture} cannot be written"),
    ]
    for name, said in write_other_networks(tmp_path, folder / "last.keras").items():
        cases.append(([picture, "--model", str(tmp_path / name)], said))
    for arguments, said in cases:
        with pytest.raises(SystemExit) as stop:
            predict.main(arguments)
        out, err = capsys.readouterr()
        assert stop.value.code == 2 and out == "" and err.startswith("predict.py: error: ")
        assert said in err and err.count("\n") == 1, err

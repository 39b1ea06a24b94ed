"""Streamed pictures: from folders, shards and TensorFlow Datasets."""

import errno
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from PIL import Image

import training_cifar10
from Model.preprocessing import mean_subtraction
from tests.support import tiny
from tests.support.backend import JIT
from Training.data import datasets, folder, shards, tfds
from Training.data.batches import Batches
from Training.data.datasets import Data, Examples
from Training.data.stream import Stream, draw_crop, shuffle_locally
from Training.engine import event_callbacks
from Training.engine.callbacks import EpochOrder
from Training.engine.evaluation import top_5
from Training.engine.fit import fit
from Training.engine.optimizers import make_schedule
from Training.engine.statistics import choose_examples
from Training.errors import InputError, RunError
from Training.flags import parse
from Training.recipe import Recipe
from Training.runs import saved
from Training.runs.checkpoint import list_checkpoints, unpack
from Training.tools import export, figures
from Training.tools import folder as folder_tool
from Training.tools import shards as shards_tool

CLASSES = ("ant", "bee", "cat")
SIZES = {"ant": 14, "bee": 12, "cat": 10}  # training pictures


def draw_colours(rng, label, height, width):
    """Draw pixels in which one colour dominates."""
    pixels = rng.integers(0, 100, (height, width, 3), dtype=np.uint8)
    pixels[..., label] += 120
    return pixels


def add_pictures(root, part, sizes, seed=0, pixels=None):
    """Write PNG and JPEG files of several sizes, or PNG files of `pixels` x `pixels`."""
    rng = np.random.default_rng(seed)
    for label, (name, count) in enumerate(sizes.items()):
        (root / part / name).mkdir(parents=True)
        for i in range(count):
            height, width = (pixels, pixels) if pixels else rng.integers(20, 40, 2)
            ending = "png" if i % 2 or pixels else "jpg"
            Image.fromarray(draw_colours(rng, label, height, width)).save(root / part / name / f"{i:03d}.{ending}")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder of three classes, with the pictures that most tests only read."""
    made = tmp_path_factory.mktemp("pictures")
    add_pictures(made, "train", SIZES)
    add_pictures(made, "val", dict.fromkeys(CLASSES, 4), seed=1)
    return made


@pytest.fixture
def own(root, tmp_path):
    """A copy of that folder, which a test may damage."""
    return Path(shutil.copytree(root, tmp_path / "own"))


def break_behind_the_head(path):
    """Overwrite the tables of a JPEG file; it still begins and ends like a complete file."""
    raw = path.read_bytes()
    path.write_bytes(raw[:20] + bytes(300) + raw[320:])


def test_a_stream_behaves_like_an_array(root, tmp_path):
    whole = datasets.load("folder", str(root), size=16).train.images
    assert whole.shape == (36, 16, 16, 3) and len(whole) == 36
    everything = whole[np.arange(36)]
    assert everything.dtype == np.uint8 and everything.shape == whole.shape
    np.testing.assert_array_equal(whole[:5], everything[:5])
    np.testing.assert_array_equal(whole[3], everything[3])
    np.testing.assert_array_equal(whole[[7, 2, 7]], everything[[7, 2, 7]])
    np.testing.assert_array_equal(whole.take([9, 4], axis=0)[np.array([1, 0])], everything[[4, 9]])
    assert whole[[]].shape == (0, 16, 16, 3)
    few = whole.take([9, 4, 6])
    assert few.shape == (3, 16, 16, 3) and few[[]].shape == (0, 16, 16, 3)
    np.testing.assert_array_equal(few[1:], everything[[4, 6]])


def test_parts_classes_and_balance(root, own):
    read = datasets.load("folder", str(root), size=16)
    assert read.classes == CLASSES and read.test.images is read.validation.images
    assert [len(part.labels) for part in read[:3]] == [36, 12, 12] and len(read.held_out) == 0
    np.testing.assert_array_equal(np.bincount(read.train.labels), list(SIZES.values()))
    balance, role = datasets.describe_streams(read)
    assert (
        r"smallest 'caf\udce9' with" in datasets.describe_streams(read._replace(classes=("ant", "bee", "caf\udce9")))[0]
    )
    assert "smallest cat with 10 training pictures, largest ant with 14 (1.4 times as many)" in balance
    assert role == "no test set: the validation set (12 pictures) is also used for testing"
    (own / "val").rename(own / "test")
    split = datasets.load("folder", str(own), validation_split=0.25, size=16)
    assert [len(part.labels) for part in split[:3]] == [27, 9, 12] and len(datasets.describe_streams(split)) == 1
    np.testing.assert_array_equal(np.bincount(split.validation.labels), [4, 3, 2])
    assert len(datasets.load("folder", str(own), samples=9, size=16).train.labels) == 9
    few = datasets.load("folder", str(own), validation_split=0.25, eval_samples=6, size=16)
    assert [len(part.labels) for part in few[:3]] == [27, 6, 6] and len(few.held_out) == 6
    assert set(few.held_out) < set(split.held_out)
    few = datasets.load("folder", str(root), eval_samples=6, size=16)
    assert few.test.images is few.validation.images and len(few.test.labels) == 6


def test_a_class_without_training_pictures_is_refused(own):
    for path in sorted((own / "train/cat").iterdir())[2:]:
        path.unlink()
    with pytest.raises(InputError, match="no training image of cat is left, and 1 of 3 classes have none: give more"):
        datasets.load("folder", str(own), size=16, samples=4)


def test_files_that_are_not_pictures_are_named_and_skipped_or_refused(own, capsys):
    bad = [own / "train/bee/empty.png", own / "train/bee/notes.txt", own / "val/cat/cut.jpg", own / "train/cat/folder"]
    bad[0].touch()
    bad[1].write_text("no picture")
    bad[2].write_bytes((own / "val/cat/000.jpg").read_bytes()[:500])
    bad[3].mkdir()
    (own / "train/.DS_Store").touch()
    (own / "train/cat/.hidden").touch()
    read = datasets.load("folder", str(own), size=16)
    assert [len(part.labels) for part in read[:2]] == [36, 12]
    err = capsys.readouterr().err
    assert all(err.count(f"skipped: {path} ") == 1 for path in bad) and ".DS_Store" not in err and ".hidden" not in err
    assert "3 files in" in err and "1 file in" in err
    with pytest.raises(InputError, match=r"3 files in .* cannot be read: .*empty.png is empty; repair or remove them"):
        datasets.load("folder", str(own), size=16, broken="refuse")


def test_a_sample_of_a_stream_has_its_replacements_its_failure_and_its_cache(own, tmp_path, monkeypatch, capsys):
    """As for recomputed statistics: the sample may contain only one picture of a class, and that may be broken."""
    break_behind_the_head(own / "train/bee/002.jpg")
    read = datasets.load("folder", str(own), size=16, cache=str(tmp_path / "cache"))
    images, bee = read.train.images, 14
    chosen = choose_examples(Examples(images, read.train.labels), 36, 12)
    assert len(chosen.labels) == 36 and chosen.images.stream is images
    sample = images.take([bee + 2])
    np.testing.assert_array_equal(sample[np.array([0])], images[np.array([bee + 3])])
    images.take([0, 1])[:]
    monkeypatch.setattr("Training.data.decoding.read", lambda *_: pytest.fail("it is in the cache"))
    images.take([1, 0])[:]
    monkeypatch.undo()
    for path in (own / "train/cat").iterdir():
        path.unlink()
    with pytest.raises(RunError, match="no more pictures of a class can be read"), read.reading():
        images.take([35])[:]


@pytest.mark.parametrize("crops", [False, True])
def test_a_picture_with_damaged_content_is_replaced_by_the_next_of_its_class(own, capsys, crops):
    break_behind_the_head(own / "train/bee/002.jpg")
    break_behind_the_head(own / "train/bee/010.jpg")
    read = datasets.load("folder", str(own), size=16, random_crops=crops, workers=3)
    images, bee = read.train.images, 14

    def get(positions):
        return images.crop_randomly(positions, (0, 1)) if crops else images[positions]

    first = get([bee + 2, bee + 10])
    for _ in range(2):
        np.testing.assert_array_equal(get([bee + 2, bee + 10]), first)
    if not crops:
        np.testing.assert_array_equal(first, images[[bee + 3, bee + 11]])
    err = capsys.readouterr().err
    assert err.count("002.jpg") == 1 and err.count("010.jpg") == 1 and read.broken == 2
    with pytest.raises(InputError, match="2 files in .*: give --broken skip|2 files in .*002.jpg"):
        datasets.load("folder", str(own), size=16, broken="refuse")


@pytest.mark.backends
def test_pictures_that_vanish_end_a_run_in_one_line(own):
    read = datasets.load("folder", str(own), size=16, workers=2)
    shutil.rmtree(own / "val")
    inputs = keras.Input((16, 16, 3))
    model = keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(inputs))
    with pytest.raises(RunError, match="no more pictures of a class can be read: .* does not exist"):  # noqa: SIM117
        with read.reading():
            model.predict(Batches(read.validation, 4), verbose=0)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda own: shutil.rmtree(own / "train"), "must contain train/<class>/, but has no folder train"),
        (lambda own: (own / "val/dog").mkdir(), "has classes that are missing in train/: dog"),
        (lambda own: (own / "train/dog").mkdir(), "has classes without a picture: dog"),
        (lambda own: [shutil.rmtree(p) for p in (own / "val").iterdir()], "move each picture into val/<class>/"),
        (lambda own: [p.unlink() for p in (own / "val").glob("*/*")], "has no readable picture"),
        (lambda own: shutil.rmtree(own / "val"), "has no test pictures: add test/ or val/, or give"),
        (lambda own: [shutil.rmtree(own / part / c) for part in ("train", "val") for c in CLASSES[1:]], "but has 1"),
    ],
)
def test_folders_that_cannot_be_used_are_refused_in_one_line(own, change, said):
    change(own)
    with pytest.raises(InputError) as refusal:
        datasets.load("folder", str(own), validation_split=0.0, size=16)
    assert said in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["val", "valid", "validation", "dev", "eval", "VAL", "Validation"])
def test_the_validation_set_may_have_any_common_name(root, own, capsys, name):
    expected = datasets.load("folder", str(root), size=16).validation
    (own / "val").rename(own / name)
    read = datasets.load("folder", str(own), size=16).validation
    assert len(read.labels) == 12 and (read.images[:] == expected.images[:]).all()
    assert capsys.readouterr().err == ""


def test_two_validation_sets_are_refused(own):
    shutil.copytree(own / "val", own / "valid")
    with pytest.raises(InputError, match="^val and valid could both be the validation set"):
        datasets.load("folder", str(own), size=16)


def test_training_and_test_sets_may_have_common_names(own, capsys):
    (own / "train").rename(own / "TRAIN")
    shutil.copytree(own / "val", own / "Testing")
    read = datasets.load("folder", str(own), size=16)
    assert [len(part.labels) for part in read[:3]] == [36, 12, 12] and read.test.images is not read.validation.images
    assert capsys.readouterr().err == ""
    (own / "training").mkdir()
    with pytest.raises(InputError, match="TRAIN and training|training and TRAIN"):
        datasets.load("folder", str(own), size=16)
    (own / "training").rename(own / "val2")
    (own / "TRAIN/cat/nested/deep").mkdir(parents=True)
    datasets.load("folder", str(own), size=16)
    err = capsys.readouterr().err
    assert f"not used in {own}: val2/\n" in err and "TRAIN/cat/nested must be a regular file" in err


def test_files_that_are_not_used_are_named_in_one_line(own, capsys):
    (own / "val").rename(own / "holdout")
    (own / "notes.txt").touch()
    (own / "train/stray\n.png").touch()
    (own / ".hidden").touch()
    datasets.load("folder", str(own), size=16)
    assert capsys.readouterr().err == f"not used in {own}: holdout/, notes.txt, 'train/stray\\n.png'\n"
    for i in range(30):
        (own / f"a{i:02}").mkdir()
    datasets.load("folder", str(own), size=16)
    err = capsys.readouterr().err
    assert err.endswith("a08/, a09/ and 23 more\n") and err.count("\n") == 1


@pytest.mark.parametrize("name", ["x" * 255, "\u7fd8\u5934\u526a" * 28, "caf\udce9", "a\x1b[31m", "\u05d0\u200f"])
def test_classes_may_have_names_of_any_length_and_script(own, name):
    (own / "train/cat").rename(own / "train" / name)
    (own / "val/cat").rename(own / "val" / name)
    read = datasets.load("folder", str(own), size=16)
    assert name in read.classes and len(read.train.labels) == 36
    (line, _) = datasets.describe_streams(read)
    assert line.isprintable() and len(line) < 250


def test_labels_are_read_from_the_records_once(tmp_path):
    class Source(list):
        reads = 0

        def __iter__(self):
            self.reads += 1
            return super().__iter__()

    source, path = Source({"label": i % 3} for i in range(7)), tmp_path / "labels-train.npy"
    for _ in range(2):
        np.testing.assert_array_equal(tfds.read_labels(source, path), [0, 1, 2, 0, 1, 2, 0])
    assert source.reads == 1
    for damage in (b"", b"torn", path.read_bytes()[:-1]):  # the labels are then read from the records and kept again
        path.write_bytes(damage)
        for _ in range(2):
            assert tfds.read_labels(source, path).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert source.reads == 4
    source.append({"label": 1})
    assert len(tfds.read_labels(source, path)) == 8
    assert len(tfds.read_labels(source, tmp_path / "missing" / "labels.npy")) == 8


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSPC])
def test_a_file_system_that_cannot_reserve_space_still_keeps_a_cache(root, tmp_path, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    if number == errno.ENOSPC:
        with pytest.raises(InputError, match="cannot be written: No space left"):
            datasets.load("folder", str(root), size=16, cache=str(tmp_path))
    else:
        kept = datasets.load("folder", str(root), size=16, cache=str(tmp_path)).train.images
        np.testing.assert_array_equal(kept[:], kept[:])


def test_a_cache_needs_no_validation_set(own, tmp_path):
    (own / "val").rename(own / "test")
    read = datasets.load("folder", str(own), validation_split=0.0, size=16, cache=str(tmp_path / "cache"))
    assert len(read.validation.labels) == 0 and read.test.images[:].shape == (12, 16, 16, 3)


def test_a_class_that_cannot_be_read_is_refused_in_one_line(own, monkeypatch):
    scandir = folder.os.scandir

    def refuse(path):
        if Path(path).name == "bee":  # permissions do not stop root
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(folder.os, "scandir", refuse)
    with pytest.raises(InputError, match=r"train/bee cannot be read: Permission denied$"):
        datasets.load("folder", str(own), size=16)


def test_a_folder_must_be_named():
    with pytest.raises(InputError, match="dataset=folder needs its folder: give --data-dir"):
        datasets.load("folder", size=16)


def test_random_crops_lie_within_the_picture_and_depend_on_seed_epoch_and_position(root):
    rng = np.random.default_rng(0)
    boxes = np.array([draw_crop(rng, 200, 300) for _ in range(2000)])
    wide, high = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert boxes[:, :2].min() >= 0 and boxes[:, 2].max() <= 300 and boxes[:, 3].max() <= 200
    share, aspect = wide * high / 60_000, wide / high
    assert 0.0799 < share.min() < 0.1 and share.max() > 0.8
    assert 0.7499 < aspect.min() < 0.76 and 1.32 < aspect.max() < 1.3334
    assert draw_crop(rng, 10, 1000) == (495, 0, 505, 10)  # no crop of such an aspect ratio fits
    images = datasets.load("folder", str(root), size=16, random_crops=True).train.images
    one = images.crop_randomly([5, 6], (0, 1))
    np.testing.assert_array_equal(images.crop_randomly([6], (0, 1))[0], one[1])
    for other in ((1, 1), (0, 2)):
        assert not np.array_equal(images.crop_randomly([5, 6], other), one)


def test_with_random_crops_other_pictures_are_center_crops_of_a_larger_size(own):
    Image.fromarray(np.arange(256, dtype=np.uint8).repeat(768).reshape(256, 256, 3)).save(own / "val/ant/00.png")
    images = datasets.load("folder", str(own), size=224, random_crops=True).validation.images
    np.testing.assert_array_equal(images[0][:, 0, 0], np.arange(16, 240))  # the middle 224 of 256 rows


def build_dense(recipe, source):
    """Stand in for `training_cifar10.build` with a network of one layer, which is traced quickly."""
    inputs = keras.Input(source.train.images.shape[1:], name="images")
    x = mean_subtraction(*source.mean_and_std(recipe.mean))(inputs)
    x = keras.layers.Dense(len(source.classes), name="logits", kernel_initializer="zeros")(keras.layers.Flatten()(x))
    return keras.Model(inputs, keras.layers.Softmax()(x), name="dense")


@pytest.mark.backends
def test_several_threads_keep_the_order_of_every_epoch(root):
    """The weights equal those after training on an array, for three epochs of which the last starts in its middle."""
    source = datasets.load("folder", str(root), size=8, workers=4)
    in_memory = Examples(source.train.images[:], source.train.labels)
    weights = []
    for examples in (in_memory, source.train):
        batches = Batches(examples, 5, seed=3)
        model = build_dense(Recipe(), source)
        model.compile("sgd", "sparse_categorical_crossentropy", jit_compile=JIT)
        order = EpochOrder(batches)
        model.fit(batches, shuffle=False, epochs=2, verbose=0, callbacks=[order])
        batches.set_epoch(2, first_step=3)
        model.fit(batches, shuffle=False, initial_epoch=2, epochs=3, verbose=0, callbacks=[order])
        weights.append(model.get_weights()[0])
        seen = model.predict(Batches(examples, 5), verbose=0)
        np.testing.assert_allclose(seen, model.predict(in_memory.images, verbose=0), atol=1e-5)
    np.testing.assert_array_equal(*weights)


@pytest.mark.backends
def test_a_folder_of_png_files_trains_as_the_same_images_in_memory(tmp_path):
    """The losses are equal, since order, pixels and mean are; the images in memory are sorted like the files."""
    rng = np.random.default_rng(0)
    labels = np.sort(rng.integers(0, 3, 60)).astype("int32")
    images = np.stack([draw_colours(rng, label, 16, 16) for label in labels])
    folder_tool.write(images[:48], labels[:48], CLASSES, tmp_path / "pictures" / "train")
    folder_tool.write(images[48:], labels[48:], CLASSES, tmp_path / "pictures" / "val")
    held = Examples(images[48:], labels[48:])
    recipe = Recipe(dataset="digits", epochs=2, warmup_epochs=0.0, batch_size=8, augmentation="none", mean="pixel")
    in_memory = Data(Examples(images[:48], labels[:48]), held, held, CLASSES, np.arange(0))
    histories = []
    for source in (in_memory, datasets.load("folder", str(tmp_path / "pictures"), size=16)):
        keras.utils.set_random_seed(0)
        run = tmp_path / f"run {len(histories)}"
        run.mkdir()
        fit(build_dense(recipe, source), source, recipe, run, say=lambda line: None)
        rows = (run / "history.csv").read_text().splitlines()
        names = rows[0].split(",")
        histories.append([[row.split(",")[names.index(n)] for n in ("loss", "val_loss")] for row in rows[1:]])
    assert histories[0] == histories[1] and len(histories[0]) == 2


@pytest.fixture
def main(monkeypatch):
    """The `main` of the training script with a network of one dense layer, without event files."""
    monkeypatch.setattr(event_callbacks, "is_available", lambda: False)
    return lambda *arguments: training_cifar10.main([str(each) for each in arguments], build_dense)


@pytest.mark.backends
@pytest.mark.filterwarnings("ignore:tensorboard is not installed")
def test_a_run_of_the_imagenet_recipe_resumes_exactly_within_an_epoch(own, tmp_path, main, capsys):
    arguments = [
        "--recipe=imagenet",
        f"--data-dir={own}",
        "--image-size=16",
        "--batch-size=8",
        "--epochs=2",
        "--workers=3",
    ]
    main(*arguments, "--checkpoint-steps=3", "--logs", tmp_path / "Logs")
    assert "3 classes; smallest cat" in capsys.readouterr().out
    (whole,) = (tmp_path / "Logs").iterdir()
    again = Path(shutil.copytree(whole, tmp_path / "again" / whole.name))
    newest, before = list_checkpoints(again)
    assert unpack(before.read_bytes())[0]["step"] == 3
    newest.unlink()
    main("--resume", again)
    models = [keras.models.load_model(run / "last.keras") for run in (whole, again)]
    for a, b in zip(*(model.get_weights() for model in models), strict=True):
        np.testing.assert_array_equal(a, b)
    results = [json.loads((run / "result.json").read_text()) for run in (whole, again)]
    assert results[0]["test_loss"] == results[1]["test_loss"]
    shutil.copy(own / "train/ant/000.jpg", own / "train/ant/000 copy.jpg")
    with pytest.raises(SystemExit) as stop:
        main("--resume", again)
    assert stop.value.code == 2 and "the pictures differ from those the run started with" in capsys.readouterr().err


def test_a_cache_saves_decoding_and_broken_pictures_are_still_named(own, tmp_path, capsys):
    break_behind_the_head(own / "train/bee/002.jpg")
    plain = datasets.load("folder", str(own), size=16).train.images[:]
    kept = datasets.load("folder", str(own), size=16, cache=str(tmp_path / "cache"))
    for _ in range(2):
        np.testing.assert_array_equal(kept.train.images[:], plain)
    again = datasets.load("folder", str(own), size=16, cache=str(tmp_path / "cache"))
    asked, fetch = [], again.train.images.listing.fetch
    again.train.images.listing = again.train.images.listing._replace(fetch=lambda i: asked.append(i) or fetch(i))
    np.testing.assert_array_equal(again.train.images[:], plain)
    assert asked == [16, 17] and capsys.readouterr().err.count("002.jpg") == 3
    with pytest.raises(InputError, match="--cache /proc/cache cannot be written"):
        datasets.load("folder", str(own), size=16, cache="/proc/cache")
    other = datasets.load("folder", str(own), size=8, cache=str(tmp_path / "cache"))
    assert other.train.images[:3].shape == (3, 8, 8, 3)


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_a_cache_keeps_parts_and_data_sets_of_one_size_apart(tmp_path, kind):
    """The pictures have one colour and are not compressed, so their names, labels and sizes are the same."""

    def write(name, colours):
        for part, colour in zip(("train", "val", "test"), colours):
            for label in "ab":
                path = tmp_path / name / part / label / "0.bmp"
                path.parent.mkdir(parents=True)
                Image.new("RGB", (8, 8), (colour,) * 3).save(path)
        if kind == "shards":
            shards_tool.main([str(tmp_path / name), str(tmp_path / f"{name} as shards")])
        return str(tmp_path / (f"{name} as shards" if kind == "shards" else name))

    for name, colours in (("one", (10, 20, 30)), ("two", (40, 50, 60))):
        read = datasets.load(kind, write(name, colours), size=8, cache=str(tmp_path / "cache"))
        seen = [part.images[:] for part in (read.train, read.validation, read.test)]
        assert [(images.min(), images.max()) for images in seen] == [(colour, colour) for colour in colours]


def test_figures_and_exports_use_the_test_pictures_of_the_run(root, tmp_path):
    """Without val/ and test/, the held-out images are the test set; their share and size are in the recipe."""
    own = Path(shutil.copytree(root / "train", tmp_path / "own" / "train")).parent
    recipe = Recipe(dataset="folder", data_dir=str(own), image_size=20, validation_split=0.25)
    (tmp_path / "recipe.json").write_text(recipe.to_json())
    tested = datasets.load_for_recipe(recipe).test.images[:]
    assert tested.shape == (9, 20, 20, 3)
    network, path = tiny.tiny_network(input_shape=(20, 20, 3), classes=3), tmp_path / "last.keras"
    path.touch()  # only its recipe is read
    options = SimpleNamespace(data_dir="", best=False)
    np.testing.assert_array_equal(figures.load_data(network, tmp_path, options).test.images[:], tested)
    np.testing.assert_array_equal(export.load_test_images(network, saved.find_recipe(path), 5), tested[:5])
    other = saved.find_recipe(path, "digits")
    assert export.load_test_images(tiny.tiny_network(), other, 5).shape == (5, 32, 32, 3)
    with pytest.raises(InputError, match=r"the network takes images of \(20, 20, 3\), digits has \(32, 32, 3\)"):
        export.load_test_images(network, other, 5)
    larger = tiny.tiny_network(input_shape=(24, 24, 3), classes=3)
    assert export.load_test_images(larger, saved.find_recipe(path), 5).shape == (5, 24, 24, 3)
    with pytest.raises(InputError, match=r"the network takes images of \(24, 24, 3\), folder has \(20, 20, 3\)"):
        figures.load_data(larger, tmp_path, options)


def test_means_are_those_of_numpy(root):
    read = datasets.load("folder", str(root), size=8)
    pixels = read.train.images[:].astype("float64")
    mean, std = read.mean_and_std("auto")
    np.testing.assert_allclose(mean, pixels.mean(axis=(0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(std, pixels.std(axis=(0, 1, 2)), rtol=1e-4)
    np.testing.assert_allclose(read.mean_and_std("pixel")[0], pixels.mean(axis=0), rtol=1e-6)
    assert read.mean_and_std("imagenet")[0].tolist() == pytest.approx([123.675, 116.28, 103.53])


def test_preprocessing_divides_by_the_deviation():
    layer = mean_subtraction(np.float32([1, 2, 3]), np.float32([2, 4, 8]))
    out = keras.ops.convert_to_numpy(layer(np.full((1, 2, 2, 3), 11, "uint8")))
    np.testing.assert_allclose(out[0, 0, 0], [5, 2.25, 1], rtol=1e-6)


def test_top_5_counts_the_five_highest():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(40, 12)).astype("float32"), rng.integers(0, 12, 40).astype("int32")
    ranked = np.argsort(-logits, axis=1)
    assert top_5(logits, labels) == pytest.approx(np.mean([label in row[:5] for label, row in zip(labels, ranked)]))
    assert 0.2 < top_5(logits, labels) < 0.7
    assert top_5(logits[:, :10], labels % 10) is None


@pytest.mark.parametrize(
    "arguments, said",
    [
        ("--dataset folders", "dataset: must be one of cifar10, cifar100, digits, folder, shards or tfds:NAME"),
        ("--augmentation imagenet", "augmentation=imagenet cuts random crops from whole pictures"),
        ("--image-size 64", "image_size is for folder, shards or tfds:NAME, received dataset=cifar10"),
        ("--cache there", "cache is for folder"),
        ("--dataset folder --data-dir x --shards-at-once 2", "shards_at_once is for dataset=shards"),
        ("--dataset shards --data-dir x --broken refuse", "broken=refuse is for dataset=folder, received dataset=sha"),
        ("--epochs 1 --minutes 5", "minutes=5 stretches the schedule of the run, which needs epochs=2 or more"),
        (
            "--step-at 0.6,0.4",
            "step_at: must be increasing shares between 0 and 1, such as 0.4,0.6, received '0.6,0.4'",
        ),
        ("--step-at a", "step_at: must be increasing shares"),
    ],
)
def test_options_that_do_not_apply_are_refused_in_one_line(arguments, said, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(arguments.split(), "")
    err = capsys.readouterr().err
    assert stop.value.code == 2 and said in err and err.count("\n") == 1


def test_imagenet_recipe_is_the_paper_s():
    recipe, _ = parse(["--recipe", "imagenet", "--data-dir", "x"], "")
    steps = recipe.epochs * 1_281_167 / recipe.batch_size
    assert steps == pytest.approx(530_000, rel=2e-3)
    schedule = make_schedule(recipe, steps_per_epoch=5000)  # 530k steps
    rates = [float(schedule(1000 * k)) for k in (0, 199, 201, 399, 401, 499, 501)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 1e-3, 1e-3, 1e-4])


def test_shards_hold_the_same_pictures_in_an_order_of_their_own(root, tmp_path):
    out = tmp_path / "shards"
    shards_tool.main([str(root), str(out), "--per-shard", "10"])
    assert [path.name for path in sorted(out.iterdir())][:3] == ["index.npz", *(
        f"train-0000{i}-of-00004.tfrecord" for i in (0, 1)
    )]  # fmt: skip
    one, two = (datasets.load(name, str(path), size=16) for name, path in (("folder", root), ("shards", out)))
    assert two.classes == CLASSES and [len(part.labels) for part in two[:3]] == [36, 12, 12]
    for a, b in zip(one[:2], two[:2]):
        unordered = [sorted((label, image.tobytes()) for label, image in zip(p.labels, p.images[:])) for p in (a, b)]
        assert unordered[0] == unordered[1]
    assert set(two.train.labels[two.train.images.shard == 0]) == {0, 1, 2}  # each shard is a sample of all classes


def test_a_full_disk_is_one_line_when_writing_shards(root, tmp_path, monkeypatch):
    import tensorflow as tf

    def fail_full(*_):
        raise tf.errors.ResourceExhaustedError(None, None, "/a/shard; No space left on device")

    monkeypatch.setattr(shards_tool, "write_part", fail_full)
    with pytest.raises(InputError, match="out cannot be written: .*No space left on device$"):
        shards_tool.write(str(root), str(tmp_path / "out"))


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_shards_are_written_to_a_folder_whose_name_is_not_utf8(root, tmp_path, capsys):
    out = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    shards_tool.main([str(root), out])
    assert "caf\\udce9" in capsys.readouterr().out
    read = datasets.load("shards", out, size=8)
    assert len(read.train.images) == sum(SIZES.values())


def test_tensorflow_reads_the_shards_too(root, tmp_path):
    tf = pytest.importorskip("tensorflow")
    shards_tool.write(root, tmp_path / "shards", per_shard=100)
    form = {
        "image/encoded": tf.io.FixedLenFeature([], tf.string),
        "image/class/label": tf.io.FixedLenFeature([], "int64"),
    }
    records = tf.data.TFRecordDataset(str(tmp_path / "shards" / "val-00000-of-00001.tfrecord"))
    parsed = [tf.io.parse_single_example(record, form) for record in records]
    labels = datasets.load("shards", str(tmp_path / "shards"), size=16).validation.labels
    assert [int(p["image/class/label"]) for p in parsed] == labels.tolist()
    files = {path.read_bytes() for path in (root / "val").glob("*/*")}
    assert {p["image/encoded"].numpy() for p in parsed} == files


def test_shards_that_cannot_be_used_are_refused_in_one_line(root, tmp_path, capsys):
    out = tmp_path / "shards"
    shards_tool.write(root, out, per_shard=20)
    with pytest.raises(SystemExit) as stop:
        shards_tool.main([str(root), str(out)])
    assert stop.value.code == 2 and f"{out} already exists" in capsys.readouterr().err
    first = out / "train-00000-of-00002.tfrecord"
    first.write_bytes(first.read_bytes()[:-500])
    with pytest.raises(InputError, match="train-00000-of-00002.tfrecord is truncated"):
        shards.read("shards", out)
    first.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        shards.read("shards", out)
    (out / "index.npz").write_bytes(b"PK no index")
    with pytest.raises(InputError, match="is not an index of shards"):
        shards.read("shards", out)


def test_local_order_is_a_permutation_that_reads_few_shards_at_a_time():
    shard = np.repeat(np.arange(7), 10)
    order = shuffle_locally(np.random.default_rng(0), shard, at_once=2)
    assert sorted(order) == list(range(70))
    assert all(len(set(shard[order[start : start + 10]])) <= 4 for start in range(0, 70, 10))
    assert order[:20].tolist() != sorted(order[:20])
    batches = Batches(Examples(Stream.__new__(Stream), np.zeros(70)), 10, seed=None)
    assert batches.order.tolist() == list(range(70))


def test_a_data_set_of_tensorflow_datasets_is_streamed(tmp_path):
    package = pytest.importorskip("tensorflow_datasets")
    rng = np.random.default_rng(0)
    images = [draw_colours(rng, i % 3, 20 + i, 24) for i in range(12)]

    class OwnPictures(package.core.GeneratorBasedBuilder):
        VERSION = package.core.Version("1.0.0")

        def _info(self):
            label = package.features.ClassLabel(names=CLASSES)
            features = package.features.FeaturesDict({"image": package.features.Image(), "label": label})
            return package.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, manager):
            return {"train": self._generate_examples(range(9)), "validation": self._generate_examples(range(9, 12))}

        def _generate_examples(self, chosen):
            for i in chosen:
                yield i, {"image": images[i], "label": i % 3}

    OwnPictures(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    read = datasets.load("tfds:own_pictures", str(tmp_path), size=16)
    assert read.classes == CLASSES and [len(part.labels) for part in read[:3]] == [9, 3, 3]
    brightest = read.train.images[:].mean(axis=(1, 2)).argmax(axis=1)
    np.testing.assert_array_equal(brightest, read.train.labels)
    with pytest.raises(InputError, match="--dataset tfds:no_such_pictures is not available"):
        datasets.load("tfds:no_such_pictures", str(tmp_path), size=16)

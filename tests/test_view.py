"""Figures: masks over images, confusion matrix, curves, PNG files."""

import html as html_text
import io
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from PIL import Image

from Model import attention_56
from Module import AttentionBlock
from tests.support.tiny import tiny_network
from Training.engine.training_model import make_logits_model
from Training.recipe import Recipe
from Training.visual import escaping, inspection, plots


@pytest.mark.backends
def test_mask_model_gives_every_block_s_mask():
    network = tiny_network()
    images = np.random.default_rng(0).normal(size=(3, 32, 32, 3)).astype("float32")
    masks = inspection.make_mask_model(network).predict(images, verbose=0)
    blocks = [layer for layer in network.layers if isinstance(layer, AttentionBlock)]
    assert list(masks) == [block.name for block in blocks]
    inside = keras.Model(network.input, blocks[0].input).predict(images, verbose=0)
    _, expected = blocks[0](keras.ops.convert_to_tensor(inside), training=False, return_mask=True)
    np.testing.assert_allclose(masks[blocks[0].name], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.backends
@pytest.mark.parametrize("learning", ["arl", "nal"])
def test_averaged_masks_are_the_same_at_all_places_or_for_all_images(learning):
    network = tiny_network(learning=learning)
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype="uint8")
    before = network.predict(images, verbose=0)
    block = inspection.find_blocks(network)[0]
    inside = keras.ops.convert_to_tensor(keras.Model(network.input, block.input).predict(images, verbose=0))
    trunk, mask = block.branches(inside)
    for given, axes in ((None, (1, 2)), (images, (0, 1, 2))):
        copy = inspection.average_masks(network, given, batch_size=2)
        expected = keras.ops.mean(mask, axis=axes, keepdims=True)
        expected = (expected + 1 if learning == "arl" else expected) * trunk
        for unit in block.after:
            expected = unit(expected, training=False)
        found = inspection.find_blocks(copy)[0](inside, training=False)
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
        assert np.abs(found - block(inside, training=False)).max() > 1e-3
    np.testing.assert_array_equal(network.predict(images, verbose=0), before)


@pytest.mark.backends
def test_means_are_summed_in_float32():
    """NumPy sums bfloat16 in bfloat16, where 256 + 1 is 256."""
    ones = keras.ops.convert_to_numpy(keras.ops.ones((600, 2), "bfloat16"))
    np.testing.assert_array_equal(inspection._average(ones), [1.0, 1.0])


def test_models_of_a_network_take_images_without_a_warning():
    """In tests, Keras' warning about the structure of inputs is an error."""
    network = tiny_network()
    images = np.zeros((2, 32, 32, 3), "float32")
    for make in (inspection.make_branch_model, inspection.make_mask_model, inspection.make_feature_model,
                 inspection.make_view_model, make_logits_model):  # fmt: skip
        make(network)(images)
    inspection.make_mask_model(network).predict(images, verbose=0)
    inspection.measure_responses(network, images)
    inspection.average_masks(network, images)(images)
    attention_56(include_top=False)(images)


def test_mask_picture_has_images_the_mean_and_the_most_varied_channels_with_their_ranges(monkeypatch):
    images = np.full((2, 8, 8, 3), 200, "uint8")
    mask = np.full((2, 4, 4, 5), 0.5)
    mask[1, 0, 0] = (0.5, 0.9, 0.5, 0.6, 0.7)
    drawn = {}
    annotate = plots._annotate_rows
    monkeypatch.setattr(plots, "_annotate_rows", lambda canvas, rows: annotate(canvas, drawn.update(rows) or rows))
    picture = plots.draw_mask_rows(images, mask)
    side, left = plots.LEAST_SIDE, plots.MARGINS[0]
    assert picture.shape == (5 * (side + 4), 2 * (side + 4) + sum(plots.MARGINS), 3) and picture.dtype == np.uint8
    assert list(drawn) == ["mean", "channel 1", "channel 4", "channel 3"]
    assert (drawn["channel 1"].min(), drawn["channel 1"].max()) == (pytest.approx(0.5), pytest.approx(0.9))
    assert (picture[2 : 2 + side, left + 2 : left + 2 + side] == 200).all()
    mean = picture[side + 6 : 2 * side + 6, left : left + 2 * side + 8].astype(int)
    second = mean[:, side + 6 : 2 * side + 6]
    assert second[0, 0].sum() > second[-1, -1].sum() + 100
    assert (mean[:, 2 : 2 + side] == second[-1, -1]).all()  # the mask of the first image is dark everywhere
    bar = picture[side + 4 + 14 : 2 * (side + 4) - 14, -plots.MARGINS[1] + 18].astype(int).sum(axis=-1)
    assert bar[0] > bar[-1] + 100 and (picture[:, -60:] == 0).any()  # bright is high; the numbers are black


def test_heat_is_upsampled_to_the_image():
    heat = plots.overlay(np.zeros((16, 16, 3), "uint8"), np.array([[0.0, 1.0], [0.0, 1.0]])).sum(axis=-1)
    assert heat.shape == (16, 16)
    assert (np.diff(heat[8].astype(int)) >= 0).all() and len(set(heat[8])) > 6  # smooth, from dark to bright


def test_strongest_channels_have_the_highest_mean():
    mask = np.zeros((3, 3, 5))
    mask[..., 2], mask[..., 4], mask[0, 0, 1] = 0.5, 0.7, 1.0
    assert plots.find_strongest(mask, 3).tolist() == [4, 2, 1]


@pytest.mark.backends
def test_figures_are_pictures():
    network = tiny_network()
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3)).astype("uint8")
    both = inspection.make_branch_model(network).predict(images, verbose=0)
    masks = {name: each["mask"] for name, each in both.items()}
    name = next(iter(both))
    measured = {"one": {"a": 1.0, "b": 2.0}, "two": {"a": 2.0}}
    history = {"loss": [2.0, 1.0], "accuracy": [0.2, 0.5], "val_accuracy": [0.1, 0.4]}
    for picture in (
        plots.draw_masks(images, masks, ("cat", "dog")),
        plots.draw_channels(images[0], both[name]["trunk"][0], both[name]["mask"][0], "arl"),
        plots.draw_responses(measured),
        plots.draw_curves({"one": [history, history], "two": [{"loss": [1.0], "accuracy": [0.3]}]}),
    ):
        assert picture.dtype == np.uint8 and picture.shape[2] == 3 and picture.std() > 10
    assert plots.format_block_title("stage_2_attention_1", (8, 8, 4)) == "stage 2, block 1: 8x8"


@pytest.mark.backends
def test_responses_are_mean_absolute_features():
    network = tiny_network()
    images = np.random.default_rng(0).normal(size=(3, 32, 32, 3)).astype("float32")
    measured = inspection.measure_responses(network, images)
    assert list(measured) == ["stage_1_unit", "stage_1_attention_1", "tail_unit_1"]
    inside = keras.Model(network.input, network.get_layer("stage_1_attention_1").output).predict(images, verbose=0)
    assert measured["stage_1_attention_1"] == pytest.approx(np.abs(inside).mean(), rel=1e-4)


def texts_of(monkeypatch):
    """The texts of each figure, collected before it is drawn."""
    import matplotlib.text

    found, pixels = [], plots._pixels

    def read(figure):
        figure.canvas.draw()
        shown = figure.findobj(matplotlib.text.Text)
        found.append([text.get_text() for text in shown if text.get_visible() and text.get_text()])
        return pixels(figure)

    monkeypatch.setattr(plots, "_pixels", read)
    return found


def test_confusion_picture_has_names_and_counts_for_few_classes_and_numbers_for_many(monkeypatch):
    texts, labels = texts_of(monkeypatch), np.arange(40) % 4
    for classes in (("ant", "bee", "cat", "dog"), [f"class {i}" for i in range(100)], list(map(str, range(1000)))):
        picture = plots.draw_confusion(labels, labels, tuple(classes))
        assert picture.shape[2] == 3 and picture.dtype == np.uint8 and picture.std() > 5
    few, many, most = texts
    assert {"ant", "bee", "cat", "dog", "10"} <= set(few)
    assert {"0", "5", "95"} <= set(many) and "class 5" not in many and "1" not in many[:20]
    assert len(most) < 100 and "950" in most


LONG = ["x" * 43, "y" * 80, "z" * 5000, "翘头剪", "z" * 4999 + "a"]


def test_long_names_and_other_scripts_are_shortened_or_numbered(monkeypatch, recwarn):
    texts = texts_of(monkeypatch)
    images = np.zeros((5, 8, 8, 3), "uint8")
    masks = {"stage_1_attention_1": np.full((5, 4, 4, 2), 0.5)}
    widths = [plots.draw_confusion(range(5), range(5), names).shape for names in (tuple("abcde"), tuple(LONG))]
    plots.draw_masks(images, masks, LONG)
    plots.draw_mistakes(images, range(5), np.eye(5)[::-1], LONG)
    plots.draw_responses({name: {name: 1.0} for name in LONG})
    plots.draw_curves({name: [{"loss": [1.0], "accuracy": [0.5]}] for name in LONG})
    assert widths[0] == widths[1]  # long names do not shrink the axes
    assert "3" in texts[1] and "image 3" in texts[2] and any("class 3" in text for text in texts[3])
    assert all(len(text) < 100 for figure in texts for text in figure)
    assert plots.label_names(["a" * 30 + "b" + "a" * 30, "a" * 30 + "c" + "a" * 30], "") == [
        f"{i}: aaaaaaaaaa…aaaaaaaaaa" for i in range(2)
    ]
    assert [str(each.message) for each in recwarn if "lyph" in str(each.message)] == []


def test_responses_are_on_a_logarithmic_axis_and_masks_have_their_range(monkeypatch):
    texts = texts_of(monkeypatch)
    plots.draw_responses({"ARL": {"a": 1.0, "b": 90.0}, "NAL": {"a": 1.0, "b": 1e-4}})
    assert any("log scale" in text for text in texts[0]) and any("10^{-4}" in text for text in texts[0])
    mask = np.full((2, 4, 4, 2), 0.498)
    mask[1, 0, 0] = 0.501
    plots.draw_masks(np.zeros((2, 8, 8, 3), "uint8"), {"stage_1_attention_1": mask}, ["a", "b"])
    assert {"0.498", "0.501"} <= set(texts[1])


def test_mistakes_are_the_most_confident_first():
    labels = np.array([0, 1, 0, 1])
    probabilities = np.array([[0.9, 0.1], [0.6, 0.4], [0.1, 0.9], [0.2, 0.8]])
    assert plots.find_mistakes(labels, probabilities, 5).tolist() == [2, 1]
    assert plots.find_mistakes(labels, probabilities, 1).tolist() == [2]


def test_sprite_has_thumbnails_row_by_row():
    images = np.stack([np.full((64, 64, 3), 10 * i, "uint8") for i in range(5)])
    sprite = plots.make_sprite(images, 16)
    assert sprite.shape == (48, 48, 3)
    assert [sprite[8 + 16 * (i // 3), 8 + 16 * (i % 3), 0] for i in range(6)] == [0, 10, 20, 30, 40, 255]


def test_precision_and_recall_at_each_threshold():
    from Training.runs.event_file import count_at_thresholds

    labels, probabilities = np.array([True, True, False, False]), np.array([0.9, 0.4, 0.5, 0.1])
    true, false, rejected, missed, precision, recall = count_at_thresholds(labels, probabilities, 3)  # at 0, 0.5, 1
    assert (true.tolist(), false.tolist()) == ([2, 1, 0], [2, 1, 0])
    assert (rejected.tolist(), missed.tolist()) == ([0, 1, 2], [0, 1, 2])
    assert (precision.tolist(), recall.tolist()) == ([0.5, 0.5, 0], [1, 0.5, 0])


TERMINAL = "\x1b[2J\x1b]0;owned\x07"


def test_text_from_outside_is_escaped_for_each_format():
    name = f"a|b\n# c<script>alert(1)</script>`*[x](y)\\{TERMINAL}\u202e"
    console, markdown = escaping.escape_console(name), escaping.escape_markdown(name)
    assert console.isprintable() and r"\x1b[2J" in console and r"\n" in console
    assert markdown.isprintable() and not set("|<>`*[]\\") & set(markdown) and "&lt;script&gt;" in markdown
    for text in ("=cmd|' /C calc'!A0", "+1+cmd", "-2+3+cmd", "@SUM(A1)", "\t=1+1", "  =1", "＝1+1"):
        assert escaping.escape_csv(text).startswith(("'", "\\t")), text
    for text in ("-0.5", "1e-3", "-", "", "cat", "a=b", "5.52 ± 0.10", 0.25):
        assert escaping.escape_csv(text) == str(text)
    assert escaping.escape_csv("a\nb") == r"a\nb" and escaping.escape_figure("$x$") == r"\$x\$"
    assert escaping.escape_figure("翘") == r"\u7fd8"


def test_tensorboard_shows_escaped_names_as_they_are():
    from tensorboard.plugin_util import markdown_to_safe_html

    name = "a|b <img src=x onerror=alert(1)> `*_[x](http://y)\\"
    html = markdown_to_safe_html(escaping.make_markdown_table(["field", "value"], [["model", name], ["seed", 0]]))
    assert html.count("<tr>") == 3 and html.count("<td>") == 4
    assert "<img" not in html and "<a" not in html
    assert html_text.unescape(html.split("<td>")[2].split("</td>")[0]) == name


@pytest.mark.backends
def test_augmented_pixels_beyond_white_stay_white(tmp_path):
    from Training.engine.augmentation import RandomLighting
    from Training.engine.event_callbacks import Pictures

    shown = Pictures(None, tiny_network(), np.full((8, 32, 32, 3), 254, "uint8"), Recipe(masks_every=0), False)
    shown.set_model(keras.Sequential([keras.Input((32, 32, 3)), RandomLighting(seed=1)]))
    assert shown._augment().min() > 150  # and not 0, where 8 bits wrap around


@pytest.mark.backends
@pytest.mark.parametrize("until", [0.0, 0.2, 1.0])
def test_the_picture_of_augmented_images_shows_mixing_that_ends_early(until):
    """A copy of the layer must know after how many steps mixing ends."""
    from Training.engine.augmentation import Mix
    from Training.engine.event_callbacks import Pictures

    images = np.stack([np.full((8, 8, 3), 30 * i, "uint8") for i in range(8)])
    shown = Pictures(None, None, images, Recipe(masks_every=0), False)
    mix = Mix("mixup", 0, until)
    mix.set_last(10, 1)
    shown.set_model(SimpleNamespace(layers=[mix]))
    originals, changed = np.split(shown._augment(), 2)
    assert np.array_equal(originals, changed) == (until == 0)


@pytest.mark.parametrize("name", ["a$^$.png", "$_$", r"\$_$ \$", "caf\udce9", "two\nlines"])
def test_any_name_can_be_drawn(name):
    image = np.zeros((1, 8, 8, 3), "uint8")
    plots.draw_masks(image, {}, [name])
    plots.draw_confusion([0, 1], [0, 1], (name, "b"))
    plots.draw_responses({name: {"a": 1.0}})
    plots.draw_curves({name: [{"loss": [1.0], "accuracy": [0.5]}]})


@pytest.mark.parametrize("name", ["W" * 24, "g" * 60, "stage " * 3])
@pytest.mark.parametrize("count", [1, 3])
def test_titles_of_masks_are_inside_the_figure(name, count):
    """The outermost pixels of the margins stay white; a long title ends within its column."""
    image, mask = np.zeros((count, 8, 8, 3), "uint8"), np.random.default_rng(0).random((count, 4, 4, 2))
    picture = plots.draw_masks(image, {"a_very_long_name_of_a_block_" * 3: mask, "stage_1": mask}, [name] * count)
    assert (picture[:2] == 255).all() and (picture[:, :2] == 255).all() and (picture[:, -2:] == 255).all()
    between = picture[: picture.shape[0] // (3 * count), picture.shape[1] // 3 - 2 : picture.shape[1] // 3 + 2]
    assert (between[:8] == 255).all()


def test_figures_do_not_depend_on_the_user_s_style():
    """Such as one that sets text with LaTeX, which would end a run at its last figure."""
    import matplotlib

    curves = {"a": [{"loss": [1.0, 0.5], "accuracy": [0.5, 0.7]}]}
    expected = plots.draw_curves(curves), plots.draw_confusion([0, 1], [0, 1], ("a", "b"))
    with matplotlib.rc_context({"text.usetex": True, "font.size": 30, "axes.grid": True, "figure.dpi": 20}):
        again = plots.draw_curves(curves), plots.draw_confusion([0, 1], [0, 1], ("a", "b"))
    for one, other in zip(expected, again):
        np.testing.assert_array_equal(one, other)


def test_responses_of_networks_with_different_rows_are_one_figure():
    networks = [["unit", "block", "tail_1", "tail_2"], ["unit", "block", "closing"], ["first", "unit", "tail_2"]]
    names = plots._merge_names(networks)
    assert sorted(names) == sorted({name for each in networks for name in each})
    assert all(sorted(each, key=names.index) == each for each in networks)
    plots.draw_responses({str(i): dict.fromkeys(each, 1.0) for i, each in enumerate(networks)})


def test_png_is_lossless():
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype("uint8")
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(plots.encode_png(picture)))), picture)


@pytest.mark.backends
def test_graph_has_the_branches_and_prints_nothing(capsys):
    from Training.runs.event_file import _graph

    keras.config.set_dtype_policy("mixed_bfloat16")
    nodes = {node.name: list(node.input) for node in _graph(tiny_network()).node}
    assert nodes["stage_1/attention_1/multiply"] == ["stage_1/attention_1/trunk", "stage_1/attention_1/mask"]
    assert nodes["tail/unit_1"] == ["stage_1/attention_1/after"]
    assert nodes["classifier/logits"] == ["classifier/dropout"]
    assert {name.split("/")[0] for name in nodes} == {"images", "stem", "stage_1", "tail", "classifier"}
    assert capsys.readouterr().out == ""

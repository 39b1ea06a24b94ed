"""Pictures: masks over images, the confusion matrix, PNG."""

import io

import keras
import numpy as np
import pytest
from PIL import Image

from Module import AttentionBlock
from tests.support.tiny import tiny_network
from Training.visual import inspection, plots

pytestmark = pytest.mark.backends


def test_mask_model_gives_every_block_s_mask():
    network = tiny_network()
    images = np.random.default_rng(0).normal(size=(3, 32, 32, 3)).astype("float32")
    masks = inspection.make_mask_model(network).predict(images, verbose=0)
    blocks = [layer for layer in network.layers if isinstance(layer, AttentionBlock)]
    assert list(masks) == [block.name for block in blocks]
    inside = keras.Model(network.inputs, blocks[0].input).predict(images, verbose=0)
    _, expected = blocks[0](keras.ops.convert_to_tensor(inside), training=False, return_mask=True)
    np.testing.assert_allclose(masks[blocks[0].name], expected, rtol=1e-4, atol=1e-5)


def test_mask_picture_has_images_above_heat_from_dark_to_bright():
    images = np.full((2, 8, 8, 3), 200, "uint8")
    mask = np.full((2, 4, 4, 5), 0.5)
    mask[1, 0, 0] = 0.51
    picture = plots.draw_mask_rows(images, mask)
    side = 8 * plots.ENLARGED
    assert picture.shape == (2 * (side + 4), 2 * (side + 4), 3) and picture.dtype == np.uint8
    assert (picture[2 : 2 + side, 2 : 2 + side] == 200).all()
    below = picture[side + 6 : -2, side + 6 : -2].astype(int)  # the second image's heat
    assert below[0, 0].sum() > below[-1, -1].sum() + 100
    assert (picture[side + 6 : -2, 2 : 2 + side] == below[-1, -1]).all()  # the first one's is dark everywhere


def test_heat_is_upsampled_to_the_image():
    heat = plots.overlay(np.zeros((16, 16, 3), "uint8"), np.array([[0.0, 1.0], [0.0, 1.0]])).sum(axis=-1)
    assert heat.shape == (16, 16)
    assert (np.diff(heat[8].astype(int)) >= 0).all() and len(set(heat[8])) > 6  # smooth, from dark to bright


def test_strongest_channels_have_the_highest_mean():
    mask = np.zeros((3, 3, 5))
    mask[..., 2], mask[..., 4], mask[0, 0, 1] = 0.5, 0.7, 1.0
    assert plots.find_strongest(mask, 3).tolist() == [4, 2, 1]


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


def test_responses_are_mean_absolute_features():
    network = tiny_network()
    images = np.random.default_rng(0).normal(size=(3, 32, 32, 3)).astype("float32")
    measured = inspection.measure_responses(network, images)
    assert list(measured) == ["stage_1_unit", "stage_1_attention_1", "tail_unit_1"]
    inside = keras.Model(network.inputs, network.get_layer("stage_1_attention_1").output).predict(images, verbose=0)
    assert measured["stage_1_attention_1"] == pytest.approx(np.abs(inside).mean(), rel=1e-4)


def test_confusion_picture_of_few_and_many_classes():
    labels = np.arange(40) % 4
    for classes in ("abcd", [str(i) for i in range(100)]):
        picture = plots.draw_confusion(labels, labels, tuple(classes))
        assert picture.shape[2] == 3 and picture.dtype == np.uint8 and picture.std() > 10


def test_augmented_pixels_beyond_white_stay_white(tmp_path):
    from Training.engine.augmentation import RandomLighting
    from Training.engine.event_callbacks import Pictures

    shown = Pictures(tmp_path, tiny_network(), np.full((8, 32, 32, 3), 254, "uint8"), None, False)
    shown.set_model(keras.Sequential([keras.Input((32, 32, 3)), RandomLighting(seed=1)]))
    assert shown._augmented().min() > 150  # and not 0, where 8 bits wrap around


@pytest.mark.parametrize("name", ["a$^$.png", "$_$", r"\$_$ \$", "caf\udce9", "two\nlines"])
def test_any_name_is_drawn(name):
    image = np.zeros((1, 8, 8, 3), "uint8")
    plots.draw_masks(image, {}, [name])
    plots.draw_confusion([0, 1], [0, 1], (name, "b"))
    plots.draw_responses({name: {"a": 1.0}})
    plots.draw_curves({name: [{"loss": [1.0], "accuracy": [0.5]}]})


def test_responses_of_networks_with_different_rows_are_one_figure():
    networks = [["unit", "block", "tail_1", "tail_2"], ["unit", "block", "closing"], ["first", "unit", "tail_2"]]
    names = plots._merge_names(networks)
    assert sorted(names) == sorted({name for each in networks for name in each})
    assert all(sorted(each, key=names.index) == each for each in networks)
    plots.draw_responses({str(i): dict.fromkeys(each, 1.0) for i, each in enumerate(networks)})


def test_png_is_lossless():
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype("uint8")
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(plots.encode_png(picture)))), picture)


def test_graph_has_the_branches_and_says_nothing(capsys):
    from Training.runs.event_file import _graph

    keras.config.set_dtype_policy("mixed_bfloat16")
    nodes = {node.name: list(node.input) for node in _graph(tiny_network()).node}
    assert nodes["stage_1_attention_1/multiply"] == ["stage_1_attention_1/trunk", "stage_1_attention_1/mask"]
    assert nodes["tail_unit_1"] == ["stage_1_attention_1/after"]
    assert capsys.readouterr().out == ""

"""Pictures: masks over images, the confusion matrix, PNG."""

import io

import keras
import numpy as np
import pytest
from PIL import Image
from tiny import tiny_network

from Module import AttentionBlock
from Training import view

pytestmark = pytest.mark.backends


def test_mask_model_gives_every_block_s_mask():
    network = tiny_network()
    images = np.random.default_rng(0).normal(size=(3, 32, 32, 3)).astype("float32")
    masks = view.mask_model(network).predict(images, verbose=0)
    blocks = [layer for layer in network.layers if isinstance(layer, AttentionBlock)]
    assert list(masks) == [block.name for block in blocks]
    inside = keras.Model(network.inputs, blocks[0].input).predict(images, verbose=0)
    _, expected = blocks[0](keras.ops.convert_to_tensor(inside), training=False, return_mask=True)
    np.testing.assert_allclose(masks[blocks[0].name], expected, rtol=1e-4, atol=1e-5)


def test_mask_picture_has_images_above_heat_from_dark_to_bright():
    images = np.full((2, 8, 8, 3), 200, "uint8")
    mask = np.full((2, 4, 4, 5), 0.5)
    mask[1, 0, 0] = 0.51
    picture = view.mask_picture(images, mask)
    assert picture.shape == (2 * 12, 2 * 12, 3) and picture.dtype == np.uint8
    assert (picture[2:10, 2:10] == 200).all()
    bright, dark = picture[12 + 2, 12 + 2].astype(int), picture[-3, -3].astype(int)
    assert (picture[14:16, 14:16] == picture[14, 14]).all()
    assert bright.sum() > dark.sum() + 100


def test_confusion_picture_of_few_and_many_classes():
    labels = np.arange(40) % 4
    for classes in ("abcd", [str(i) for i in range(100)]):
        picture = view.confusion_picture(labels, labels, tuple(classes))
        assert picture.shape[2] == 3 and picture.dtype == np.uint8 and picture.std() > 10


def test_png_is_lossless():
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype("uint8")
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(view.png(picture)))), picture)

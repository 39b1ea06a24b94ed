"""What Keras reads batches from (Training/engine/feeding.py)."""

import keras
import numpy as np
import pytest

from Training.data.batches import Batches
from Training.data.datasets import Examples
from Training.engine.feeding import feed

on_tensorflow = pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="tf.data is TensorFlow's")


def make_batches(count=10, size=4, **changes):
    images = np.arange(count * 12, dtype="uint8").reshape(count, 2, 2, 3)
    return Batches(Examples(images, np.arange(count, dtype="int32")), size, **changes)


@on_tensorflow
@pytest.mark.parametrize("seed", [None, 7])
def test_each_epoch_has_the_batches_in_their_order(seed):
    batches = make_batches(seed=seed)
    dataset = feed(batches)
    for epoch in range(2):
        batches.set_epoch(epoch)
        read = list(dataset.as_numpy_iterator())
        assert len(read) == len(batches) == dataset.cardinality() == (3 if seed is None else 2)
        for (images, labels), index in zip(read, range(len(batches)), strict=True):
            np.testing.assert_array_equal(images, batches[index][0])
            np.testing.assert_array_equal(labels, batches[index][1])


@on_tensorflow
def test_an_epoch_can_start_at_a_later_step():
    batches = make_batches(seed=1)
    whole = [labels.tolist() for _, labels in feed(batches).as_numpy_iterator()]
    batches.set_epoch(0, first_step=1)
    assert [labels.tolist() for _, labels in feed(batches).as_numpy_iterator()] == whole[1:]


@on_tensorflow
def test_nothing_is_tuned_whose_thread_would_delay_the_end_of_an_epoch():
    assert feed(make_batches()).options().autotune.enabled is False


@pytest.mark.skipif(keras.backend.backend() == "tensorflow", reason="other backends read the batches themselves")
def test_other_backends_get_the_batches_themselves():
    batches = make_batches()
    assert feed(batches) is batches

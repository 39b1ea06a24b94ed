import gc
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import pytest


def pytest_collection_finish():
    """What the imports left is not looked through again: 0.2 s of each of 600 tests went into that."""
    gc.freeze()


@pytest.fixture(autouse=True)
def fresh_keras():
    """Each test starts from the same seed and dtype policy, with no layers of the one before.

    The policy is set back at the end: a module's own fixtures are made before this one's next turn.
    """
    keras.utils.clear_session()
    keras.utils.set_random_seed(1)
    yield
    keras.config.set_dtype_policy("float32")

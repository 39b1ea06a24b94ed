import collections
import gc
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# Here, and in the processes that tests start, XLA takes longer to optimize a function than the function takes to run.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")

import pytest

# The files that take longest start first. One that starts late leaves the other processor without work at the end.
SLOW = (
    "test_resume.py",
    "test_training.py",
    "test_distribute.py",
    "test_fit.py",
    "test_layers.py",
    "test_notebooks.py",
    "test_family.py",
    "test_folder.py",
    "test_export.py",
    "test_fine_tuning.py",
    "test_predict.py",
)


def pytest_collection_modifyitems(items):
    """Order the files; `make test` passes xdist the option that keeps this order."""
    rank = {name: i for i, name in enumerate(SLOW)}
    tests = collections.Counter(item.path for item in items)
    items.sort(key=lambda item: (rank.get(item.path.name, len(SLOW)), -tests[item.path], item.path))


def pytest_collection_finish():
    """What the imports left is not looked through again: 0.2 s of each of 600 tests went into that."""
    gc.freeze()


@pytest.fixture(autouse=True)
def fresh_keras():
    """Each test starts from the same seed and dtype policy, with no layers of the one before.

    The policy is set back at the end: a module's own fixtures are made before this one's next turn.
    Keras is imported here: the process that only starts xdist's workers does not need it.
    """
    import keras

    keras.utils.clear_session(free_memory=False)  # collecting garbage takes longer than most tests
    keras.utils.set_random_seed(1)
    yield
    keras.config.set_dtype_policy("float32")

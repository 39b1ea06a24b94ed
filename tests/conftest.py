import collections
import gc
import os
import tempfile

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# NumPy's threads wait for each other in loops, which takes ten times as long if another worker needs the cores.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# In tests and the processes that they start, XLA takes longer to optimize a function than the function takes to run.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false",
)

# Tests train the same few networks again and again: JAX compiles each once for all tests, workers and processes.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    cache = tempfile.TemporaryDirectory(prefix="jax-cache-", ignore_cleanup_errors=True)  # the workers inherit it
    os.environ["JAX_COMPILATION_CACHE_DIR"] = cache.name
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import pytest

# The slowest files start first, so that no worker is left alone with one of them at the end.
SLOW = (
    "test_resume.py",
    "test_distribute.py",
    "test_notebooks.py",
    "test_training.py",
    "test_fit.py",
    "test_layers.py",
    "test_family.py",
    "test_weights.py",
    "test_layers_as_keras.py",
    "test_fine_tuning.py",
    "test_options.py",
    "test_console.py",
    "test_export.py",
)


def pytest_configure():
    """Let the processes of tests receive signals also if pytest runs under nohup or in the background of a shell."""
    from benchmarks import kill

    kill.stop_ignoring_signals()


def pytest_collection_modifyitems(items):
    """Order the files; `make test` passes xdist the option that keeps this order."""
    rank = {name: i for i, name in enumerate(SLOW)}
    tests = collections.Counter(item.path for item in items)
    items.sort(key=lambda item: (rank.get(item.path.name, len(SLOW)), -tests[item.path], item.path))


def pytest_collection_finish():
    """Collect garbage rarely, and exempt the imported modules: it took about a tenth of the time."""
    gc.freeze()
    gc.set_threshold(100_000, 50, 10)


@pytest.fixture(autouse=True)
def fresh_keras():
    """Start each test with the same seed and dtype policy, and without the layers of the test before.

    The policy is reset at the end, since module fixtures are created before this one runs again. Keras is imported
    here, since the process that starts xdist's workers does not need it.
    """
    import keras

    keras.utils.clear_session(free_memory=False)  # collecting garbage takes longer than most tests
    keras.utils.set_random_seed(1)
    yield
    keras.config.set_dtype_policy("float32")

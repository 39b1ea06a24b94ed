"""Several devices and several processes: results equal to those of one device, errors, and lost processes."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import distribute, kill
from tests.support import forks, small, tiny
from Training.data import datasets
from Training.data.batches import Batches, find_even_batch
from Training.devices import Devices, drop_unsupported, refuse_mode
from Training.errors import InputError
from Training.recipe import Recipe

ROOT = Path(__file__).parent.parent

# Compilation and the ends of epochs take most of the time: a minimal network, fewer epochs than in the benchmark.
SMALL = "import training_cifar10; from tests.support.small import build\n"
ARGUMENTS = [
    *distribute.ARGUMENTS,
    "--epochs=8",
    "--masks-every=0",
    "--validation-split=0.02",
]


# Every layer that draws random numbers draws the same ones for each image on two replicas and on one device.
SAME_DRAWS = """
import keras, numpy as np, tensorflow as tf
from Training.engine import augmentation
images = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3)).astype("float32")
strategy = tf.distribute.MirroredStrategy()
halves = strategy.experimental_distribute_values_from_function(
    lambda context: tf.constant(np.split(images, 2)[context.replica_id_in_sync_group]))
for kind, arguments in {"RandomLighting": {}, "RandomCrop": {}, "RandomAffine": {}, "Cutout": {"size": 4}}.items():
    one = getattr(augmentation, kind)(seed=1, **arguments)(images, training=True)
    with strategy.scope():
        layer = getattr(augmentation, kind)(seed=1, **arguments)
    two = strategy.experimental_local_results(strategy.run(lambda part: layer(part, training=True), [halves]))
    np.testing.assert_allclose(np.concatenate(two), one, rtol=1e-5, atol=1e-3, err_msg=kind)
"""


def make_script(mode, logs, *changes):
    """Return a script that trains on one device, then on two."""
    runs = ((f"{logs}/one", "none"), (f"{logs}/two", mode))
    arguments = [*ARGUMENTS, "--checkpoint-epochs=20", *changes]
    return SMALL + "".join(
        f"training_cifar10.main({[*arguments, f'--logs={place}', f'--distribute={each}']}, build)\n"
        for place, each in runs
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Environment variables with which JAX keeps compiled code for all tests of the module."""
    folder = tmp_path_factory.mktemp("cache")
    return {"JAX_COMPILATION_CACHE_DIR": str(folder), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


@pytest.fixture(scope="module")
def jax_logs(tmp_path_factory, cache):
    """Logs of a run on one device and of one on two."""
    logs = tmp_path_factory.mktemp("jax")
    kill.finish(distribute.start("jax", script=make_script("data", logs), JAX_NUM_CPU_DEVICES="2", **cache))
    return logs


def test_two_devices_on_jax_give_the_result_of_one(jax_logs):
    assert len(distribute.read_losses(jax_logs / "one")) == 16
    assert distribute.find_largest_difference(jax_logs / "one", jax_logs / "two") < distribute.TOLERANCE


def test_two_replicas_on_tensorflow_give_the_result_of_one(tmp_path):
    script = make_script("mirrored", tmp_path, "--epochs=4")  # the end of an epoch takes long on two replicas
    kill.finish(forks.start(script=distribute.TWO + SAME_DRAWS + script))
    assert len(distribute.read_losses(tmp_path / "one")) == 8
    assert distribute.find_largest_difference(tmp_path / "one", tmp_path / "two") < distribute.TOLERANCE


def test_a_killed_process_ends_the_other_and_the_run_resumes_to_the_same_end(jax_logs, cache, tmp_path):
    logs = tmp_path / "Logs"
    run = distribute.start_processes(*ARGUMENTS, f"--logs={logs}", script=small.MAIN, **cache)
    codes, said, waited = distribute.end_one(run, which=1, after="epoch 3 of 8 ")
    assert codes[0] not in (0, None) and waited < 60
    assert "a step of the 2 processes failed, as it does if one of them is lost" in said[0]
    for each in distribute.resume_processes(kill.find_run(logs), script=small.MAIN, **cache):
        kill.finish(each)
    assert distribute.find_largest_difference(jax_logs / "one", logs) < distribute.TOLERANCE
    names = {path.name for path in kill.find_run(logs).iterdir()}
    assert {"result.json", "last.keras", "best.keras", "train", "validation"} <= names
    environment = json.loads((kill.find_run(logs) / "environment.json").read_text())
    assert (environment["devices"], environment["processes"]) == (2, 2)


def test_batches_are_shared_without_gap_or_overlap():
    examples = datasets.load("digits", samples=50).train
    whole = Batches(examples, 12, seed=3)
    parts = [Batches(examples, 12, seed=3, devices=Devices(4, 2, process)) for process in range(2)]
    for step in range(len(whole)):
        images = np.concatenate([part[step][0] for part in parts])
        np.testing.assert_array_equal(images, whole[step][0])


@pytest.mark.parametrize("devices", [1, 2, 7, 64])
def test_padding_of_the_last_batch_has_no_weight(devices):
    """Means over batches, as computed by Keras, are the means over the examples."""
    examples = datasets.load("digits", samples=50).train
    batches = Batches(examples, find_even_batch(50, devices=devices), devices=Devices(devices))
    values, counts = [], []
    for images, labels, *weights in (batches[i] for i in range(len(batches))):
        assert len(images) % devices == 0 and len(images) <= max(256, devices)
        values.append(np.mean(labels * weights[0]) if weights else np.mean(labels))
        counts.append(len(labels))
    assert np.average(values, weights=counts) == pytest.approx(examples.labels.mean(), rel=1e-6)


@pytest.mark.backends
def test_weights_of_images_count_in_loss_and_accuracy():
    from Training.engine.fit import compile_model

    recipe = Recipe(dataset="digits", batch_size=10, classifier_l2=0.0)
    examples = datasets.load("digits", samples=45).train
    model = compile_model(tiny.tiny_network(classifier_l2=0.0), recipe, 4)
    plain = model.evaluate(examples.images, examples.labels, batch_size=15, verbose=0)
    filled = Batches(examples, 16, devices=Devices(8))
    assert len(filled[len(filled) - 1]) == 3
    np.testing.assert_allclose(model.evaluate(filled, verbose=0), plain, rtol=1e-4)


def test_options_that_mirrored_does_not_support_are_dropped_and_reported():
    said = []
    recipe = Recipe(distribute="mirrored", jit=True, steps_per_execution=4)
    assert drop_unsupported(recipe, said.append) == Recipe(distribute="mirrored")
    assert said == ["--distribute mirrored runs without --jit and --steps-per-execution"]
    for recipe in (Recipe(distribute="mirrored"), Recipe(distribute="data", jit=True), Recipe(jit=True)):
        assert drop_unsupported(recipe, said.append) == recipe
    assert len(said) == 1


def test_modes_name_the_backend_that_they_need(monkeypatch):
    for mode, backend in (("mirrored", "jax"), ("data", "tensorflow")):
        with pytest.raises(InputError, match=f"--distribute {mode} needs KERAS_BACKEND="):
            refuse_mode(mode, backend)
    monkeypatch.setenv("TF_CONFIG", "{}")
    with pytest.raises(InputError, match="use KERAS_BACKEND=jax and --distribute data"):
        refuse_mode("mirrored", "tensorflow")
    monkeypatch.setenv("KERAS_DISTRIBUTION_JOB_ADDRESSES", "127.0.0.1:1")
    with pytest.raises(InputError, match="needs --distribute data, received --distribute none"):
        refuse_mode("none", "jax")

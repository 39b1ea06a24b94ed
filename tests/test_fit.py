"""Schedules, optimizers and the training model."""

import dataclasses
import gc
import itertools
import time
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from keras import ops

from Model.preprocessing import mean_subtraction
from tests.support.backend import JIT
from tests.support.plain import build as plain_build
from tests.support.plain import plain_network
from tests.support.tiny import tiny_build, tiny_network
from Training.console import format_duration
from Training.data import datasets
from Training.data.batches import Batches
from Training.devices import ONE
from Training.engine.callbacks import EpochMeter
from Training.engine.checkpointing import Checkpoints
from Training.engine.evaluation import evaluate, summarize
from Training.engine.fit import compile_model, fit, make_batches
from Training.engine.optimizers import SGD, add_l2, make_optimizer, make_schedule
from Training.engine.training_model import ImagesOnDevice, TrainingModel, make_training_model
from Training.errors import InputError, RunError
from Training.recipe import RECIPES, Recipe
from Training.runs.history import read_history

QUICK = Recipe(
    dataset="digits", samples=64, epochs=2, batch_size=16, warmup_epochs=1.0, masks_every=0, augmentation="none"
)


def get_rate(schedule, step):
    return float(schedule(step)) if callable(schedule) else schedule


def test_paper_schedule_divides_by_ten_at_64k_and_96k():
    schedule = make_schedule(Recipe(**{**RECIPES["paper"], "epochs": 160}), 1000)
    rates = [get_rate(schedule, step) for step in (0, 63_999, 64_001, 95_999, 96_001, 159_999)]
    np.testing.assert_allclose(rates, [0.1, 0.1, 0.01, 0.01, 0.001, 0.001], rtol=1e-5)


def test_cosine_warms_up_and_ends_at_zero():
    schedule = make_schedule(Recipe(epochs=10, warmup_epochs=2.0, learning_rate=0.4), 100)
    rates = [get_rate(schedule, step) for step in (0, 100, 200, 600, 1000)]
    np.testing.assert_allclose(rates, [0, 0.2, 0.4, 0.2, 0], atol=1e-6)
    without = make_schedule(Recipe(epochs=10, warmup_epochs=0.0), 100)
    assert get_rate(without, 0) == pytest.approx(0.1)
    assert make_schedule(Recipe(schedule="constant", warmup_epochs=0.0), 100) == 0.1


def test_linear_rises_and_falls_to_zero():
    schedule = make_schedule(Recipe(schedule="linear", epochs=10, warmup_epochs=2.0, learning_rate=0.4), 100)
    rates = [get_rate(schedule, step) for step in (0, 100, 200, 600, 1000)]
    np.testing.assert_allclose(rates, [0, 0.2, 0.4, 0.2, 0], atol=1e-6)
    again = type(schedule).from_config(schedule.get_config())
    assert get_rate(again, 600) == get_rate(schedule, 600)


@pytest.mark.backends
@pytest.mark.parametrize("name", ["sgd", "adam", "rmsprop"])
def test_l2_is_the_gradient_of_the_penalty(name):
    """Adding `decay * weight` to the gradient equals Keras' regularizer `decay / 2 * sum(weight ** 2)`."""
    kind = {"sgd": keras.optimizers.SGD, "adam": keras.optimizers.Adam, "rmsprop": keras.optimizers.RMSprop}[name]
    extra = {"momentum": 0.9, "nesterov": True} if name == "sgd" else {}
    models = []
    for ours in (True, False):
        regularizer = None if ours else keras.regularizers.L2(0.05)
        dense = keras.layers.Dense(3, kernel_initializer=keras.initializers.GlorotUniform(0), name="dense")
        dense.kernel_regularizer = dense.bias_regularizer = regularizer
        model = keras.Sequential([keras.Input((4,)), dense])
        made = add_l2(kind)(0.1, l2=0.1, **extra) if ours else kind(0.1, **extra)
        model.compile(made, "mse", jit_compile=JIT)
        models.append(model)
    generator = np.random.default_rng(0)
    for _ in range(4):
        x, y = generator.normal(size=(8, 4)).astype("float32"), generator.normal(size=(8, 3)).astype("float32")
        for model in models:
            model.train_on_batch(x, y)
    for a, b in zip(*(model.get_weights() for model in models)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.backends
@pytest.mark.parametrize("nesterov, jit", [(True, False), (True, True), (False, False)])
def test_momentum_equals_keras_momentum(nesterov, jit):
    x, y = np.random.default_rng(0).normal(size=(2, 8, 4)).astype("float32")
    weights = []
    for kind in (SGD, keras.optimizers.SGD):
        dense = keras.layers.Dense(4, kernel_initializer=keras.initializers.GlorotUniform(0))
        model = keras.Sequential([keras.Input((4,)), dense])
        model.compile(add_l2(kind)(0.1, momentum=0.9, nesterov=nesterov, l2=0.1), "mse", jit_compile=jit)
        for _ in range(3):
            model.train_on_batch(x, y)
        weights.append([*model.get_weights(), *map(ops.convert_to_numpy, model.optimizer.variables)])
    for ours, theirs in zip(*weights, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)


class LiveObjects(keras.callbacks.Callback):
    """Counts the objects of the garbage collector at the end of each epoch, which other processes cannot affect."""

    def __init__(self):
        super().__init__()
        self.counts = []

    def on_epoch_end(self, epoch, logs=None):
        gc.collect()
        self.counts.append(len(gc.get_objects()))


def test_nothing_is_traced_again_and_nothing_grows(tmp_path, monkeypatch):
    traced, living = [], LiveObjects()
    loss = TrainingModel.compute_loss
    monkeypatch.setattr(TrainingModel, "compute_loss", lambda *a, **k: traced.append(1) or loss(*a, **k))
    recipe = dataclasses.replace(QUICK, epochs=6, validation_split=0.0, warmup_epochs=0.0)
    digits = datasets.load("digits", samples=32, validation_split=0.0)
    fit(plain_build(recipe, digits), digits, recipe, tmp_path, lambda resumed: [living])
    assert len(traced) == 1
    assert living.counts[-1] - living.counts[2] < 50


def test_steps_equal_keras_steps_within_rounding():
    """Compare the graph of a known batch size, without the graph optimizer, with the functions that it replaces."""

    def train_losses(own):
        keras.utils.set_random_seed(0)
        recipe = Recipe(batch_size=16, learning_rate=0.002, schedule="constant", warmup_epochs=0.0)
        model = compile_model(plain_network(), recipe, 20)
        if own:
            keras.Model.make_train_function(model)
        draw = np.random.default_rng(0)
        images = draw.integers(0, 256, (320, 32, 32, 3), dtype="uint8")
        batches, seen = Batches(datasets.Examples(images, draw.integers(0, 10, 320)), 16, seed=0), []
        watch = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: seen.append(logs["loss"]))
        model.fit(batches, shuffle=False, verbose=0, callbacks=[watch])
        return seen

    ours = train_losses(own=False)
    assert len(ours) == 20
    np.testing.assert_allclose(ours, train_losses(own=True), rtol=1e-5)


def test_other_batch_sizes_are_refused_and_other_functions_keep_the_graph_optimizer():
    import tensorflow as tf

    model = compile_model(plain_network(), dataclasses.replace(QUICK, batch_size=8), 10)
    images, labels = np.zeros((10, 32, 32, 3), "uint8"), np.zeros(10, "int32")
    assert np.isfinite(model.train_on_batch(images, labels)[0]), "outside fit, any batch size works"
    with pytest.raises((ValueError, tf.errors.InvalidArgumentError)):
        model.fit(Batches(datasets.Examples(images, labels), 5, seed=0), shuffle=False, verbose=0)
    assert not tf.config.optimizer.get_experimental_options().get("disable_meta_optimizer")


@pytest.mark.parametrize("precision", ["float32", "mixed_bfloat16"])
def test_float32_steps_on_a_cpu_skip_the_graph_optimizer(precision, monkeypatch):
    import tensorflow as tf

    seen, step = [], TrainingModel.train_step
    switch = tf.config.optimizer.get_experimental_options
    monkeypatch.setattr(TrainingModel, "train_step", lambda *a: seen.append(switch()) or step(*a))
    keras.config.set_dtype_policy(precision)
    model = compile_model(plain_network(), dataclasses.replace(QUICK, batch_size=8), 10)
    examples = datasets.Examples(np.zeros((8, 32, 32, 3), "uint8"), np.zeros(8, "int32"))
    model.fit(Batches(examples, 8, seed=0), shuffle=False, verbose=0)
    left_out = precision == "float32" and not tf.config.list_physical_devices("GPU")
    assert [options.get("disable_meta_optimizer", False) for options in seen] == [left_out]


@pytest.mark.backends
def test_norms_and_biases_are_not_decayed_on_request():
    for kind in ("l2", "decoupled"):
        recipe = dataclasses.replace(
            QUICK, decay_all=False, weight_decay=0.5, weight_decay_kind=kind, schedule="constant", warmup_epochs=0.0
        )
        made = make_optimizer(recipe, 4)
        names = ("kernel", "gamma", "beta", "bias")
        variables = [keras.Variable(np.ones(2, "float32"), name=name) for name in names]
        made.build(variables)
        made.apply([ops.zeros(2)] * 4)
        decayed = [float(ops.convert_to_numpy(v)[0]) < 1 for v in variables]
        assert decayed == [True, False, False, False]


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "rmsprop"])
def test_optimizers_by_name(name):
    recipe = dataclasses.replace(QUICK, optimizer=name, weight_decay_kind="decoupled", weight_decay=0.01)
    made = make_optimizer(recipe, 4)
    assert type(made).__name__.lower() == name and made.weight_decay == 0.01
    if name == "sgd":
        assert made.nesterov and made.momentum == 0.9


@pytest.mark.backends
def test_mean_subtraction_is_part_of_the_model(tmp_path):
    mean = np.random.default_rng(0).uniform(0, 255, (8, 8, 3)).astype("float32")
    images = np.random.default_rng(1).integers(0, 256, (4, 8, 8, 3)).astype("uint8")
    inputs = keras.Input((8, 8, 3))
    model = keras.Model(inputs, mean_subtraction(mean)(inputs))
    model.save(tmp_path / "mean.keras")
    for each in (model, keras.models.load_model(tmp_path / "mean.keras")):
        np.testing.assert_allclose(each.predict(images, verbose=0), (images - mean) / 255, atol=1e-5)


@pytest.mark.backends
def test_training_model_shares_weights_and_ends_at_the_logits():
    network = tiny_network()
    model = make_training_model(network)
    x = np.random.default_rng(0).normal(size=(4, 32, 32, 3)).astype("float32")
    np.testing.assert_allclose(ops.softmax(model(x)), network(x), rtol=1e-4, atol=1e-6)
    assert {id(v) for v in model.trainable_variables} == {id(v) for v in network.trainable_variables}


@pytest.mark.parametrize(
    "precision", ["float32", pytest.param("mixed_bfloat16", marks=pytest.mark.backends), "mixed_float16"]
)
def test_one_step_under_each_precision(precision):
    keras.config.set_dtype_policy(precision)
    digits = datasets.load("digits", samples=64)
    recipe = dataclasses.replace(QUICK, precision=precision, augmentation="affine")
    model = compile_model(tiny_build(recipe, digits), recipe, 4)
    loss, _ = model.train_on_batch(digits.train.images[:16], digits.train.labels[:16])
    assert np.isfinite(loss)
    assert all(v.dtype == "float32" for v in model.trainable_variables)


def run(folder, recipe):
    folder.mkdir(exist_ok=True)
    keras.utils.set_random_seed(recipe.seed)
    digits = datasets.load("digits", samples=recipe.samples)
    network = plain_build(recipe, digits)
    fit(network, digits, recipe, folder)
    return network.get_weights(), read_history(folder / "history.csv")["loss"]


def test_seed_repeats_a_run(tmp_path):
    recipe = dataclasses.replace(QUICK, augmentation="affine", dropout=0.2)
    weights, losses = run(tmp_path / "a", recipe)
    again, same = run(tmp_path / "b", recipe)
    np.testing.assert_allclose(losses, same, rtol=1e-5)
    for a, b in zip(weights, again):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.backends
def test_images_on_the_device_and_whole_epochs_per_call_change_nothing(tmp_path):
    recipe = dataclasses.replace(QUICK, mix="mixup", cutout=4, augmentation="crop", label_smoothing=0.1)
    weights, losses = run(tmp_path / "a", recipe)
    again, same = run(tmp_path / "b", dataclasses.replace(recipe, data_on_device=True, steps_per_execution=100))
    rates = read_history(tmp_path / "b" / "history.csv")["images_per_second"]
    assert np.isfinite(rates[1:]).all()
    np.testing.assert_allclose(losses, same, rtol=1e-5)
    for a, b in zip(weights, again):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_steps_are_counted_if_the_last_call_of_an_epoch_has_fewer(tmp_path, monkeypatch):
    """Keras numbers the last step as if the last call had as many steps as the others."""
    seconds = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(seconds)))
    batches = Batches(datasets.Examples(np.zeros((194, 1, 1, 3), "uint8"), np.zeros(194, "int32")), 2, seed=0)
    model = SimpleNamespace(optimizer=SimpleNamespace(learning_rate=0.1), jax_state_sync=lambda: None)
    meter, checkpoints = EpochMeter(batches), Checkpoints(tmp_path, {}, len(batches), {})
    for each in (meter, checkpoints):
        each.set_model(model)
    meter.compiled = True
    meter.on_train_begin()
    for epoch in range(2):
        logs = {}
        for each in (meter, checkpoints):
            each.on_epoch_begin(epoch)
        for step in (23, 47, 71, 95, 119):
            meter.on_train_batch_end(step, {"loss": 1.0})
        meter.on_epoch_end(epoch, logs)
        assert logs["images_per_second"] == 97 * 2 / 5
        assert logs["seconds"] == 7, "also what came before the epoch"
    with pytest.raises(RunError, match="step 97 of epoch 2"):
        checkpoints.on_train_batch_end(119, {"loss": float("nan")})


@pytest.mark.backends
def test_alternate_flip_shows_each_image_and_its_mirror_image_alternately():
    images = np.random.default_rng(0).integers(0, 256, (400, 4, 4, 3)).astype("uint8")
    examples = datasets.Examples(images, np.arange(400, dtype="int32"))
    on_device = ImagesOnDevice(np.concatenate([images[:7], images]))
    sent = Batches(examples, 100, seed=3, alternate=True)
    positions = Batches(examples, 100, seed=3, stored_from=7, alternate=True)
    mirrored = np.zeros((4, 400), bool)
    for epoch, seen in enumerate(mirrored):
        sent.set_epoch(epoch)
        positions.set_epoch(epoch)
        for i in range(len(sent)):
            views, labels = sent[i]
            np.testing.assert_array_equal(ops.convert_to_numpy(on_device(positions[i][0])), views)
            seen[labels] = [np.array_equal(view, image[:, ::-1]) for view, image in zip(views, images[labels])]
            assert all(np.array_equal(views[j], images[k]) for j, k in enumerate(labels) if not seen[k])
    assert 150 < mirrored[0].sum() < 250
    np.testing.assert_array_equal(mirrored, [mirrored[0], ~mirrored[0]] * 2)


def test_alternate_flip_replaces_random_flips_and_digits_are_never_flipped():
    digits = datasets.load("digits", samples=64)
    changes = {"augmentation": "crop", "alternate_flip": True, "epochs": 6}
    assert not make_batches(digits, Recipe(dataset="digits", **changes), ONE)[0].alternate
    assert make_batches(digits, Recipe(**changes), ONE)[0].alternate
    crop = compile_model(plain_build(QUICK, digits), Recipe(**changes), 4).get_layer("augmentation")
    assert not crop.flip


@pytest.mark.backends
def test_loss_of_mixed_images_is_the_share_of_both_labels():
    network = tiny_network()
    model = compile_model(network, dataclasses.replace(QUICK, mix="mixup", label_smoothing=0.2), 4)
    labels, share = np.arange(4), np.array([0.1, 0.5, 0.7, 1.0], "float32")
    logits = np.random.default_rng(0).normal(size=(4, 10)).astype("float32")
    log = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    targets = share[:, None] * np.eye(10)[labels] + (1 - share[:, None]) * np.eye(10)[np.roll(labels, 1)]
    expected = -((0.8 * targets + 0.02) * log).sum(axis=1).mean() + float(sum(model.losses))
    loss = model.compute_loss(y=labels, y_pred=(ops.convert_to_tensor(logits), ops.convert_to_tensor(share)))
    assert float(loss) == pytest.approx(expected, rel=1e-5)


@pytest.mark.backends
def test_average_of_the_weights_is_kept_at_the_end(tmp_path):
    """Compare with the average computed by hand from the weights after each step."""

    class Weights(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if keras.backend.backend() == "jax":
                self.model.jax_state_sync()
            seen.append([ops.convert_to_numpy(v) for v in self.model.trainable_variables])

    seen = []
    recipe = dataclasses.replace(QUICK, ema=0.8)
    keras.utils.set_random_seed(0)
    digits = datasets.load("digits", samples=recipe.samples)
    network = plain_build(recipe, digits)
    model = fit(network, digits, recipe, tmp_path, lambda resumed: [Weights()])
    assert len(seen) == 8
    expected = seen[0]
    for weights in seen[1:]:
        expected = [0.8 * a + 0.2 * b for a, b in zip(expected, weights)]
    for variable, wanted in zip(model.trainable_variables, expected):
        np.testing.assert_allclose(ops.convert_to_numpy(variable), wanted, rtol=1e-4, atol=1e-6)


def test_average_of_the_weights_is_kept_with_a_scaled_loss(tmp_path):
    """The averaged weights are validated and kept; they differ from those of a run without an average."""
    keras.config.set_dtype_policy("mixed_float16")
    recipe = dataclasses.replace(QUICK, precision="mixed_float16")
    weights, _ = run(tmp_path / "average", dataclasses.replace(recipe, ema=0.9))
    plain, _ = run(tmp_path / "plain", recipe)
    kept = keras.models.load_model(tmp_path / "average" / "last.keras").get_weights()
    assert all(np.array_equal(a, b) for a, b in zip(weights, kept))
    assert not all(np.allclose(a, b) for a, b in zip(kept, plain))


def test_folder_gets_best_last_history_and_backup(tmp_path):
    run(tmp_path, QUICK)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"best.keras", "last.keras", "history.csv", "backup"}
    columns = (tmp_path / "history.csv").read_text().splitlines()[0].split(",")
    wanted = {"epoch", "loss", "accuracy", "val_loss", "val_accuracy", "learning_rate", "seconds", "images_per_second"}
    wanted |= {"first_step_seconds"}
    assert set(columns) == wanted


def test_without_validation_there_is_no_best(tmp_path):
    recipe = dataclasses.replace(QUICK, validation_split=0.0)
    digits = datasets.load("digits", samples=64, validation_split=0.0)
    fit(plain_build(recipe, digits), digits, recipe, tmp_path)
    assert not (tmp_path / "best.keras").exists() and (tmp_path / "last.keras").exists()


def test_batch_larger_than_the_data_is_named(tmp_path):
    digits = datasets.load("digits", samples=64)
    with pytest.raises(InputError, match="batch_size=100 needs at least as many training images, received 64"):
        fit(plain_build(QUICK, digits), digits, dataclasses.replace(QUICK, batch_size=100), tmp_path)


def test_durations_are_readable():
    assert [format_duration(s) for s in (4.2, 99, 720, 12_000)] == ["4 s", "99 s", "12 min", "3 h 20 min"]


def test_training_time_counts_only_the_steps_that_an_epoch_has():
    history = {"images_per_second": [100.0, 100.0], "seconds": [30.0, 10.0], "first_step_seconds": [25.0, 0.0]}
    recipe = Recipe(batch_size=50, steps_per_execution=97)
    network = SimpleNamespace(count_params=lambda: 0)
    environment = {"backend": "", "device": ""}
    found = summarize({}, recipe, history, network, environment, steps_per_epoch=20)
    assert found["training_time_s"] == 40 - 25 + 20 * 50 / 100


class Counted(keras.layers.Layer):
    """Counts how often it is traced."""

    traced = 0

    def call(self, images):
        Counted.traced += 1
        return ops.cast(images, "float32")


@pytest.mark.backends
def test_all_parts_of_the_data_are_evaluated_by_one_compiled_function():
    digits = datasets.load("digits", samples=70, validation_split=0.15)
    images = keras.Input(digits.train.images.shape[1:], dtype="uint8")
    logits = keras.layers.Dense(10, name="logits")(keras.layers.Flatten()(Counted()(images)))
    network = keras.Model(images, keras.layers.Softmax()(logits))
    Counted.traced = 0
    figures, found = evaluate(network, digits, flip=True)
    assert Counted.traced == 1
    expected = network.predict(digits.test.images, verbose=0)
    np.testing.assert_array_equal(found.argmax(axis=-1), expected.argmax(axis=-1))
    assert figures["test_accuracy"] == np.mean(expected.argmax(axis=-1) == digits.test.labels)

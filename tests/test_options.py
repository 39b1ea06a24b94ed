"""Options of a run: optimizers, accumulation, clipping, class weights, end of mixing, precision, minutes."""

import dataclasses
import json
import os
import shutil
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from keras import ops
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support.backend import apply_gradients
from tests.support.plain import build
from tests.support.tiny import tiny_network
from Training import devices
from Training.data import datasets
from Training.engine import callbacks
from Training.engine.augmentation import Mix
from Training.engine.callbacks import TimeBudget
from Training.engine.final_events import write_final_events
from Training.engine.fit import balance_classes, compile_model, fit, refuse_other_recipe
from Training.engine.optimizers import make_optimizer, make_schedule, set_run_length
from Training.errors import InputError, RunError
from Training.flags import parse
from Training.recipe import OPTIMIZERS, Recipe
from Training.runs.checkpoint import list_checkpoints, unpack
from Training.runs.history import read_history

pytestmark = pytest.mark.backends

QUICK = Recipe(
    dataset="digits", samples=64, epochs=2, batch_size=16, warmup_epochs=0.0, masks_every=0, augmentation="none",
    checkpoint_steps=3,
)  # fmt: skip
SHAPES = {"kernel": (3, 3, 2, 4), "logits_kernel": (5, 3), "gamma": (4,), "beta": (4,)}


def apply(optimizer, variables, steps):
    draws = [np.random.default_rng(step) for step in steps]
    apply_gradients(
        optimizer, variables, [[draw.normal(size=v.shape).astype("float32") for v in variables] for draw in draws]
    )


@pytest.fixture
def make():
    """A function that makes the optimizer of a recipe, built for a few variables of ones."""

    def make_built(recipe):
        variables = [keras.Variable(np.ones(shape, "float32"), name=name) for name, shape in SHAPES.items()]
        optimizer = make_optimizer(recipe, 4)
        optimizer.build(variables)
        return optimizer, variables

    return make_built


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_updates_with_its_own_rate_and_continues_exactly(name, make):
    recipe = dataclasses.replace(QUICK, optimizer=name, learning_rate=0.0, weight_decay_kind="auto", accumulate=2)
    assert recipe.learning_rate == OPTIMIZERS[name].rate > 0
    assert recipe.weight_decay_kind == ("l2" if OPTIMIZERS[name].l2 else "decoupled")
    whole, weights = make(recipe)
    apply(whole, weights, range(6))
    assert all(np.isfinite(w).all() and not np.allclose(w, 1, atol=1e-7) for w in map(ops.convert_to_numpy, weights))
    first, half = make(recipe)
    apply(first, half, range(3))
    second, rest = make(recipe)
    for old, new in zip((*first.variables, *half), (*second.variables, *rest), strict=True):
        new.assign(ops.convert_to_numpy(old))
    apply(second, rest, range(3, 6))
    for a, b in zip(weights, rest, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=a.name)


def test_muon_orthogonalizes_convolutions_and_leaves_the_rest_to_adamw(make):
    recipe = dataclasses.replace(
        QUICK, optimizer="muon", learning_rate=0.01, weight_decay=0.0, weight_decay_kind="auto", schedule="constant"
    )
    optimizer, variables = make(recipe)
    apply(optimizer, variables, range(1))
    change = 1 - ops.convert_to_numpy(variables[0]).reshape(18, 4)
    lengths = np.linalg.svd(change, compute_uv=False) / (0.01 * 0.2 * np.sqrt(18))
    assert (lengths > 0.6).all() and (lengths < 1.3).all(), lengths
    for variable in variables[1:]:  # the first step of Adam is the rate times the sign of the gradient
        np.testing.assert_allclose(np.abs(1 - ops.convert_to_numpy(variable)), 0.01, rtol=1e-3)


@pytest.mark.parametrize("kind", ["l2", "decoupled"])
def test_norms_and_biases_of_a_network_are_not_decayed(kind):
    """The names of TensorFlow's variables contain the paths of their layers."""
    recipe = dataclasses.replace(
        QUICK, decay_all=False, weight_decay=0.5, weight_decay_kind=kind, schedule="constant", learning_rate=0.1
    )
    model = compile_model(tiny_network(classifier_l2=0.0), recipe, 4)
    weights = model.trainable_variables
    for weight in weights:
        weight.assign(np.ones(weight.shape, "float32"))
    model.optimizer.apply([ops.zeros(weight.shape) for weight in weights])
    for weight in weights:
        decayed = bool((ops.convert_to_numpy(weight) < 1).all())
        assert decayed == (weight.name == "kernel"), weight.path


def test_accumulated_steps_are_one_step_of_their_mean(make):
    recipe = dataclasses.replace(QUICK, schedule="constant", learning_rate=0.1, accumulate=3)
    many, ours = make(recipe)
    one, theirs = make(dataclasses.replace(recipe, accumulate=1))
    gradients = [[np.random.default_rng(i).normal(size=v.shape).astype("float32") for v in ours] for i in range(3)]
    for each in gradients:
        before = [ops.convert_to_numpy(v).copy() for v in ours]
        many.apply([ops.convert_to_tensor(g) for g in each])
        changed = any(not np.array_equal(a, ops.convert_to_numpy(v)) for a, v in zip(before, ours))
        assert changed == (each is gradients[-1])
    one.apply([ops.convert_to_tensor(np.mean(parts, axis=0)) for parts in zip(*gradients)])
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_clipping_scales_all_gradients_to_the_global_norm(make):
    recipe = dataclasses.replace(
        QUICK, schedule="constant", learning_rate=1.0, momentum=0.0, weight_decay=0.0, clip_norm=0.5
    )
    optimizer, variables = make(recipe)
    apply(optimizer, variables, range(1))
    changes = [1 - ops.convert_to_numpy(v) for v in variables]
    assert np.sqrt(sum((change**2).sum() for change in changes)) == pytest.approx(0.5, rel=1e-4)


def test_balanced_weights_give_each_class_the_same_share_of_the_loss():
    labels = np.array([0] * 6 + [1] * 3 + [3] * 3)
    weights = balance_classes(labels, 4)
    np.testing.assert_allclose([weights[c] * (labels == c).sum() for c in (0, 1, 3)], 3.0)
    model = compile_model(tiny_network(classes=4), dataclasses.replace(QUICK, mix="mixup"), 4, class_weights=weights)
    y, share = np.array([0, 1, 3, 0]), np.array([0.1, 0.5, 0.7, 1.0], "float32")
    logits = np.random.default_rng(0).normal(size=(4, 4)).astype("float32")
    nats = -(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))
    own, other = (nats[range(4), each] * np.array(weights)[each] for each in (y, np.roll(y, 1)))
    penalty = float(sum(model.losses))
    pair = (ops.convert_to_tensor(logits), ops.convert_to_tensor(share))
    expected = (share * own + (1 - share) * other).mean() + penalty
    assert float(model.compute_loss(y=y, y_pred=pair, training=True)) == pytest.approx(expected, rel=1e-5)
    plain = nats[range(4), y].mean() + penalty
    ones = (pair[0], ops.ones(4))
    assert float(model.compute_loss(y=y, y_pred=ones, training=False)) == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixing_ends_after_its_share_of_the_epochs(kind):
    layer = Mix(kind, until=0.5)
    layer.set_last(epochs=3, steps_per_epoch=1)  # half of three epochs, rounded to two
    images = np.random.default_rng(0).uniform(0, 255, (4, 8, 8, 3)).astype("float32")
    for step in range(4):
        mixed, share = map(ops.convert_to_numpy, layer(images, training=True))
        assert np.array_equal(mixed, images) == (step >= 2)
        assert (share == 1).all() == (step >= 2)
    assert Mix.from_config(layer.get_config()).until == 0.5


def run(folder, recipe, say=lambda line: None):
    folder.mkdir(exist_ok=True)
    keras.utils.set_random_seed(recipe.seed)
    digits = datasets.load("digits", samples=recipe.samples)
    network = build(recipe, digits)
    fit(network, digits, recipe, folder, say=say)
    return network.get_weights(), read_history(folder / "history.csv")["loss"]


@pytest.mark.parametrize(
    "changes",
    [
        {"accumulate": 3, "clip_norm": 0.5, "class_weights": "balanced", "optimizer": "adamw", "learning_rate": 0.0},
        {"mix": "cutmix", "mix_until": 0.5, "augmentation": "crop", "minutes": 0.0, "ema": 0.5, "epochs": 3},
        {"minutes": 0.01, "epochs": 40, "mix": "mixup", "mix_until": 0.5},
    ],
    ids=["accumulate", "mix", "minutes"],
)
def test_options_resume_bit_for_bit(changes, tmp_path, monkeypatch):
    changes = {"weight_decay_kind": "auto", **changes}
    recipe = dataclasses.replace(QUICK, **changes)
    monkeypatch.setattr(TimeBudget, "_estimate_epoch", lambda self, logs: (0.6 - logs["seconds"]) / 3.5)
    weights, losses = run(tmp_path / "whole", recipe)
    assert np.isfinite(losses).all() and len(losses) == (4 if recipe.minutes else recipe.epochs)
    shutil.copytree(tmp_path / "whole" / "backup", tmp_path / "resumed" / "backup")
    newest, before = list_checkpoints(tmp_path / "resumed")
    assert unpack(before.read_bytes())[0]["step"] == 3
    newest.unlink()
    again, same = run(tmp_path / "resumed", recipe)
    np.testing.assert_array_equal(losses, same)
    for a, b in zip(weights, again, strict=True):
        np.testing.assert_array_equal(a, b)


def test_minutes_give_as_many_epochs_as_fit():
    said, recipe = [], Recipe(minutes=10.0, batch_size=100)
    budget = TimeBudget(recipe, devices.ONE, said.append)
    logs = {"seconds": 90.0, "first_step_seconds": 35.0, "images_per_second": 20.0}  # a step takes 5 s
    budget.on_epoch_end(0, logs)
    assert budget.length == 1 + (600 - 90) // 60 == 9
    budget.on_epoch_end(1, {**logs, "seconds": 900.0})
    assert budget.length == 9 and said == ["--minutes 10: 9 epochs in total, 60 s each"]
    late = TimeBudget(dataclasses.replace(recipe, minutes=1.0), devices.ONE, said.append)
    late.on_epoch_end(0, {**logs, "images_per_second": float("nan")})
    assert late.length == 1, "one epoch is trained in any case"
    other = TimeBudget(recipe, devices.ONE, said.append)
    other.restore({"callbacks": {"budget": {"decided": 1.0, "epochs": 9.0}}})
    assert other.decided and other.length == 9
    for epochs in (0.0, -3.0, 2.5, 1e300, float("nan"), float("inf")):
        with pytest.raises(RunError, match="the checkpoint has decided on"):
            other.restore({"callbacks": {"budget": {"decided": 1.0, "epochs": epochs}}})
    whole = TimeBudget(Recipe(epochs=7), devices.ONE, said.append)
    assert whole.decided and whole.length == 7


def test_final_events_stand_at_the_epoch_that_was_the_last(tmp_path):
    """Not at that of the recipe, of which --minutes or --patience leave less."""
    data = SimpleNamespace(
        test=datasets.Examples(np.zeros((2, 8, 8, 3), "uint8"), np.int32([0, 1])), classes=("a", "b")
    )
    result = {"epochs": 3, "test_error_percent": 50.0}
    logits = np.float32([[1, 0], [1, 0]])
    write_final_events(tmp_path, None, data, Recipe(epochs=40, minutes=5.0), result, logits)
    (path,) = (tmp_path / "train").iterdir()
    events = EventAccumulator(str(path), size_guidance={"tensors": 0}).Reload()
    assert [event.step for event in events.Tensors("final/test_error_percent")] == [3]


@pytest.mark.parametrize("per_call", [1, 5])
def test_a_long_run_on_a_processor_says_how_long_it_takes(monkeypatch, per_call):
    """Once, after 20 s of training, without the first step, which compiles: here a step of 2 s."""
    clock, said = [0.0], []
    monkeypatch.setattr(callbacks.time, "perf_counter", lambda: clock[0])

    def run(steps):
        estimate = callbacks.EstimateDuration(steps, lambda line, flush: said.append(line))
        clock[0] = 100.0  # of the first step
        for epoch in range(3):
            estimate.on_epoch_begin(epoch)
            for call in range(10 // per_call):
                estimate.on_train_batch_end((call + 1) * per_call - 1)
                clock[0] += 2.0 * per_call

    run(12_610 + per_call)  # of which 10 are done after the first call, and 7 hours left
    assert len(said) == 1 and "about 7 h 0 min on this processor, without validation" in said[0]
    run(1_000)  # 33 minutes
    assert len(said) == 1


@pytest.mark.parametrize(
    ("first_step", "minutes", "epoch", "steps"),
    [(0, 0.0, 0, 200), (0, 0.0, 5, 150), (3, 0.0, 5, None), (0, 5.0, 0, None)],
)
def test_the_time_is_estimated_only_by_the_call_that_trains_all_epochs(
    tmp_path, monkeypatch, first_step, minutes, epoch, steps
):
    """Not in the rest of an interrupted epoch, and not with --minutes, which decide the number of epochs."""
    monkeypatch.setattr(callbacks, "find_accelerator", lambda: None)
    recipe = Recipe(epochs=20, minutes=minutes)
    batches = SimpleNamespace(first_step=first_step, steps_per_epoch=10, devices=devices.ONE)
    state = {"epoch": epoch, "step": first_step, "callbacks": {}} if epoch else None
    budget = TimeBudget(recipe, devices.ONE, print)
    chosen = callbacks.make_callbacks(recipe, tmp_path, None, batches, (), state, False, budget)
    found = [each.steps for each in chosen if isinstance(each, callbacks.EstimateDuration)]
    assert found == ([] if steps is None else [steps])


@pytest.mark.parametrize("schedule", ["cosine", "linear", "step"])
@pytest.mark.parametrize("epochs", [4, 11, 30])
def test_a_stretched_schedule_keeps_its_first_epoch_and_its_end(schedule, epochs):
    recipe = Recipe(minutes=5.0, epochs=11, schedule=schedule, warmup_epochs=0.0 if schedule == "step" else 1.0)
    optimizer = make_optimizer(recipe, 10)
    plain = make_schedule(recipe, 10)
    set_run_length(optimizer, recipe, epochs)

    def rates(schedule, steps):
        return [float(ops.convert_to_numpy(schedule(ops.convert_to_tensor(float(step))))) for step in steps]

    np.testing.assert_allclose(rates(optimizer.stretched, range(11)), rates(plain, range(11)), rtol=1e-6)
    along = np.linspace(0, 1, 7)[1:]
    ours = rates(optimizer.stretched, 10 + along * (epochs - 1) * 10)
    np.testing.assert_allclose(ours, rates(plain, 10 + along * 100), rtol=1e-4, atol=1e-6)
    copy = type(optimizer.stretched).from_config(optimizer.stretched.get_config())
    np.testing.assert_allclose(rates(copy, [25]), rates(optimizer.stretched, [25]), rtol=1e-6)


def test_a_run_with_minutes_refuses_other_epochs_on_resuming(tmp_path, capsys):
    recipe = Recipe(minutes=5.0)
    (tmp_path / "recipe.json").write_text(recipe.to_json())
    assert parse(["--resume", str(tmp_path)], "")[0] == recipe
    with pytest.raises(SystemExit):
        parse(["--resume", str(tmp_path), "--epochs", "300"], "")
    assert "--epochs cannot change on --resume: --minutes 5 decided" in capsys.readouterr().err
    with pytest.raises(InputError, match="epochs .checkpoint: 200, now: 300"):
        refuse_other_recipe(dataclasses.replace(recipe, epochs=300), dataclasses.asdict(recipe))


def test_older_recipes_keep_their_meaning():
    """A recipe.json of commit 9187e69 has none of these fields, but a rate and a kind of weight decay."""
    new = ("accumulate", "clip_norm", "class_weights", "mix_until", "compile_cache", "minutes")
    values = {key: value for key, value in json.loads(Recipe().to_json()).items() if key not in new}
    assert (values["learning_rate"], values["weight_decay_kind"], values["precision"]) == (0.1, "l2", "float32")
    for given in ({"optimizer": "adam"}, {"optimizer": "sgd", "learning_rate": 0.3}):
        recipe = Recipe.from_json(json.dumps({**values, **given}))
        assert recipe.learning_rate == given.get("learning_rate", 0.1) and recipe.weight_decay_kind == "l2"
        assert (recipe.accumulate, recipe.clip_norm, recipe.class_weights) == (1, 0.0, "none")
        assert (recipe.mix_until, recipe.minutes) == (1.0, 0.0)


def test_precision_auto_is_resolved_before_it_is_recorded(tmp_path, monkeypatch):
    on_tensorflow = keras.backend.backend() == "tensorflow"
    for flags, seconds, wanted in (
        ("avx512f avx512_bf16 amx_tile", 0.5, True),
        ("amx_bf16", 0.5, True),
        ("avx512f avx512_bf16", 2.0, False),  # Emerald Rapids in a virtual machine without AMX
        ("avx512f amx_tile", 0.5, False),
    ):
        (tmp_path / "cpuinfo").write_text(f"flags\t\t: fpu {flags}\n")
        monkeypatch.setattr(devices, "time_products", lambda dtypes, s=seconds: {"bfloat16": s, "float32": 1.0})
        assert devices.gains_from_bfloat16(tmp_path / "cpuinfo") == (wanted and on_tensorflow)
    assert devices.gains_from_bfloat16(tmp_path / "missing") is False
    for answer, precision in ((True, "mixed_bfloat16"), (False, "float32")):
        monkeypatch.setattr(devices, "gains_from_bfloat16", lambda answer=answer: answer)
        assert devices.resolve_precision(Recipe(precision="auto")) == Recipe(precision=precision)
        assert devices.resolve_precision(Recipe(precision="mixed_float16")).precision == "mixed_float16"


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="on JAX, the precisions are equally fast")
def test_options_that_are_slow_on_the_processor_are_named(monkeypatch):
    for gains, changes, named in (
        (True, {"precision": "mixed_bfloat16"}, ""),
        (False, {"precision": "mixed_bfloat16"}, "--precision mixed_bfloat16"),
        (True, {"precision": "mixed_float16"}, "--precision mixed_float16"),
        (True, {"precision": "mixed_bfloat16", "jit": True}, "--jit true"),
        (False, {"precision": "mixed_bfloat16", "jit": True}, "--jit true and --precision mixed_bfloat16"),
        (False, {}, ""),
    ):
        monkeypatch.setattr(devices, "gains_from_bfloat16", lambda gains=gains: gains)
        line = devices.describe_slow_options(Recipe(**changes))
        assert line == (f"slower than the defaults on this processor: {named}" if named else "")
    monkeypatch.setattr(devices, "find_accelerator", lambda: "NVIDIA H100")
    assert devices.describe_slow_options(Recipe(precision="mixed_float16", jit=True)) == ""


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="products are timed on TensorFlow only")
def test_a_larger_product_takes_longer():
    small, large = (devices.time_products(("float32",), size, 3)["float32"] for size in (64, 1024))
    assert 0 < small < large


def test_gpus_gain_from_bfloat16_from_capability_8(monkeypatch):
    if keras.backend.backend() == "jax":
        import jax

        amd = SimpleNamespace(platform="gpu", compute_capability="gfx942")
        monkeypatch.setattr(jax, "devices", lambda: [amd])
        assert devices.gains_from_bfloat16() is False
    for capability, wanted in ((7.5, False), (8.0, True), (9.0, True), (12.1, True)):
        if keras.backend.backend() == "jax":
            import jax

            gpu = SimpleNamespace(platform="gpu", compute_capability=str(capability))
            monkeypatch.setattr(jax, "devices", lambda gpu=gpu: [gpu])
        else:
            import tensorflow as tf

            pair = (int(capability), round(capability % 1 * 10))
            monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: [kind])
            monkeypatch.setattr(
                tf.config.experimental, "get_device_details", lambda gpu, pair=pair: {"compute_capability": pair}
            )
        assert devices.gains_from_bfloat16() is wanted


def test_compile_cache_is_created_and_used(tmp_path, monkeypatch):
    folder = tmp_path / "a" / "cache"
    monkeypatch.setenv("TF_XLA_FLAGS", "--tf_xla_enable_xla_devices=false")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    devices.use_compile_cache(str(folder), keras.backend.backend())
    assert folder.is_dir()
    if keras.backend.backend() == "jax":
        import jax

        assert jax.config.jax_compilation_cache_dir == os.environ["JAX_COMPILATION_CACHE_DIR"] == str(folder)
        jax.config.update("jax_compilation_cache_dir", None)
    else:
        flags = os.environ["TF_XLA_FLAGS"].split()
        assert flags == ["--tf_xla_enable_xla_devices=false", f"--tf_xla_persistent_cache_directory={folder}"]
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--compile-cache .*file/cache: Not a directory"):
        devices.use_compile_cache(str(tmp_path / "file" / "cache"), "tensorflow")
    devices.use_compile_cache("", "tensorflow")
    with pytest.raises(InputError, match="must be a folder without spaces for TensorFlow"):
        devices.use_compile_cache(str(tmp_path / "a b"), "tensorflow")

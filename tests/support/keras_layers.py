"""Checks that every layer must pass, like those for Keras' own layers."""

import inspect
import json

import keras
import numpy as np

DTYPES = ("float32", "mixed_bfloat16", "bfloat16")


def check_layer(make, shape, tmp_path, call=None):
    """Check arguments, config, symbolic call, output spec, dtypes, saving and loading of a layer.

    Args:
        make: function with the keyword arguments `dtype` and `name` that returns the layer.
        shape: shape of one input, without the batch.
        tmp_path: folder for the saved model.
        call: dictionary of additional arguments of a call.
    """
    x = np.random.default_rng(0).uniform(0, 255, (3, *shape)).astype("float32")
    _check_config(make(name="named"), x)
    dtypes = (*DTYPES, "float64") if keras.backend.backend() == "tensorflow" else DTYPES  # JAX has none by default
    for i, dtype in enumerate(dtypes):
        given = keras.dtype_policies.get(dtype) if i % 2 else dtype  # policies and names alternate
        layer = make(name="named", dtype=given)
        assert layer.dtype_policy.name == dtype
        _check_specs(layer, x, call or {})
    _check_saving(make(name="named"), shape, x, tmp_path)
    _check_standard_arguments(make, x)


def _check_standard_arguments(make, x):
    """The arguments that every Keras layer takes: their values are kept, and survive a configuration."""
    layer = make(name="named", trainable=False, autocast=False, activity_regularizer="l2", input_shape=x.shape[1:])
    assert not layer.trainable and not layer.trainable_variables and not layer.autocast
    layer(x)
    assert layer.losses, "the activity is not regularized"
    copy = type(layer).from_config(layer.get_config())
    assert not copy.trainable and isinstance(copy.activity_regularizer, keras.regularizers.L2)


def _check_config(layer, x):
    assert layer.name == "named"
    layer(x)
    config = layer.get_config()
    copy = type(layer).from_config(config)
    assert copy.get_config() == config
    assert {"name", "trainable", "dtype"} <= set(config)
    own = inspect.signature(type(layer).__init__).parameters.values()
    named = {each.name for each in own if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)} - {"self"}
    assert named <= set(config), f"get_config lacks {named - set(config)}"
    frozen = type(layer).from_config({**config, "trainable": False})
    assert frozen.trainable is False and frozen.get_config()["trainable"] is False


def _check_specs(layer, x, call):
    """Check that symbolic output, output spec and computed output agree, in training and outside."""
    symbol = keras.Input(x.shape[1:], batch_size=len(x))
    for training in (False, True):
        given = layer(x, training=training, **call)
        for spec in (layer(symbol, training=training, **call), layer.compute_output_spec(symbol, **call)):
            for wanted, value in zip(keras.tree.flatten(spec), keras.tree.flatten(given), strict=True):
                assert tuple(wanted.shape) == tuple(value.shape)
                assert keras.backend.standardize_dtype(wanted.dtype) == keras.backend.standardize_dtype(value.dtype)
                assert np.isfinite(np.asarray(keras.ops.cast(value, "float32"))).all()


def _check_saving(layer, shape, x, tmp_path):
    inputs = keras.Input(shape)
    model = keras.Model(inputs, layer(inputs))
    model.save(tmp_path / "layer.keras")
    loaded = keras.models.load_model(tmp_path / "layer.keras")
    assert json.dumps(loaded.get_layer("named").get_config()) == json.dumps(layer.get_config())
    for a, b in zip(*(keras.tree.flatten(each.predict(x, verbose=0)) for each in (model, loaded)), strict=True):
        np.testing.assert_array_equal(a, b)

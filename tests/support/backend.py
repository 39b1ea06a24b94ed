"""Settings of tests that depend on the backend."""

import keras

# For `jit_compile` in tests that are not about XLA: on TensorFlow, Keras compiles by default, which takes much longer.
JIT = keras.backend.backend() == "jax"


def apply_gradients(optimizer, variables, steps):
    """Update variables with a list of gradients for each step. JAX compiles the step, as in training.

    Without `jit`, JAX would compile every operation on its own, which takes much longer.
    """
    if keras.backend.backend() != "jax":
        for gradients in steps:
            optimizer.apply([keras.ops.convert_to_tensor(gradient) for gradient in gradients])
        return
    import jax

    apply = jax.jit(optimizer.stateless_apply)
    for gradients in steps:
        values = apply([v.value for v in optimizer.variables], gradients, [v.value for v in variables])
        for variable, value in zip((*variables, *optimizer.variables), (*values[0], *values[1]), strict=True):
            variable.assign(value)


def compute(model, images):
    """Return a model's output as an array. JAX compiles the model, see `apply_gradients`."""
    return model.predict_on_batch(images) if JIT else keras.ops.convert_to_numpy(model(images))

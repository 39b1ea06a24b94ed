"""Settings of tests that depend on the backend."""

import keras

# For `jit_compile` in tests that are not about XLA: on TensorFlow, Keras compiles by default, which takes much longer.
JIT = keras.backend.backend() == "jax"

"""What tests ask of the backend."""

import keras

# For `jit_compile` if a test is not about XLA: Keras also compiles on TensorFlow by default, in several times the time.
JIT = keras.backend.backend() == "jax"

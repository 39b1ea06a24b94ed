"""Devices and processes of a run, and how `--distribute` uses them on TensorFlow and JAX.

A batch is split over the devices of all processes; weights and their updates are the same on each. On JAX, all
processes run the same program, and each reads its part of each batch. Only the first one writes files.
"""

import contextlib
import dataclasses
import math
import os
import platform
import re
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import NamedTuple

from Training.console import format_count
from Training.errors import InputError, RunError, shorten

NEEDS = {"mirrored": "tensorflow", "data": "jax"}
ADDRESSES = "KERAS_DISTRIBUTION_JOB_ADDRESSES"
COUNT = "KERAS_DISTRIBUTION_NUM_PROCESSES"
LONGEST_MESSAGE = 4096  # bytes
STATUS = re.compile("(UNKNOWN|INTERNAL|UNAVAILABLE|FAILED_PRECONDITION|DEADLINE_EXCEEDED|ABORTED|CANCELLED): ")


class Devices(NamedTuple):
    """The number of devices over which a batch is split, the number of processes, and the number of this process."""

    count: int = 1
    processes: int = 1
    process: int = 0

    def __str__(self):
        many = f" in {self.processes} processes" if self.processes > 1 else ""
        return f"{self.count} devices{many}" if self.count > 1 else "1 device"

    @property
    def first(self):
        """Whether this is the first process, which writes the run's files."""
        return self.process == 0

    def part(self, images):
        """Return the slice of a global batch's images that this process reads."""
        share = images // self.processes
        return slice(self.process * share, (self.process + 1) * share)


ONE = Devices()


def count_cores():
    """Return the number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor_name():
    """Return the processor's name as reported by Linux or, on other systems, by Python."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def device_name():
    """Return the name of the device on which the backend trains: a GPU, or the processor with its number of cores."""
    return find_accelerator() or f"{_processor_name()}, {format_count(count_cores(), 'core')}"


def find_accelerator():
    """Return the name of the first GPU or other accelerator that the backend sees, or None."""
    import keras

    if keras.backend.backend() == "jax":
        import jax

        first = jax.devices()[0]
        if first.platform != "cpu":
            return first.device_kind
    elif keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        gpus = tf.config.list_physical_devices("GPU")
        if gpus:
            return tf.config.experimental.get_device_details(gpus[0]).get("device_name", gpus[0].name)
    return None


def resolve_precision(recipe, devices=ONE):
    """Return the recipe with "auto" replaced by the precision for this hardware.

    With several processes, the first decides for all.
    """
    if recipe.precision != "auto":
        return recipe
    precision = ask_first_process(devices, lambda: "mixed_bfloat16" if gains_from_bfloat16() else "float32")
    return dataclasses.replace(recipe, precision=precision)


def describe_slow_options(recipe):
    """Return a line that names the options with which a step takes longer here than with their defaults, or "".

    On a processor, TensorFlow has no fast float16, and fast bfloat16 only where `gains_from_bfloat16`; XLA's
    convolutions are slower than oneDNN's. On JAX, a convolution and its gradients take the same time in all precisions.
    """
    import keras

    if keras.backend.backend() != "tensorflow" or find_accelerator():
        return ""
    slow = ["--jit true"] if recipe.jit else []
    if recipe.precision == "mixed_float16" or (recipe.precision == "mixed_bfloat16" and not gains_from_bfloat16()):
        slow.append(f"--precision {recipe.precision}")
    return f"slower than the defaults on this processor: {' and '.join(slow)}" if slow else ""


def gains_from_bfloat16(cpuinfo="/proc/cpuinfo"):
    """Return whether the device on which the backend trains multiplies faster in bfloat16 than in float32.

    NVIDIA GPUs do from compute capability 8.0 on. Processors need AVX512-BF16 or AMX-BF16, which TensorFlow's oneDNN
    uses and XLA on JAX does not. AVX512-BF16 alone is not enough: an Intel Xeon of the 5th generation in a virtual
    machine without AMX multiplies at half the rate of float32. So the speed of a product is measured.
    """
    import keras

    if keras.backend.backend() == "jax":
        import jax

        first = jax.devices()[0]
        capability = str(getattr(first, "compute_capability", ""))  # of AMD: a name, such as gfx942
        version = re.fullmatch(r"(\d+)\.\d+", capability)
        return first.platform == "tpu" or bool(version and int(version[1]) >= 8)
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        return tf.config.experimental.get_device_details(gpus[0]).get("compute_capability", (0, 0)) >= (8, 0)
    try:
        flags = Path(cpuinfo).read_text()
    except OSError:
        return False
    if not re.search(r"\b(avx512_bf16|amx_bf16)\b", flags):
        return False
    seconds = time_products(("bfloat16", "float32"))
    return seconds["bfloat16"] < seconds["float32"]


def time_products(dtypes, size=1024, repeats=10):
    """Return the seconds that TensorFlow needs for a product of two square matrices in each type, as a dictionary.

    The types take turns, and the fastest of all repeats counts, so that other load on the machine hardly matters.
    """
    import tensorflow as tf

    matrices = {dtype: tf.ones((size, size), dtype) for dtype in dtypes}
    seconds = dict.fromkeys(dtypes, math.inf)
    for _ in range(1 + repeats):  # the first one of each type is slower
        for dtype, matrix in matrices.items():
            begin = time.perf_counter()
            tf.matmul(matrix, matrix)
            seconds[dtype] = min(seconds[dtype], time.perf_counter() - begin)
    return seconds


def use_compile_cache(folder, backend):
    """Keep XLA's compiled code in this folder, which is created. Must be called before the backend is imported.

    Raises:
        InputError: the folder cannot be created, or TensorFlow cannot use its name.
    """
    if not folder:
        return
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise InputError(f"--compile-cache {folder}: {error.strerror or error}") from None
    place = os.path.abspath(folder)
    if backend == "jax":
        os.environ["JAX_COMPILATION_CACHE_DIR"] = place
        if "jax" in sys.modules:  # it has read its environment
            sys.modules["jax"].config.update("jax_compilation_cache_dir", place)
    elif len(place.split()) > 1:
        raise InputError(f"--compile-cache must be a folder without spaces for TensorFlow, received {place!r}")
    else:
        flag = f"--tf_xla_persistent_cache_directory={place}"
        os.environ["TF_XLA_FLAGS"] = f"{os.environ.get('TF_XLA_FLAGS', '')} {flag}".strip()


def refuse_mode(mode, backend):
    """Raise `InputError` if the backend does not support a mode. No framework needs to be started."""
    if mode != "none" and backend != NEEDS[mode]:
        raise InputError(f"--distribute {mode} needs KERAS_BACKEND={NEEDS[mode]}, received {backend}")
    if mode == "mirrored" and os.environ.get("TF_CONFIG"):
        raise InputError(
            "--distribute mirrored is for one machine, but TF_CONFIG names several: Keras' fit does not work with "
            "TensorFlow's strategy for them; use KERAS_BACKEND=jax and --distribute data"
        )
    if mode != "data" and os.environ.get(ADDRESSES):
        raise InputError(f"{ADDRESSES} is set, which needs --distribute data, received --distribute {mode}")


def drop_unsupported(recipe, say=print):
    """Return the recipe without options that fail under `MirroredStrategy` (Keras 3.15): `jit`, `steps_per_execution`.

    Both only change how training is computed, not its result. `say` receives a line that names them.
    """
    left_out = {"jit": False, "steps_per_execution": 1} if recipe.distribute == "mirrored" else {}
    left_out = {name: value for name, value in left_out.items() if getattr(recipe, name) != value}
    if left_out:
        say(f"--distribute mirrored runs without {' and '.join('--' + name.replace('_', '-') for name in left_out)}")
    return dataclasses.replace(recipe, **left_out)


def join_processes(mode):
    """Connect to the other processes of the run. Must be called before JAX finds its devices.

    Their addresses are in Keras' environment variables, see `keras.distribution.initialize`.

    Raises:
        InputError: the variables are invalid, or JAX refuses them. If the others do not connect within five minutes,
            JAX itself ends the process.
    """
    if mode != "data" or not os.environ.get(ADDRESSES):
        return
    import jax
    import keras

    print(f"waiting for all {os.environ.get(COUNT, '')} processes of the run at {os.environ[ADDRESSES]}", flush=True)
    if not os.environ.get("JAX_CPU_COLLECTIVES_IMPLEMENTATION"):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        keras.distribution.initialize()
    except (ValueError, TypeError, RuntimeError) as error:
        raise InputError(f"the processes of {ADDRESSES} cannot connect: {shorten(error)}") from None


@contextlib.contextmanager
def distribute(mode, batch_size):
    """Make and run models on all devices inside this context, which yields `Devices`.

    Raises:
        InputError: `batch_size` is not a multiple of their number.
    """
    if mode == "none":
        yield ONE
        return
    import keras

    if mode == "mirrored":
        import tensorflow as tf

        strategy = tf.distribute.MirroredStrategy()
        devices = Devices(strategy.num_replicas_in_sync)
    else:
        import jax

        strategy = _data_parallel(keras)
        devices = Devices(strategy.num_model_replicas, jax.process_count(), jax.process_index())
    if batch_size % devices.count:
        raise InputError(f"batch_size must be a multiple of the {devices.count} devices, received {batch_size}")
    with strategy.scope():
        yield devices


def _data_parallel(keras):
    class DataParallel(keras.distribution.DataParallel):
        """Keras' distribution, except that each process gets the logits of the whole batch."""

        def get_tensor_layout(self, path):
            whole = path.endswith("logits/output")
            return keras.distribution.TensorLayout([None, None], self.device_mesh) if whole else None

    return DataParallel(devices=keras.distribution.list_devices(), auto_shard_dataset=False)


@contextlib.contextmanager
def on_one_device():
    """Run models in this process only and on one device inside this context."""
    import keras

    before = keras.distribution.distribution()
    keras.distribution.set_distribution(None)
    try:
        yield
    finally:
        keras.distribution.set_distribution(before)


def copy_to_one_device(network):
    """Return the network or, if JAX splits batches, a copy on one device that this process can run by itself."""
    import keras

    if keras.distribution.distribution() is None:
        return network
    with on_one_device():
        return keras.models.clone_model(network)


def ask_first_process(devices, make):
    """Return, in every process, the text that `make` returns in the first one.

    Raises:
        InputError: `make` raised it in the first process; it is then raised in every process.
    """
    if devices.processes == 1:
        return make()
    import numpy as np
    from jax.experimental import multihost_utils

    message = ""
    if devices.first:
        try:
            message = "+" + make()
        except InputError as error:
            message = f"-{error}"
    raw = np.frombuffer(message.encode().ljust(LONGEST_MESSAGE, b"\0"), np.uint8)
    message = multihost_utils.broadcast_one_to_all(raw).tobytes().rstrip(b"\0").decode()
    if message[0] == "-":
        raise InputError(message[1:])
    return message[1:]


def should_stop(devices, step):
    """Return whether any process has received SIGTERM; all processes get the same answer for the same step."""
    if devices.processes == 1:
        return False
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(step)


@contextlib.contextmanager
def report_lost_peers(devices):
    """Raise `RunError` if a collective operation of several processes fails, as it does if one of them is lost."""
    try:
        yield
    except (RuntimeError, ValueError) as error:  # JAX raises both, with the status first
        if devices.processes == 1 or not STATUS.match(str(error)):
            raise
        what = f"a step of the {devices.processes} processes failed, as it does if one of them is lost"
        raise RunError(f"{what}: {shorten(error)}") from None


@contextlib.contextmanager
def end_at_once(devices):
    """End one of several processes immediately if it cannot continue, so that the others fail instead of waiting.

    When the interpreter exits normally, JAX first waits for all processes. After `Interrupted`, they all end.
    """
    try:
        yield
    except BaseException as error:
        code = error.code if isinstance(error, SystemExit) else 1
        if devices.processes == 1 or code == 128 + signal.SIGTERM:
            raise
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
